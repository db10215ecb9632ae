"""What a trainer has to know about a model: its vocabulary, which label each row of logits is scored against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from ..rules.losses import IGNORE_INDEX

Alignment = Literal["shifted", "aligned"]

# Decoders whose forward scores row t against label t although their names say "CausalLM": their users shift the labels
# beforehand.
_UNSHIFTED_CAUSAL_LMS = frozenset(
    {
        "BartForCausalLM",
        "BigBirdPegasusForCausalLM",
        "BlenderbotForCausalLM",
        "BlenderbotSmallForCausalLM",
        "CpmAntForCausalLM",
        "MBartForCausalLM",
        "MarianForCausalLM",
        "MvpForCausalLM",
        "PLBartForCausalLM",
        "PegasusForCausalLM",
        "ProphetNetForCausalLM",
        "TrOCRForCausalLM",
        "WhisperForCausalLM",
        "XLMWithLMHeadModel",
        "XLNetLMHeadModel",
    }
)


def _class_names(*tables: Mapping[str, Any]) -> frozenset[str]:
    values = [value for table in tables for value in table.values()]
    return frozenset(name for value in values for name in ([value] if isinstance(value, str) else value))


_ALIGNED = (
    _UNSHIFTED_CAUSAL_LMS
    | _class_names(
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    | {"EncoderDecoderModel", "SpeechEncoderDecoderModel", "VisionEncoderDecoderModel"}
)
_SHIFTED = _class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - _ALIGNED


# Keys of a batch that only the loss uses; Trainer adds skip_logits where Liger has replaced the forward.
_FOR_THE_LOSS = ("labels", "shift_labels", "skip_logits")


def core_model(model: nn.Module) -> nn.Module:
    """Return the language model inside wrappers of torch.compile, data parallelism and PEFT."""
    while (inner := _wrapped(model)) is not None:  # wrappers can be nested in any order
        model = inner
    return cast(Any, model).get_base_model() if isinstance(model, PeftModel) else model


def is_compiled(model: nn.Module) -> bool:
    """Return whether the whole model, or a wrapper around it, is compiled by torch.compile."""
    inner: nn.Module | None = model
    while inner is not None:
        if hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None:
            return True
        inner = _wrapped(inner)
    return False


def _wrapped(model: nn.Module) -> nn.Module | None:
    candidates = (getattr(model, attribute, None) for attribute in ("_orig_mod", "module"))
    return next((inner for inner in candidates if isinstance(inner, nn.Module)), None)


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of logits per token, or None if the model does not say."""
    core = core_model(model)
    head = core.get_output_embeddings() if isinstance(core, PreTrainedModel) else None
    if head is not None and hasattr(head, "out_features"):
        return int(head.out_features)
    return getattr(getattr(core, "config", None), "vocab_size", None)


def label_alignment(model: nn.Module) -> Alignment | None:
    """Return which label row ``t`` of the logits predicts: "shifted" ``t + 1``, "aligned" ``t``; None if unknown.

    Classes are looked up by name in Transformers' tables. What counts is the class that defines ``forward``, since a
    subclass with its own forward may compute another loss.
    """
    core = core_model(model)
    name = next(base for base in type(core).__mro__ if "forward" in vars(base)).__name__
    if name in _ALIGNED:
        return "aligned"
    return "shifted" if name in _SHIFTED else None


