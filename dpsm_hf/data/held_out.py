"""Splits that are cut from the train split, where a data set does not bring them."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

AnyDataset: TypeAlias = Dataset | IterableDataset


def hold_out(
    splits: dict[str, AnyDataset], name: str, percentage: int, *, at_end: bool = False, required: bool = True
) -> dict[str, AnyDataset]:
    """Cut a split from the first rows of train, or from its last (of every 100 rows, in a stream).

    Args:
        splits: With ``train``.
        name: Of the new split.
        percentage: Share of train's rows, in percent.
        at_end: Take the last rows.
        required: Whether a train split too small for it is an error; else it is left whole.

    Returns:
        The splits with ``train`` shortened and the new one.

    Raises:
        ValueError: A percentage out of range, or too few rows.
    """
    check_percentage(name, percentage)
    train = splits["train"]
    if isinstance(train, IterableDataset):
        lowest, beyond = (100 - percentage, 100) if at_end else (0, percentage)
        held_out = train.filter(functools.partial(_in_share, lowest=lowest, beyond=beyond), with_indices=True)
        kept = train.filter(functools.partial(_not_in_share, lowest=lowest, beyond=beyond), with_indices=True)
        return {**splits, "train": kept, name: held_out}
    rows = len(train)
    number = max(1, round(rows * percentage / 100))
    if number >= rows:
        if not required:
            return splits
        raise ValueError(
            f"The train split has {rows} row(s), too few to hold out {percentage} % for {name}: give a --{name}_file."
        )
    cut = rows - number if at_end else number
    first, last = train.select(range(cut)), train.select(range(cut, rows))
    return {**splits, "train": first if at_end else last, name: last if at_end else first}


def check_percentage(name: str, percentage: int) -> None:
    """Refuse a share of the train split that leaves nothing on one side.

    Raises:
        ValueError: Naming the option and the percentage.
    """
    if not 0 < percentage < 100:
        raise ValueError(f"--{name}_split_percentage {percentage} must lie between 1 and 99.")


def _in_share(row: dict[str, Any], index: int, lowest: int, beyond: int) -> bool:
    return lowest <= index % 100 < beyond


def _not_in_share(row: dict[str, Any], index: int, lowest: int, beyond: int) -> bool:
    return not _in_share(row, index, lowest, beyond)
