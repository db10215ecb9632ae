"""What a trainer has to know about a model: its core, its vocabulary, and which label each row of logits predicts."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
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

# Decoders that compare row t of the logits with label t, unlike other causal models: their users shift the labels.
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
    | _class_names(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    | {"EncoderDecoderModel", "SpeechEncoderDecoderModel", "VisionEncoderDecoderModel"}
)
# Of these classes encoder-decoders are aligned and decoders are shifted; models of speech or images may be either.
_LANGUAGE_MODELS = _class_names(
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


# The alignment that `dpsm_hf.models.own_loss` measured on a model's first batch.
_MEASURED: weakref.WeakKeyDictionary[nn.Module, Alignment] = weakref.WeakKeyDictionary()

# Kinds of prompt learning whose virtual tokens are inputs with logits; in prefix tuning they are keys and values only.
_PROMPTS_WITH_LOGITS = frozenset({PeftType.PROMPT_TUNING, PeftType.MULTITASK_PROMPT_TUNING, PeftType.P_TUNING})

# Keys of a batch that only the loss uses; Trainer adds skip_logits when Liger has replaced the forward.
_FOR_THE_LOSS = ("labels", "shift_labels", "skip_logits")


def core_model(model: nn.Module) -> nn.Module:
    """Return the language model inside its wrappers: torch.compile, data parallelism, PEFT, in any order."""
    while (inner := _wrapped(model)) is not None:
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
    """Return the number of logits per token, V; None if neither output layer nor configuration has it."""
    core = core_model(model)
    head = core.get_output_embeddings() if isinstance(core, PreTrainedModel) else None
    if head is not None and hasattr(head, "out_features"):
        return int(head.out_features)
    return getattr(getattr(core, "config", None), "vocab_size", None)


def label_alignment(model: nn.Module) -> Alignment | None:
    """Return which label row ``t`` of the logits predicts: "shifted" ``t + 1``, "aligned" ``t``; None if unknown.

    After the first scored batch this is what `dpsm_hf.models.own_loss` measured. Before, the class is looked up by
    name in Transformers' tables: the class that defines ``forward``, since a subclass with its own forward may compute
    another loss.
    """
    core = core_model(model)
    if core in _MEASURED:
        return _MEASURED[core]
    name = next(base for base in type(core).__mro__ if "forward" in vars(base)).__name__
    if name in _ALIGNED:
        return "aligned"
    if name not in _LANGUAGE_MODELS:
        return None
    return "aligned" if getattr(getattr(core, "config", None), "is_encoder_decoder", False) else "shifted"


def remember_alignment(core: nn.Module, alignment: Alignment) -> None:
    """Store the measured alignment of a model, for `label_alignment`."""
    _MEASURED[core] = alignment


def virtual_tokens(model: nn.Module) -> int:
    """Return how many positions without labels PEFT's prompt tuning puts before the text."""
    config = _adapter(model)
    prompted = config is not None and config.is_prompt_learning and config.peft_type in _PROMPTS_WITH_LOGITS
    return int(config.num_virtual_tokens) if prompted else 0


def own_weights(model: nn.Module) -> bool:
    """Return whether PEFT weighs the tokens by a loss of its own: context-aware prompt tuning does."""
    config = _adapter(model)
    return config is not None and config.peft_type == PeftType.CPT


def _adapter(model: nn.Module) -> Any:
    """Return the configuration of the active PEFT adapter; None without one."""
    inner: nn.Module | None = model
    while inner is not None:
        if isinstance(inner, PeftModel):
            return inner.active_peft_config
        inner = _wrapped(inner)
    return None


def loss_in(outputs: Any) -> Tensor | None:
    """Return the loss in a model's outputs: the one named so, the first of a tuple, or the only tensor; None if none.

    The model must have been given labels: without, a tuple does not begin with a loss.
    """
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    else:
        loss = outputs if isinstance(outputs, Tensor) else outputs[0]
    return loss if isinstance(loss, Tensor) and loss.dim() < 2 else None