def probe_alignment(model: nn.Module, inputs: Mapping[str, Any]) -> Alignment:
    """Find the alignment of an unknown model: the one whose cross-entropy on a batch equals the model's own loss.

    Args:
        model: called without gradient, in evaluation mode so that no random number is drawn.
        inputs: a batch with ``labels``.

    Raises:
        ValueError: if neither possibility reproduces the model's loss.
    """
    core, labels = core_model(model), inputs["labels"]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            loss, logits = _loss_and_logits(model(**inputs))
            found: dict[Alignment, float] = {}
            if loss is not None and logits is not None and logits.shape[:-1] == labels.shape:
                flat = logits.float().reshape(-1, logits.shape[-1])
                for alignment in get_args(Alignment):
                    targets = align_targets(labels, logits.shape[-2], alignment).reshape(-1)
                    found[alignment] = float(F.cross_entropy(flat, targets, ignore_index=IGNORE_INDEX))
            own = None if loss is None else float(loss.float().mean())
            fits = [a for a, value in found.items() if own is not None and math.isclose(value, own, rel_tol=1e-3)]
            if len(fits) > 1:
                # an untrained model: both losses are near log V. With a label in the first place alone, an aligned
                # model has a loss and a shifted one has none.
                first = torch.full_like(labels, IGNORE_INDEX)
                first[..., 0] = labels[labels != IGNORE_INDEX][0]
                alone, _ = _loss_and_logits(model(**{**inputs, "labels": first}))
                scored = alone is not None and float(alone.float().mean()) > 0  # False for NaN
                fits = ["aligned" if scored else "shifted"]
    finally:
        model.train(was_training)
    if fits:
        return fits[0]
    raise ValueError(
        f"{type(core).__name__} is not a language model that DPSM knows, and its own loss on the first batch ({own}) "
        f"is not the cross-entropy of its logits against the labels (shifted by one or aligned: {found}). "
        "DPSM scores tokens from logits [batch, length, vocabulary]; loss_type='ce' trains any model as Trainer does."
    )


def _loss_and_logits(outputs: Any) -> tuple[Tensor | None, Tensor | None]:
    named = isinstance(outputs, Mapping)
    loss, logits = (outputs.get("loss"), outputs.get("logits")) if named else (outputs[0], outputs[1])
    return loss if isinstance(loss, Tensor) else None, logits if isinstance(logits, Tensor) else None


def align_targets(labels: Tensor, length: int, alignment: Alignment) -> Tensor:
    """Return the label that each of ``length`` positions of the model's output is scored against, ``[B, length]``.

    Virtual tokens before the text (PEFT's prompt tuning) are not scored, except that the last one predicts the first
    label where labels are shifted.

    Args:
        labels: ``[B, labels]``, -100 where nothing is scored.
        length: positions of the model's logits, at least the number of labels.
        alignment: of the model.

    Raises:
        ValueError: if the model's output is shorter than the labels.
    """
    virtual = length - labels.shape[-1]
    if virtual < 0:
        raise ValueError(
            f"the model returned logits for {length} positions but the labels have {labels.shape[-1]}; "
            "every label position needs its logits (leave logits_to_keep and the like out of the batch)."
        )
    if alignment == "aligned":
        return F.pad(labels, (virtual, 0), value=IGNORE_INDEX)
    return F.pad(labels, (virtual, 1), value=IGNORE_INDEX)[..., 1:].contiguous()


def inputs_without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch without labels, with decoder inputs made from them where the model needs those.

    Raises:
        ValueError: if an encoder-decoder cannot make its decoder inputs from the labels.
    """
    batch = {key: value for key, value in inputs.items() if key not in _FOR_THE_LOSS}
    core = core_model(model)
    if not getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        return batch
    if batch.get("decoder_input_ids") is None and batch.get("decoder_inputs_embeds") is None:
        prepare = getattr(core, "prepare_decoder_input_ids_from_labels", None)
        if prepare is None:
            raise ValueError(
                f"{type(core).__name__} cannot make decoder_input_ids from labels; let the data collator add them "
                "(DataCollatorForSeq2Seq(tokenizer, model=model) does)."
            )
        batch["decoder_input_ids"] = prepare(labels=inputs["labels"])
    return batch


def router_loss(model: nn.Module, outputs: Any) -> Tensor | None:
    """Return the weighted load-balancing loss of a mixture-of-experts model, or None where it has none.

    Models add it themselves only when they are given labels; here they are not.

    Raises:
        ValueError: if ``output_router_logits`` is on but the output has no ``aux_loss``.
    """
    config = getattr(core_model(model), "config", None)
    if not getattr(config, "output_router_logits", False):
        return None
    auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    if not isinstance(auxiliary, Tensor):
        raise ValueError(
            f"{type(core_model(model)).__name__} has output_router_logits=True but returns no aux_loss without "
            "labels, so its router cannot be trained here; set output_router_logits=False or loss_type='ce'."
        )
    return float(getattr(config, "router_aux_loss_coef", 0.0)) * auxiliary


def end_tokens(core: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text; empty if neither model nor tokenizer names one.

    Args:
        core: the language model without wrappers.
        tokenizer: used where neither the generation config nor the config names one.
    """
    for source in (getattr(core, "generation_config", None), getattr(core, "config", None), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()
