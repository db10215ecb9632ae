"""Errors that can be found in a tokenised data set before training starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .losses import IGNORE_INDEX

# Reading is a pass over memory-mapped integers, about a second for this many; what lies beyond is checked batch by
# batch while training.
_MOST_TOKENS = 200_000_000


def check_dataset_labels(dataset: Any, vocab_size: int | None, name: str) -> None:
    """Look at the ``labels`` column of a `datasets.Dataset` for labels that the model has no logit for.

    Other kinds of data sets, and those with selected rows or a transform, are checked batch by batch instead.

    Raises:
        ValueError: naming the label, its row and the vocabulary size.
    """
    if not isinstance(dataset, Dataset) or vocab_size is None or "labels" not in dataset.column_names:
        return
    if dataset._indices is not None or dataset.format["type"] == "custom":
        return
    rows_before, seen = 0, 0
    for chunk in dataset.data.column("labels").chunks:
        if not isinstance(chunk, (pa.ListArray, pa.LargeListArray)) or not pa.types.is_integer(chunk.type.value_type):
            return
        entries = chunk.flatten()
        if entries.null_count:  # an unsigned type has no IGNORE_INDEX to put there
            entries = entries.cast(pa.int64()).fill_null(IGNORE_INDEX)
        values = entries.to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((values >= vocab_size) | ((values < 0) & (values != IGNORE_INDEX)))
        if len(wrong):
            lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            row = rows_before + int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
            raise ValueError(
                f"{name} row {row} has label {values[wrong[0]]}, outside [0, {vocab_size}), the model's vocabulary. "
                f"Tokens that are not to be scored carry {IGNORE_INDEX}; if the tokenizer has more entries than the "
                "model, call model.resize_token_embeddings(len(tokenizer))."
            )
        rows_before += len(chunk)
        seen += len(values)
        if seen > _MOST_TOKENS:
            return
