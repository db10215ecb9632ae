"""Nested subsets of a training set, and folds for cross-validation, by a hash of each example's text.

An example is a row, or a document of several rows. Its subset and fold depend on its text only: not on the order of
the data, the seed, the machine or the version of Python. Equal examples are in the same fold, so no text is both
trained on and validated on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from .corruption import exact_share
from .hashing import text_hash
from .loading import AnyDataset

# Different salts, so that a small subset is spread evenly over the folds.
_SUBSET, _FOLD, _SPLIT = "dpsm-hf-subset", "dpsm-hf-fold", "dpsm-hf-split"


def low_resource(
    dataset: AnyDataset, share: float, columns: Sequence[str], *, by_length: bool = False, by_document: bool = False
) -> AnyDataset:
    """Return a share of the examples, in their order; a smaller share is a subset of a larger one.

    The ``ceil(share * n)`` examples with the smallest hashes are kept; with ``by_length`` so many that they hold the
    share of the characters. Of a stream, whose length is unknown, every example with a hash below ``share * 2**64`` is
    kept.

    Args:
        dataset: the training set.
        share: in (0, 1].
        columns: columns with the texts of an example.
        by_length: measure the share in characters instead of examples.
        by_document: examples are documents of several rows, each ended by a blank one.

    Raises:
        ValueError: if the share is out of range, or ``by_document`` is set for a stream.
    """
    part = exact_share("--low_resource", share)
    if not isinstance(dataset, Dataset):
        _refuse_stream_of_documents("--low_resource", by_document)
        limit = part.numerator * 2**64 // part.denominator
        return dataset.filter(functools.partial(_hashes_below, columns=tuple(columns), limit=limit))
    if part == 1:
        return dataset
    hashes, lengths, documents = _examples(dataset, columns, _SUBSET, by_document)
    order = np.lexsort((np.arange(len(hashes)), hashes))
    weights = lengths if by_length else np.ones_like(lengths)
    reached = np.cumsum(weights[order])
    # ceil(share * total) in integer arithmetic
    enough = -(-int(reached[-1]) * part.numerator // part.denominator)
    kept = order[: int(np.searchsorted(reached, enough)) + 1]
    return dataset.select(np.flatnonzero(np.isin(documents, kept)))


def drawn_rows(dataset: Dataset, number: int, seed: int) -> Dataset:
    """Return so many rows drawn at random without replacement, in their order; fewer are among more of one seed.

    Args:
        dataset: the training set.
        number: of rows; all where there are no more.
        seed: of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(np.sort(order[:number]))


def split_by_group(
    dataset: Dataset, columns: Sequence[str], sizes: Mapping[str, int | None], salt: str = ""
) -> dict[str, Dataset]:
    """Divide a data set into splits so that rows with the same text are in the same one.

    Groups of equal rows are taken in the order of the hashes of their texts, whatever the order of the data: the first
    split gets them until it has its number of rows, the next one what follows, and so on.

    Args:
        dataset: to be divided.
        columns: whose values make a group: texts, white space at their ends aside, or anything that JSON can hold.
            Rows without any are groups of their own.
        sizes: rows of each split, in order; None for one split that gets what the others leave. A split is larger by
            the rows of its last group that were too many.
        salt: another one gives another division.

    Returns:
        The splits, rows in the order of the data.

    Raises:
        ValueError: if there are not enough rows, or no row is left for the split that gets what is left.
    """
    if not sizes or sum(size is None for size in sizes.values()) > 1:
        raise ValueError("splits need a size each; one of them may be what the others leave.")
    groups: dict[int, list[int]] = {}
    for index, (values, _) in enumerate(_single_rows(dataset, columns)):
        texts = [_as_text(value) for value in values]
        if not any(texts):  # rows of nothing have nothing in common
            texts = [*texts, str(index)]
        groups.setdefault(text_hash(texts, f"{_SPLIT}{salt}"), []).append(index)
    ordered = iter(sorted(groups))
    found: dict[str, list[int]] = {}
    for name, size in sizes.items():
        if size is None:
            continue
        rows = found[name] = []
        while len(rows) < size:
            group = next(ordered, None)
            if group is None:
                raise ValueError(f"there are {len(dataset):,} rows, too few for {size:,} in the split {name!r}.")
            rows += groups[group]
    rest = [index for group in ordered for index in groups[group]]
    for name, size in sizes.items():
        if size is None:
            if not rest:
                raise ValueError(f"no row of {len(dataset):,} is left for the split {name!r}: take smaller ones.")
            found[name] = rest
    return {name: dataset.select(sorted(found[name])) for name in sizes}


