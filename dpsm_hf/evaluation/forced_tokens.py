"""Labels at the beginning of a text that are set and not predicted: BART's first ``<s>``, a language code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.language_model import end_tokens
from ..rules.losses import IGNORE_INDEX

# Special tokens that stand for a piece of text.
_OF_TEXT = ("unk_token_id", "mask_token_id", "pad_token_id")


def forced_token_ids(core: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the ids of the tokens that a text may be made to begin with, in order.

    They are the special tokens of the tokenizer and the ``forced_bos_token_id`` and ``bos_token_id`` of the model, but
    for those that end a text and those that stand for a piece of it (unknown, masked, padding).

    Args:
        core: the language model without wrappers.
        tokenizer: if there is one.
    """
    sources = (getattr(core, "generation_config", None), getattr(core, "config", None))
    ids = {getattr(source, name, None) for source in sources for name in ("forced_bos_token_id", "bos_token_id")}
    ids |= set(getattr(tokenizer, "all_special_ids", ()))
    without = {*end_tokens(core, tokenizer), *(getattr(tokenizer, name, None) for name in _OF_TEXT), None}
    return tuple(sorted(int(i) for i in ids - without if i is not None))


def forced_labels(targets: Tensor, ids: Tensor) -> Tensor:
    """Return which labels are forced: those at the beginning of a row's scored labels that are one of the ids.

    Args:
        targets: labels as they are scored, ``[B, T]``; -100 is not scored.
        ids: int64, of `forced_token_ids`.

    Returns:
        bool ``[B, T]``.
    """
    scored = targets != IGNORE_INDEX
    special = scored & torch.isin(targets, ids.to(targets.device))
    return special & ((scored & ~special).cumsum(-1) == 0)
