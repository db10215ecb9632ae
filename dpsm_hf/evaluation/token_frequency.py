"""Which tokens are frequent and which are rare, counted in the labels of a data set."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import has_length

from ..rules.losses import IGNORE_INDEX

#: The buckets end at these shares of the labels: the most frequent tokens that make up half of them, and so on. All
#: other tokens, those never seen too, are in a last bucket.
SHARES = (0.5, 0.8, 0.95)
BUCKETS = len(SHARES) + 1

# Samples that are counted where they are read one by one: the most frequent tokens of a text are so after a few pages.
_SAMPLES = 256

# Labels that are counted of a memory-mapped set, a few tenths of a second: more would move no token between buckets.
_MOST_LABELS = 20_000_000
_ROWS = 1000


@dataclass(frozen=True)
class TokenFrequency:
    """The buckets of tokens by their frequency.

    Args:
        buckets: int64 ``[ids]``, the bucket of each token, 0 the most frequent; further ids belong to the last.
        counted_in: which data set the labels were counted in.
        types: how many different tokens were counted in each bucket.
        least: how often the rarest counted token of each bucket occurs; None for an empty bucket.
    """

    buckets: Tensor
    counted_in: str
    types: tuple[int, ...]
    least: tuple[int | None, ...]

    @classmethod
    def of_counts(cls, counts: Tensor, counted_in: str) -> TokenFrequency:
        """Sort the tokens into buckets by how often they were counted, int64 ``[ids]``; ties go to the smaller id."""
        order = torch.argsort(counts, descending=True, stable=True)
        sorted_counts = counts[order]
        before = (sorted_counts.cumsum(0) - sorted_counts).double() / counts.sum()
        place = torch.bucketize(before, torch.tensor(SHARES, dtype=torch.float64), right=True)
        place[sorted_counts == 0] = BUCKETS - 1
        buckets = torch.empty_like(place)
        buckets[order] = place
        seen = [counts[(buckets == i) & (counts > 0)] for i in range(BUCKETS)]
        return cls(
            buckets, counted_in, tuple(len(part) for part in seen),
            tuple(int(part.min()) if len(part) else None for part in seen),
        )  # fmt: skip

    def of(self, labels: Tensor) -> Tensor:
        """Return the bucket of each label."""
        buckets = self.buckets.to(labels.device)
        known = labels.clamp(0, len(buckets) - 1)
        return torch.where(labels < len(buckets), buckets[known], BUCKETS - 1)

    def record(self, figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the file of an evaluation says of the buckets, with the figures of each."""
        buckets = [
            {"types": types, "least_count": least, **of_bucket}
            for types, least, of_bucket in zip(self.types, self.least, figures, strict=True)
        ]
        return {"counted_in": self.counted_in, "shares": list(SHARES), "buckets": buckets}


class TrainingFrequency:
    """Count the tokens of a training set, once for as long as it stays the same."""

    def __init__(self) -> None:
        self._known: tuple[Any, TokenFrequency | None] | None = None

    def of(self, train_dataset: Any, dataset: Any) -> TokenFrequency:
        """Return the frequency in the training set; where it cannot be counted there, in the set that is evaluated.

        Args:
            train_dataset: may be None, or of another kind than `datasets.Dataset`.
            dataset: that is evaluated.

        Raises:
            ValueError: if neither has labels that can be counted.
        """
        if self._known is None or self._known[0] is not train_dataset:
            counts = _counts_of_column(train_dataset)
            found = None if counts is None else TokenFrequency.of_counts(counts, "the training set")
            self._known = (train_dataset, found)
        if self._known[1] is not None:
            return self._known[1]
        counts, where = _counts_of_column(dataset), "the evaluation set"
        if counts is None:
            counter = counted_labels(dataset, "frequency_buckets", "off")
            counts = torch.zeros(max(counter) + 1, dtype=torch.int64)
            counts[list(counter)] = torch.tensor(list(counter.values()))
            where = f"the first {_SAMPLES} samples of the evaluation set"
        return TokenFrequency.of_counts(counts, where)


def _counts_of_column(dataset: Any) -> Tensor | None:
    """Return how often each id is a label, int64 ``[ids]``; None without a column of lists of integers."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return None
    counts, seen = np.zeros(0, dtype=np.int64), 0
    for values in _labels_in(dataset):
        if values is None:
            return None
        values = values[values >= 0]  # IGNORE_INDEX; what else is negative is refused when it is scored
        found = np.bincount(values, minlength=len(counts))
        found[: len(counts)] += counts
        counts, seen = found, seen + len(values)
        if seen >= _MOST_LABELS:
            break
    return torch.from_numpy(counts) if seen else None


def _labels_in(dataset: Dataset) -> Iterator[np.ndarray | None]:
    for table in dataset.select_columns("labels").with_format("arrow").iter(_ROWS):
        for chunk in table.column("labels").chunks:
            if not isinstance(chunk, (pa.ListArray, pa.LargeListArray)) or not pa.types.is_integer(
                chunk.type.value_type
            ):
                yield None
                return
            yield chunk.flatten().cast(pa.int64()).fill_null(IGNORE_INDEX).to_numpy(zero_copy_only=False)


def counted_labels(dataset: Any, option: str, off: str, *, unscored: int = 0) -> Counter[int]:
    """Return how often each id is a label in the first 256 samples.

    Args:
        dataset: is read from its start, before the evaluation reads it again.
        option: that asks for it, for the errors.
        off: its value that does without.
        unscored: labels at the beginning of a sample that no row of the logits predicts: 1 where labels are shifted.

    Raises:
        ValueError: if the samples of the data set have no ``labels``, or can be read only once.
    """
    counts: Counter[int] = Counter()
    number_of_samples = len(dataset) if has_length(dataset) else None
    samples = iter(dataset) if number_of_samples is None else (dataset[i] for i in range(number_of_samples))
    if samples is dataset:
        raise ValueError(
            f"{option} reads the first samples to find the most frequent labels, but this data set can be read "
            f"only once: give one that begins anew whenever it is iterated, or leave {option} at {off}."
        )
    for sample in itertools.islice(samples, _SAMPLES):
        labels = sample.get("labels") if hasattr(sample, "get") else None
        if labels is None:
            raise ValueError(
                f"{option} needs to know the most frequent labels before the evaluation, but the samples of "
                f"this data set have no 'labels' (they are made by the collator); leave {option} at {off}."
            )
        values, times = np.unique(np.asarray(labels).reshape(-1)[unscored:], return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    counts.pop(IGNORE_INDEX, None)
    if not counts:
        raise ValueError(f"{option}: the first samples of this data set have no scored label.")
    return counts


def frequent_labels(dataset: Any, number: int, *, unscored: int = 0) -> Tensor:
    """Return the most frequent labels of the first 256 samples, int64 ``[<= number]``, the most frequent first.

    Ties go to the smaller id, so that every process finds the same. Errors are those of `counted_labels`.
    """
    counts = counted_labels(dataset, "classwise_tokens", "0", unscored=unscored)
    chosen = sorted(counts, key=lambda label: (-counts[label], label))[:number]
    return torch.tensor(chosen, dtype=torch.int64)