def _as_text(value: Any) -> str:
    """Return a value of a column as a text that equal values share; "" for none."""
    if value is None or isinstance(value, str):
        return (value or "").strip()
    return json.dumps(value, sort_keys=True, default=str)


def fold_of(texts: Sequence[str | None], folds: int) -> int:
    """Return the fold of an example with these texts, from 0 on."""
    return text_hash(texts, _FOLD) % folds


def split_fold(
    dataset: AnyDataset, fold: int, folds: int, columns: Sequence[str], *, by_document: bool = False
) -> tuple[AnyDataset, AnyDataset]:
    """Split a training set into one fold to validate on and all others to train on.

    Args:
        dataset: the training set.
        fold: the fold to validate on, from 0 on.
        folds: number of folds.
        columns: columns with the texts of an example.
        by_document: examples are documents of several rows, each ended by a blank one.

    Returns:
        The training part and the validation part.

    Raises:
        ValueError: if a part is empty, or ``by_document`` is set for a stream.
    """
    if not isinstance(dataset, Dataset):
        _refuse_stream_of_documents("--cross_validation_fold", by_document)
        inside = functools.partial(_in_fold, columns=tuple(columns), fold=fold, folds=folds)
        outside = functools.partial(_not_in_fold, columns=tuple(columns), fold=fold, folds=folds)
        return dataset.filter(outside), dataset.filter(inside)
    hashes, _, documents = _examples(dataset, columns, _FOLD, by_document)
    held_out = (hashes % np.uint64(folds) == fold)[documents]
    if held_out.all() or not held_out.any():
        empty = "validate" if not held_out.any() else "train"
        raise ValueError(
            f"--cross_validation_fold {fold} of {folds}: of {len(hashes)} examples none is left to {empty} on. Use "
            "fewer --cross_validation_folds or more data."
        )
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _examples(
    dataset: Dataset, columns: Sequence[str], salt: str, by_document: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hash and number of characters of each example, and the example that each row belongs to."""
    hashes, lengths, sizes = [], [], []
    for texts, rows in _documents(dataset, columns) if by_document else _single_rows(dataset, columns):
        hashes.append(text_hash(texts, salt))
        lengths.append(sum(len(text or "") for text in texts))
        sizes.append(rows)
    documents = np.repeat(np.arange(len(sizes)), sizes)
    return np.asarray(hashes, dtype=np.uint64), np.asarray(lengths, dtype=np.int64), documents


def _single_rows(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[Sequence[str | None], int]]:
    for batch in dataset.select_columns(list(columns)).iter(batch_size=1000):
        for texts in zip(*(batch[column] for column in columns), strict=True):
            yield texts, 1


def _documents(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[Sequence[str | None], int]]:
    """Yield the lines of each document, and its number of rows including the blank ones that end it."""
    lines: list[str | None] = []
    rows, ended = 0, False
    for texts, _ in _single_rows(dataset, columns):
        blank = not any((text or "").strip() for text in texts)
        if ended and not blank:
            yield lines, rows
            lines, rows, ended = [], 0, False
        if not blank:
            lines.extend(texts)
        ended = blank and bool(lines)
        rows += 1
    if rows:
        yield lines, rows


def _texts(row: Mapping[str, Any], columns: Sequence[str]) -> list[str | None]:
    return [row[column] for column in columns]


def _hashes_below(row: Mapping[str, Any], columns: Sequence[str], limit: int) -> bool:
    return text_hash(_texts(row, columns), _SUBSET) < limit


def _in_fold(row: Mapping[str, Any], columns: Sequence[str], fold: int, folds: int) -> bool:
    return fold_of(_texts(row, columns), folds) == fold


def _not_in_fold(row: Mapping[str, Any], columns: Sequence[str], fold: int, folds: int) -> bool:
    return not _in_fold(row, columns, fold, folds)


def _refuse_stream_of_documents(option: str, by_document: bool) -> None:
    if by_document:
        raise ValueError(
            f"{option} keeps documents of several lines whole, but a stream is read line by line: leave out "
            "--streaming, or pass --document_boundary row if every line is a document."
        )
