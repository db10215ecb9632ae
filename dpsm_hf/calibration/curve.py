"""The data of a reliability diagram."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CalibrationCurve:
    """The data of a reliability diagram; bins are closed on the right, ``(edge, next edge]``, the first also at 0.

    Args:
        edges: ``[bins + 1]`` from 0 to 1.
        confidence: ``[bins]`` mean confidence of the tokens in each bin, NaN for an empty bin.
        accuracy: ``[bins]`` share of correct tokens in each bin, NaN for an empty bin.
        count: ``[bins]`` int64, tokens in each bin.
        low, high: ``[bins]`` 95 % confidence interval of the accuracy, NaN for an empty bin.
        histogram: ``[100]`` int64, tokens in each hundredth of confidence, independent of the bins.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    low: np.ndarray
    high: np.ndarray
    histogram: np.ndarray

    @property
    def ece(self) -> float:
        """Return the expected calibration error, ``sum_b n_b / n * |accuracy_b - confidence_b|`` (Naeini 2015)."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.count * gaps) / max(1, self.count.sum()))

    @property
    def mce(self) -> float:
        """Return the maximum calibration error, ``max_b |accuracy_b - confidence_b|`` over the bins with tokens."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nanmax(gaps)) if np.isfinite(gaps).any() else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return the curve as plain lists for JSON, with None for the means of an empty bin."""

        def plain(values: np.ndarray) -> list[float | None]:
            return [None if math.isnan(v) else float(v) for v in values]

        return {
            "bins": len(self.count),
            "edges": [float(e) for e in self.edges],
            "count": [int(c) for c in self.count],
            "histogram": [int(c) for c in self.histogram],
            **{name: plain(getattr(self, name)) for name in ("confidence", "accuracy", "low", "high")},
        }

    def as_csv(self) -> str:
        """Return the curve as CSV, one line per bin; cells without a value are left empty."""
        held = self.as_dict()
        names = ("count", "confidence", "accuracy", "low", "high")
        columns = {"left": held["edges"][:-1], "right": held["edges"][1:], **{name: held[name] for name in names}}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))  # None is an empty cell
        return text.getvalue()
