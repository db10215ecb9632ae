"""Which tokens of a data set are worth a calibration of their own."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from ..rules.losses import IGNORE_INDEX

# Samples that are counted: the most frequent tokens of a text are so after a few pages.
_SAMPLES = 256


def frequent_labels(dataset: Any, number: int, *, unscored: int = 0) -> Tensor:
    """Return the most frequent labels of the first 256 samples, int64 ``[<= number]``, the most frequent first.

    Ties go to the smaller id, so that every process finds the same.

    Args:
        dataset: is read from its start, before the evaluation reads it again.
        number: of labels wanted.
        unscored: labels at the beginning of a sample that no row of the logits predicts: 1 where labels are shifted.

    Raises:
        ValueError: if the samples of the data set have no ``labels``, or can be read only once.
    """
    counts: Counter[int] = Counter()
    number_of_samples = len(dataset) if has_length(dataset) else None
    samples = iter(dataset) if number_of_samples is None else (dataset[i] for i in range(number_of_samples))
    if samples is dataset:
        raise ValueError(
            "classwise_tokens reads the first samples to find the most frequent labels, but this data set can be read "
            "only once: give one that begins anew whenever it is iterated, or leave classwise_tokens at 0."
        )
    for sample in itertools.islice(samples, _SAMPLES):
        labels = sample.get("labels") if hasattr(sample, "get") else None
        if labels is None:
            raise ValueError(
                "classwise_tokens needs to know the most frequent labels before the evaluation, but the samples of "
                "this data set have no 'labels' (they are made by the collator); leave classwise_tokens at 0."
            )
        values, times = np.unique(np.asarray(labels).reshape(-1)[unscored:], return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    counts.pop(IGNORE_INDEX, None)
    if not counts:
        raise ValueError("classwise_tokens: the first samples of this data set have no scored label.")
    chosen = sorted(counts, key=lambda label: (-counts[label], label))[:number]
    return torch.tensor(chosen, dtype=torch.int64)
