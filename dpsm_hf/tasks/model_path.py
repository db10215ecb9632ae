"""Which path a model would take in training, found out with a shallow copy of it that has random weights."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from ..models.pretrained import named_model
from ..rules.scoring_rules import Objective
from ..training.arguments import DPSMConfig
from ..training.scorer import BatchRule, Scorer
from . import task_of_model
from .adapters import base_of

#: Entries of the vocabulary and layers of the copy; nothing that is asked for depends on more of them.
_VOCABULARY, _LAYERS = 64, 1
_DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
# More parameters than this in the copy would take long: then it is not made.
_MOST_PARAMETERS = 1_000_000_000

Finding = tuple[str, str, str]


def path_of(name: str) -> list[Finding]:
    """Return what is found about a model: name, words, and ok, warning or error.

    Args:
        name: of the model on the hub, its folder, or a name that this package knows; only its configuration is read.
            Of a PEFT adapter the base is asked about.

    Raises:
        OSError, ValueError: there is no such configuration, or no language model has one of its kind.
    """
    source = named_model(name)
    config = AutoConfig.from_pretrained(base_of(source) or source)
    task = task_of_model(config)
    model = _shallow(config, task.auto_model)
    found: list[Finding] = [("class", type(model).__name__, "ok")]
    inputs = _batch(model)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        args = DPSMConfig(output_dir=folder, use_cpu=True, report_to="none", fused_head="on")
        scorer = Scorer(model, args, args)
        try:
            batch = scorer.batch(model, inputs, None)
        except ValueError as error:
            return [*found, ("loss", str(error), "error")]
        own = batch.own_loss
        shifted = "shifted: row t predicts label t + 1" if batch.alignment == "shifted" else "aligned: row t, label t"
        found.append(("labels", shifted, "ok"))
        model.train()
        try:
            scored = scorer.score(model, batch, BatchRule(Objective("dpsm", alpha=0.5)))
            scored.loss.backward()
        except ValueError as error:
            why = str(error.__cause__ or error)
            return [*found, ("fused head", f"no, full logits are made: {why}", "warning")]
        if own is not None:
            way = "its loss function is replaced" if own.replaceable else "it is called without labels"
            added = 0.0 if scored.added is None else float(scored.added.detach())
            more = f"adds a term of its own ({added:.3g} on a first batch), kept" if added else "adds nothing"
            found.append(("own loss", f"{way}; to the tokens' loss the model {more}", "ok"))
        if scorer.head is None or (own is not None and own.adds):
            why = "what the model adds to its loss cannot be told apart without them"
            return [*found, ("fused head", f"no, full logits are made in training: {why}", "warning")]
        return [*found, ("fused head", "yes: tokens are scored inside the output layer, no logits exist", "ok")]


def _shallow(config: Any, auto_model: Any) -> Any:
    """Return a model of a configuration, made small in depth and vocabulary."""
    text = config.get_text_config()
    for part in {id(part): part for part in (config, text)}.values():
        for field in _DEPTHS:
            if isinstance(getattr(part, field, None), int):
                setattr(part, field, _LAYERS)
        if isinstance(getattr(part, "layer_types", None), list):
            part.layer_types = part.layer_types[:_LAYERS]
        if isinstance(getattr(part, "vocab_size", None), int):
            part.vocab_size = min(part.vocab_size, _VOCABULARY)
            for field, value in list(part.to_dict().items()):
                if field.endswith("_token_id") and isinstance(value, int) and value >= part.vocab_size:
                    setattr(part, field, part.vocab_size - 1)
    with torch.device("meta"):
        size = auto_model.from_config(config).num_parameters()
    if size > _MOST_PARAMETERS:
        raise ValueError(f"one layer of it has {size / 1e9:.1f} billion parameters, too many to try it here.")
    return auto_model.from_config(config)


def _batch(model: Any) -> dict[str, Any]:
    ids = torch.arange(3, 27).reshape(2, 12) % _VOCABULARY
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of what is found out anyway away from the report."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