def logits_in(outputs: Any) -> Tensor | None:
    """Return the logits in a model's outputs: the tensor named so, the first of a tuple with two or more dimensions.

    A tuple holds, in this order, those of loss, router loss and logits that the model computed. An output that is a
    single tensor of two or more dimensions is taken for the logits. None if there are none.
    """
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, Tensor):
        logits = outputs if outputs.dim() > 1 else None
    else:
        logits = next((part for part in outputs if isinstance(part, Tensor) and part.dim() > 1), None)
    return logits if isinstance(logits, Tensor) else None


def check_positions(model: nn.Module, labels: Tensor, length: int, *, leads: bool) -> None:
    """Refuse labels of another length than the model's logits, where which belongs to which cannot be known.

    Args:
        model: the language model, possibly wrapped.
        labels: ``[B, labels]``.
        length: positions of the model's logits.
        leads: whether the model's logits begin with positions that have no label, such as those of an image.

    Raises:
        ValueError: if there are more logits than labels, virtual tokens not counted, and ``leads`` is False.
    """
    virtual = virtual_tokens(model)
    if leads or length <= labels.shape[-1] + virtual:
        return
    expected = f"{labels.shape[-1]}" if not virtual else f"{labels.shape[-1]} after {virtual} virtual tokens"
    raise ValueError(
        f"{type(core_model(model)).__name__} returned logits for {length} positions, but the labels have {expected}: "
        "which of them they belong to cannot be known. Make labels as long as input_ids, with -100 where nothing is "
        "scored."
    )


def align_targets(labels: Tensor, length: int, alignment: Alignment) -> Tensor:
    """Return the label that each of ``length`` positions of the logits is scored against, ``[B, length]``.

    Positions before the text (virtual tokens of PEFT's prompt tuning, images) are not scored, except that with shifted
    labels the last of them predicts the first label.

    Args:
        labels: ``[B, labels]``, -100 where nothing is scored.
        length: positions of the model's logits, at least the number of labels.
        alignment: of the model.

    Raises:
        ValueError: if there are fewer logits than labels.
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
    """Return a batch without labels; for an encoder-decoder, with decoder inputs made from them if it has none.

    Raises:
        ValueError: if an encoder-decoder cannot make its decoder inputs from the labels.
    """
    batch = {key: value for key, value in inputs.items() if key not in _FOR_THE_LOSS}
    core = core_model(model)
    if not getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        return batch
    if batch.get("decoder_input_ids") is None and batch.get("decoder_inputs_embeds") is None:
        batch["decoder_input_ids"] = _decoder_input_ids(core, inputs["labels"])
    return batch


def _decoder_input_ids(core: nn.Module, labels: Tensor) -> Tensor:
    """Return the decoder inputs for these labels: by the model's own method, or the labels shifted right by one.

    `dpsm_hf.models.own_loss` checks on the first batch that the model makes the same of its labels.
    """
    prepare = getattr(core, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return cast(Tensor, prepare(labels=labels))
    start, pad = (_token_of_decoder(core, name) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise ValueError(
            f"{type(core).__name__} cannot make decoder_input_ids from labels: its configuration has no "
            "decoder_start_token_id or pad_token_id. Set both in model.config, or add decoder_input_ids to the "
            "batches in a collator of your own: the labels shifted to the right by one, with the start token in front "
            "and padding for -100 (DataCollatorForSeq2Seq leaves them out for a model without "
            "prepare_decoder_input_ids_from_labels)."
        )
    shifted = torch.cat([torch.full_like(labels[..., :1], start), labels[..., :-1]], dim=-1)
    return shifted.masked_fill(shifted == IGNORE_INDEX, pad)


def _token_of_decoder(core: nn.Module, name: str) -> int | None:
    config: Any = core.config
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "decoder"))]
    parts.append(getattr(core, "generation_config", None))
    found = (part.get(name) if isinstance(part, dict) else getattr(part, name, None) for part in parts)
    return next((int(value) for value in found if isinstance(value, int)), None)


def end_tokens(core: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the ids of the end-of-sequence tokens; empty if neither model nor tokenizer has one.

    Args:
        core: the language model without wrappers.
        tokenizer: used if neither the generation config nor the config has one.
    """
    for source in (getattr(core, "generation_config", None), getattr(core, "config", None), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()
