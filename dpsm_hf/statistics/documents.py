"""Metrics of a test set as functions of sums over documents, so that documents can be resampled or swapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True, eq=False)
class DocumentMeans:
    """A mean over a test set, ``sum total / sum count`` over documents, or its exponential.

    For token means (NLL, Brier, accuracy), ROUGE of summaries (a count of 1 each), and perplexity (exp of NLL).

    Args:
        total: the sum in each document (or block of documents), ``[documents]``, or ``[seeds, documents]``.
        count: the number of tokens (or summaries) in each document, same shape, not negative.
        exponentiate: return ``exp(mean)``, for perplexity.

    Raises:
        ValueError: for other shapes, NaN, infinity, negative counts, sums where nothing was counted, or no counts.
    """

    total: np.ndarray
    count: np.ndarray
    exponentiate: bool = False

    #: Index of the count among the features.
    count_at: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check shapes and numbers."""
        _check({"total": self.total, "count": self.count}, dimensions=(1, 2))

    @property
    def features(self) -> np.ndarray:
        """Return total and count of each document, ``[seeds, documents, 2]``."""
        return np.stack([_runs_first(self.total, 1), _runs_first(self.count, 1)], axis=-1)

    def metric(self, sums: np.ndarray) -> np.ndarray:
        """Return the metric for summed features ``[..., 2]``; NaN where nothing was counted."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            mean = np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)
            return np.exp(mean) if self.exponentiate else mean


@dataclass(frozen=True, eq=False)
class DocumentBins:
    """The expected calibration error of a test set, ``sum_b |sum correct - sum confidence| / sum count``.

    Args:
        count: number of predictions by document and bin of confidence, ``[documents, bins]`` or
            ``[seeds, documents, bins]``.
        correct: number of correct ones, same shape.
        confidence: sum of their confidences, same shape.

    Raises:
        ValueError: for other shapes, NaN, infinity, negative counts, sums where nothing was counted, or no counts.

    Source: Naeini, Cooper & Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning" (AAAI 2015).
    """

    count: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray

    #: Index of the count among the features.
    count_at: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Check shapes and numbers."""
        _check({"count": self.count, "correct": self.correct, "confidence": self.confidence}, dimensions=(2, 3))

    @property
    def features(self) -> np.ndarray:
        """Return each document's count, then ``correct - confidence`` by bin, ``[seeds, documents, 1 + bins]``."""
        count, correct, confidence = (_runs_first(x, 2) for x in (self.count, self.correct, self.confidence))
        return np.concatenate([count.sum(-1, keepdims=True), correct - confidence], axis=-1)

    def metric(self, sums: np.ndarray) -> np.ndarray:
        """Return the metric for summed features ``[..., 1 + bins]``; NaN where nothing was counted."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sums[..., 0] > 0, np.abs(sums[..., 1:]).sum(-1) / sums[..., 0], np.nan)


Documents = DocumentMeans | DocumentBins


def paired_features(values: Documents, baseline: Documents, same_counts: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of two systems, ``[seeds, documents, features]``, without documents empty in both.

    Args:
        values: of the system.
        baseline: of the baseline, on the same documents.
        same_counts: raise if a document has different counts in the two systems.

    Raises:
        ValueError: if the two are of different kinds, or do not belong to the same documents.
    """
    if _kind(values) != _kind(baseline):
        raise ValueError(f"{_kind(values)} cannot be compared with {_kind(baseline)}: give two of one kind.")
    x, y = values.features, baseline.features
    if x.shape != y.shape:
        shapes = (
            f"{d} documents in {seeds} run(s) with {sums - 1} sums each" for seeds, d, sums in (x.shape, y.shape)
        )
        raise ValueError(
            f"The systems have {' and '.join(shapes)}: a paired comparison needs the same documents, the same blocks "
            "of them and as many runs of both."
        )
    counts = x[..., values.count_at], y[..., values.count_at]
    differ = counts[0] != counts[1]
    if same_counts and differ.any():
        seed, document = (int(place) for place in np.argwhere(differ)[0])
        raise ValueError(
            f"Document {document} (run {seed}) has {counts[0][seed, document]:g} counts in one system and "
            f"{counts[1][seed, document]:g} in the other, so these are not the same documents in the same order. For "
            "figures whose counts differ by nature (of generated tokens, say), pass same_counts=False."
        )
    kept = (counts[0] > 0).any(0) | (counts[1] > 0).any(0)
    return x[:, kept], y[:, kept]


def _runs_first(values: np.ndarray, dimensions: int) -> np.ndarray:
    """Return an array as float64 with the runs as first axis."""
    x = np.asarray(values, dtype=np.float64)
    return x[None] if x.ndim == dimensions else x


def _check(arrays: dict[str, np.ndarray], dimensions: tuple[int, int]) -> None:
    shapes = {name: np.shape(values) for name, values in arrays.items()}
    if len(set(shapes.values())) > 1 or len(shapes["count"]) not in dimensions:
        wanted = "[documents]" if dimensions[0] == 1 else "[documents, bins]"
        raise ValueError(
            f"The arrays have the shapes {shapes}: give all as {wanted}, with [seeds, ...] before or not."
        )
    x = {name: np.asarray(values, dtype=np.float64) for name, values in arrays.items()}
    for name, values in x.items():
        if not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(f"{name}{list(place)}={values[place]}: sums have to be finite numbers.")
        if (values[x["count"] == 0] != 0).any():
            raise ValueError(f"{name} is not 0 where nothing was counted: count and {name} are not of the same run.")
    if (x["count"] < 0).any():
        raise ValueError(f"count has {x['count'].min():g}: counts cannot be negative.")
    for run, count in enumerate(_runs_first(x["count"], dimensions[0])):
        if count.sum() == 0:
            raise ValueError(f"Nothing was counted in any document of run {run}: there is no figure to compare.")


def _kind(documents: Documents) -> str:
    exponentiate = isinstance(documents, DocumentMeans) and documents.exponentiate
    return type(documents).__name__ + (" with exponentiate=True" if exponentiate else "")
