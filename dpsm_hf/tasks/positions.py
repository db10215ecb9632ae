"""More positions for an encoder-decoder model, so that it can read longer sources than it was made for."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return how many positions the model's absolute position embeddings have, or None when it has no such limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def resize_positions(model: PreTrainedModel, new_positions: int) -> None:
    """Give a model's encoder and decoder `new_positions` positions, in place.

    Models with their own method (PEGASUS: the sinusoids are recomputed) use it. For learned positions (BART, mBART,
    PLBart, MVP, Blenderbot, BigBird-PEGASUS ...), which transformers refuses to resize, the existing vectors are kept
    and the added positions start as copies of them in order, position p from position p mod n, as Longformer and LED
    were initialised from shorter models. Shrinking cuts vectors off the end.

    Args:
        model: A model with `config.max_position_embeddings`.
        new_positions: Tokens that a row may have afterwards, at least 1.

    Raises:
        ValueError: If the number is below 1, or the model has no position embeddings that can be resized.

    Source: the copying is that of Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 5.
    """
    if new_positions < 1:
        raise ValueError(f"A model needs at least 1 position, not {new_positions}.")
    old_positions = position_limit(model)
    name = type(model).__name__
    if old_positions is None:
        raise ValueError(f"{name} has no max_position_embeddings: its rows have no such limit and need no resizing.")
    if new_positions == old_positions:
        return
    try:
        model.resize_position_embeddings(new_positions)
        return
    except NotImplementedError:
        pass
    tables = {
        id(child): child  # a table that encoder and decoder share is resized once
        for parent in model.modules()
        for attribute, child in parent.named_children()
        if attribute == "embed_positions" and isinstance(child, nn.Embedding) and child.weight.requires_grad
    }.values()
    # BART keeps two unused rows in front (offset 2), Blenderbot none; anything else is a layout this cannot know.
    known = all(
        table.num_embeddings - old_positions == getattr(table, "offset", 0) and getattr(table, "offset", 0) in (0, 2)
        for table in tables
    )
    if not tables or not known:
        raise ValueError(
            f"{name} has {old_positions} positions that cannot be resized here. Use --max_source_length "
            f"{old_positions} or less, or a model with more positions."
        )
    for table in tables:
        offset = table.num_embeddings - old_positions
        rows = torch.arange(new_positions, device=table.weight.device) % old_positions + offset
        front = torch.arange(offset, device=table.weight.device)
        table.weight = nn.Parameter(table.weight.detach()[torch.cat([front, rows])].clone())
        table.num_embeddings = new_positions + offset
    model.config.max_position_embeddings = new_positions


def fit_positions(model: PreTrainedModel, longest_row: int, resize: bool | None) -> None:
    """Make sure the model has a position for every token of the longest row, or say what to do.

    Args:
        model: The model.
        longest_row: The largest of the source and target lengths in tokens.
        resize: Value of --resize_position_embeddings: None resizes with a warning, True resizes, False refuses.

    Raises:
        ValueError: If positions are missing and `resize` is False, or the model cannot be resized.
    """
    limit = position_limit(model)
    if limit is None or longest_row <= limit:
        return
    if resize is False:
        raise ValueError(
            f"Rows may have {longest_row} tokens (--max_source_length, --max_target_length, --val_max_target_length), "
            f"but the model has {limit} positions. Lower them to {limit}, or pass --resize_position_embeddings true."
        )
    if resize is None:
        logger.warning("Increasing the model's number of positions from %d to %d.", limit, longest_row)
    resize_positions(model, longest_row)
