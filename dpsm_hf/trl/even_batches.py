"""Evaluation of flattened batches on several processes: as many rows for each, none of them twice.

Accelerate fills the last batches up with rows from the beginning of the set, so that every process has as many, and
drops their results afterwards by the number of rows. A padding-free batch (which packing makes too) is one long row,
of which nothing can be dropped: the tokens that fill up would count as evaluated.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, concatenate_datasets

from ..rules.losses import IGNORE_INDEX


def filled_up(dataset: Dataset, batch_size: int, processes: int) -> Dataset:
    """Spread rows of one token that is not scored over a set, until it fills all batches of all processes.

    Args:
        dataset: tokenized, with ``input_ids`` and ``labels``.
        batch_size: rows of a batch on one process.
        processes: which take batches in turn.

    Returns:
        The rows in their order, in batches that differ by at most one row and each hold at least one. The set as it is
        where that cannot be, with fewer rows than batches, and where it need not: repetitions in batches of a single
        row are dropped by Accelerate.
    """
    rows = len(dataset)
    batches = -(-rows // (batch_size * processes)) * processes
    if rows == batches * batch_size or rows < batches or batch_size == 1:
        return dataset
    filler = dataset.select([0]).map(_one_token, load_from_cache_file=False)
    order: list[int] = []
    for number in range(batches):
        mine = range(rows * number // batches, rows * (number + 1) // batches)
        order += [*mine, *[rows] * (batch_size - len(mine))]
    return concatenate_datasets([dataset, filler]).select(order)


def _one_token(row: dict[str, Any]) -> dict[str, Any]:
    length = len(row["input_ids"])
    short = {name: value[:1] for name, value in row.items() if isinstance(value, list) and len(value) == length}
    documents = {"seq_lengths": [1]} if "seq_lengths" in row else {}
    return {**short, **documents, "labels": [IGNORE_INDEX]}
