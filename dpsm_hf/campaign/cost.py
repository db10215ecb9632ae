"""What training a run costs before it is started: parameters, tokens and floating-point operations.

Parameters are counted on the real model, built on torch's meta device: no memory, no weights, no download. With N the
parameters of a part's weight matrices (embeddings not counted, the output layer counted, tied or not), L its layers, d
the width of its attention, and S and T the tokens of a source and a target, one row costs in forward and backward

    language model           6 N S + 12 L d S^2
    encoder and decoder      6 (N_enc + N_cross) S + 12 L_enc d S^2
                           + 6 N_dec T + 12 L_dec d (T^2 + S T)

where N_cross are the cross-attention's key and value matrices, which read the source. 6 is 2 operations for each
multiplication and addition, times 1 for forward and 2 for backward; attention counts as if it were not causal. Of
layers that are frozen (``freeze_layers``) nothing is counted: what they put out is computed once and kept.

Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1; Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..data.tokenizer import DEFAULT_VOCAB_SIZE, TRAIN_BPE
from ..models.pretrained import named_model
from ..tasks import get_task, task_of_model
from ..tasks.model_building import build_config_from_scratch
from .spec.design import Campaign, Run
from .spec.script_arguments import quiet

# Names of the cross-attention's matrices that read the encoder's output, in BART's family and in T5's.
_CROSS = ("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v")


@dataclass(frozen=True)
class ModelSize:
    """The parts of a model that cost time: parameters of matrices, numbers of layers, the width of the attention."""

    parameters: int  # all of them, tied ones once
    decoder: int  # those of matrices that read the target's tokens; of a language model, all
    encoder: int
    cross: int  # those of the cross-attention's key and value matrices
    head: int  # of the decoder's, those of the output layer
    decoder_layers: int
    encoder_layers: int
    width: int

    def above(self, frozen: int) -> ModelSize:
        """Return the size of what is run where so many of the lowest layers of a language model are frozen."""
        layers = max(0, self.decoder_layers - frozen)
        body = (self.decoder - self.head) * layers // max(1, self.decoder_layers)
        return replace(self, decoder=body + self.head, decoder_layers=layers)

    def row_flops(self, source: int, target: int) -> float:
        """Return the operations of forward and backward of one row by the module's formula.

        The arguments are tokens: of the source, 0 for a language model; of the target, or a language model's row.
        """
        matrices = 6.0 * ((self.encoder + self.cross) * source + self.decoder * target)
        attention = self.encoder_layers * source**2 + self.decoder_layers * (target**2 + source * target)
        return matrices + 12.0 * self.width * attention


@dataclass(frozen=True)
class Cost:
    """What a run costs; None where it cannot be told beforehand."""

    parameters: int | None
    steps: int | None  # optimizer steps, if training is not stopped early
    tokens: int | None  # that are trained on, at most: rows of a summarisation set are shorter than the limits
    flops: float | None  # of training, evaluation not counted


def run_cost(campaign: Campaign, run: Run, size: str | None = None, data: str | None = None) -> Cost:
    """Return what a run costs; under ``size`` and ``data`` the file may say more about model and data."""
    given = run.arguments
    model = model_size(campaign, run, size)
    if model is not None and given.get("freeze_layers") is not None:
        model = model.above(int(given["freeze_layers"]))
    micro = int(given.get("per_device_train_batch_size", 8)) * int(given.get("gradient_accumulation_steps", 1))
    rows = micro * run.processes
    steps = _steps(given, rows, campaign.planned.get("data", {}).get(data or "", {}))
    source, target = get_task(run.task).row_tokens(given)  # at most
    tokens = None if steps is None else steps * rows * (source + target)
    flops = None if steps is None or model is None else steps * rows * model.row_flops(source, target)
    return Cost(model.parameters if model else None, steps, tokens, flops)


def _steps(given: Mapping[str, Any], rows: int, planned: Mapping[str, int]) -> int | None:
    if int(given.get("max_steps", -1)) > 0:
        return int(given["max_steps"])
    examples = planned.get("train_examples")
    if examples is None and "train_tokens" in planned:
        examples = planned["train_tokens"] // int(given.get("block_size", 1024))
    if examples is None:
        return None
    folds = given.get("cross_validation_folds")
    share = float(given.get("low_resource") or 1.0) * ((folds - 1) / folds if folds else 1.0)
    if given.get("max_train_samples") is not None:
        examples = min(examples, int(given["max_train_samples"]))
    return math.ceil(float(given.get("num_train_epochs", 3.0)) * math.ceil(examples * share / rows))


# ---- the model -----------------------------------------------------------------------------------------------------


def model_size(campaign: Campaign, run: Run, size: str | None = None) -> ModelSize | None:
    """Return the size of a run's model, None where it is on the hub and nothing here says what it is.

    An architecture that cannot be built is a ValueError.
    """
    given = campaign.with_architecture(run).arguments
    source, vocabulary = given.get("config_name") or given.get("model_name_or_path"), None
    shape = campaign.planned.get("size", {}).get(size or "", {}) if source else given
    if not source and given.get("tokenizer_name") == TRAIN_BPE:
        vocabulary = given.get("tokenizer_vocab_size") or DEFAULT_VOCAB_SIZE
    try:
        return _size(source, shape.get("model_type"), shape.get("config_overrides"), vocabulary)
    except ValueError as error:  # heads that do not divide the width, say: only building the model tells
        what = " ".join(filter(None, [given.get("model_type"), given.get("config_overrides")]))
        where = f"size {size}" if size else f"run {run.id}"
        raise ValueError(f"{campaign.name}: {where} ({what}) is no model that can be built: {error}") from error


@functools.cache
def _size(
    source: str | None, model_type: str | None, overrides: str | None, vocabulary: int | None
) -> ModelSize | None:
    if source:
        with contextlib.suppress(OSError, ValueError):  # not on this machine: the file may say what it is
            return measure(AutoConfig.from_pretrained(named_model(source), local_files_only=True))
    if model_type is None:
        return None
    if vocabulary is not None and "vocab_size" not in (overrides or ""):
        overrides = ",".join(filter(None, [overrides, f"vocab_size={vocabulary}"]))
    with quiet():  # special tokens of another vocabulary do not matter here
        return measure(build_config_from_scratch(model_type, overrides, None))


def measure(config: PreTrainedConfig) -> ModelSize:
    """Build a model without memory for its weights and count them."""
    with torch.device("meta"):
        model = task_of_model(config).auto_model.from_config(config)
    model.tie_weights()
    inside = {id(module) for module in model.get_encoder().modules()} if config.is_encoder_decoder else set()
    parts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            part = "encoder" if id(module) in inside else "cross" if name.endswith(_CROSS) else "decoder"
            parts[part] += module.weight.numel()
    layers, named = int(config.num_hidden_layers), config.to_dict()
    output: Any = model.get_output_embeddings()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        decoder=parts["decoder"],
        encoder=parts["encoder"],
        cross=parts["cross"],
        head=0 if output is None else output.weight.numel(),
        decoder_layers=int(named.get("decoder_layers") or named.get("num_decoder_layers") or layers),
        encoder_layers=int(named.get("encoder_layers") or layers) if config.is_encoder_decoder else 0,
        width=int(config.hidden_size),
    )
