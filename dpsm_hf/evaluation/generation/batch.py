"""From what a model generated to the batch that scores it: the same tokens again, as labels of its own output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.language_model import core_model
from ...rules.losses import IGNORE_INDEX

_FOR_OTHER_LABELS = ("labels", "shift_labels", "skip_logits")

_DEFAULT_NEW_TOKENS = 20  # of generate, where no length is set

_Setting = Callable[[str], Any]


def generated_batch(
    model: nn.Module,
    inputs: Mapping[str, Any],
    generated: Tensor,
    *,
    prompt_length: int | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """Return the batch whose labels are the generated tokens, to be scored as any batch with labels is.

    The probabilities are then the model's own, before temperature, n-gram blocking and whatever else restricts
    generation; so they are the same for greedy search, beam search and sampling. A label is ignored (-100) where the
    token is not the model's choice: the prompt or the decoder's start token, what follows the first end token (the end
    token itself counts), a start token that is forced (BART's ``forced_bos_token_id``) and an end token that is forced
    at the greatest length. In a row without end token (stopped otherwise), padding at its end is ignored too.

    For an encoder-decoder the labels are aligned with ``decoder_input_ids``, ``[B, T]``; for a decoder with
    ``input_ids``, prompt and output together, each predicted by the logits before it as always. Columns at the end
    without a label are cut off.

    Args:
        model: the language model, for its generation config; wrappers are looked through.
        inputs: the batch that ``generate`` was given (with its ``attention_mask`` where it is padded); what concerns
            other labels is left out.
        generated: ``[B, L]`` int64, what ``generate`` returned, padded to any length; one sequence for each row.
        prompt_length: columns of ``generated`` that were given. If left out: 1, the start token, for an
            encoder-decoder; the width of ``input_ids`` for a decoder.
        generation: the keyword arguments that ``generate`` was called with; like there, they come before the config.

    Raises:
        ValueError: if there is more or less than one sequence for a row, or if the sequences do not begin with the
            start token or with the prompt.
    """
    core = core_model(model)
    encoder_decoder = bool(getattr(core.config, "is_encoder_decoder", False))
    given = prompt_length
    if given is None:
        given = 1 if encoder_decoder else inputs["input_ids"].shape[1]
    rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
    if generated.dim() != 2 or len(generated) != rows or generated.shape[1] < given:
        raise ValueError(
            f"generated has shape {tuple(generated.shape)}; expected [{rows}, L] with L at least {given}, one "
            "sequence for each row of the batch (num_return_sequences=1)."
        )
    sources = (generation, generation.get("generation_config"), getattr(core, "generation_config", None))

    def setting(name: str) -> Any:
        values = (s.get(name) if isinstance(s, Mapping) else getattr(s, name, None) for s in sources)
        return next((value for value in values if value is not None), None)

    beginning = _beginning(inputs, encoder_decoder, setting, generated)
    if beginning is not None and not torch.equal(generated[:, : beginning.shape[1]], beginning):
        raise ValueError(
            f"generated begins with {generated[0, : beginning.shape[1]].tolist()} in its first row; expected "
            f"{beginning[0].tolist()}, the {'start token' if encoder_decoder else 'prompt'}, in each. Pass what "
            "generate returned for this batch, with the keyword arguments it was called with."
        )
    counts = _own_choices(generated, given, setting, getattr(core.config, "max_position_embeddings", None))
    labels = torch.where(counts, generated, IGNORE_INDEX)
    tokens = generated.clamp_min(0)  # padded with -100, it would be no input
    used = counts.any(0).nonzero()
    width = max(given, int(used[-1]) + 1 if len(used) else 0)
    batch = {key: value for key, value in inputs.items() if key not in _FOR_OTHER_LABELS}
    if encoder_decoder:
        batch = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
        # a decoder does not run on no input: where nothing was generated there is one label, ignored
        width = max(2, width)
        labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:width]
        return {**batch, "decoder_input_ids": tokens[:, : width - 1], "labels": labels}
    for name in ("token_type_ids", "position_ids"):
        batch.pop(name, None)
    batch |= {"input_ids": tokens[:, :width], "labels": labels[:, :width]}
    if (mask := inputs.get("attention_mask")) is not None:
        batch["attention_mask"] = F.pad(mask, (0, width - mask.shape[1]), value=1)
        if "position_ids" in inspect.signature(core.forward).parameters:
            # as generate counts them; a forward counts padding at the left too
            batch["position_ids"] = (batch["attention_mask"].long().cumsum(-1) - 1).clamp_min(0)
    return batch


def _beginning(
    inputs: Mapping[str, Any], encoder_decoder: bool, setting: _Setting, generated: Tensor
) -> Tensor | None:
    """Return what every row has to begin with, ``[B, given]``; None where the model does not tell."""
    if not encoder_decoder:
        prompt: Tensor = inputs["input_ids"]
        return prompt
    start = setting("decoder_start_token_id")
    start = setting("bos_token_id") if start is None else start
    if start is None:
        return None
    # one for all, or one for each row
    return torch.as_tensor(start).to(generated).reshape(-1, 1).expand(len(generated), 1)


def _own_choices(generated: Tensor, given: int, setting: _Setting, positions: int | None) -> Tensor:
    """Return which tokens the model chose itself, bool ``[B, L]``."""
    place = torch.arange(generated.shape[1], device=generated.device)
    ends = _is_one_of(generated, setting("eos_token_id")) & (place >= given)
    own = (place >= given) & (generated >= 0) & (ends.long().cumsum(1) - ends.long() == 0)
    padding = generated < 0
    if (pad := setting("pad_token_id")) is not None:
        padding = padding | (generated == int(pad))
    trailing = padding.flip(1).long().cumprod(1).flip(1).bool()
    own &= ends.any(1, keepdim=True) | ~trailing
    if setting("forced_bos_token_id") is not None:
        own &= place != 1
    if (forced := setting("forced_eos_token_id")) is not None:
        last = _greatest_length(given, setting, positions) - 1
        # behind it, too: Seq2SeqTrainer changes a default length of the config after the first batch
        own &= ~(_is_one_of(generated, forced) & (place >= last))
    return own


def _greatest_length(given: int, setting: _Setting, positions: int | None) -> int:
    """Return the length, with the prompt, at which ``generate`` stops."""
    if (new := setting("max_new_tokens")) is not None:
        return given + int(new)
    if (length := setting("max_length")) is not None:
        return int(length)
    return min(given + _DEFAULT_NEW_TOKENS, positions or given + _DEFAULT_NEW_TOKENS)


def _is_one_of(tokens: Tensor, ids: Any) -> Tensor:
    if ids is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return torch.isin(tokens, torch.as_tensor(ids).to(tokens).reshape(-1))
