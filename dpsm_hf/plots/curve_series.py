"""Curves for a reliability diagram, with those after temperature scaling: checking, reading and writing them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..runtime.files import json_number, write_json

# With fewer tokens the standard error of a bin's accuracy can exceed 0.07.
FEW_TOKENS = 50

_NEEDED = ("edges", "confidence", "accuracy", "count")
_OPTIONAL = ("low", "high", "histogram")
_COLUMNS = ("left", "right", "count", "confidence", "accuracy", "low", "high")

Array = NDArray[np.float64]


class CurveLike(Protocol):
    """Anything with the four arrays of a calibration curve, e.g. `dpsm_hf.calibration.CalibrationCurve`.

    ``low``, ``high`` (the interval of the accuracy) and ``histogram`` are optional.
    """

    @property
    def edges(self) -> ArrayLike: ...
    @property
    def confidence(self) -> ArrayLike: ...
    @property
    def accuracy(self) -> ArrayLike: ...
    @property
    def count(self) -> ArrayLike: ...


@dataclass(frozen=True)
class CurveSeries:
    """The checked curve of one model; arrays are float64 with one value per bin, NaN where a bin is empty.

    Args:
        name: of the model.
        edges: ``[bins + 1]``.
        confidence, accuracy, count: ``[bins]``.
        low, high: ``[bins]`` 95 % confidence interval of the accuracy, or None where it is not known.
        histogram: ``[cells]`` tokens in cells of equal width from 0 to 1, or None.
        temperature: that the logits were divided by; None if unknown.
        ece_interval: 95 % confidence interval of the ECE with these bins, or None.
        ece_null: expected ECE of a perfectly calibrated model with these bins and tokens, or None.
        scaled: the same model after temperature scaling, or None.
    """

    name: str
    edges: Array
    confidence: Array
    accuracy: Array
    count: Array
    low: Array | None = None
    high: Array | None = None
    histogram: Array | None = None
    temperature: float | None = 1.0
    ece_interval: tuple[float, float] | None = None
    ece_null: float | None = None
    scaled: CurveSeries | None = None

    @property
    def tokens(self) -> int:
        """Return the number of tokens in all bins."""
        return int(self.count.sum())

    @property
    def filled(self) -> NDArray[np.bool_]:
        """Return which bins hold tokens, ``[bins]``."""
        return self.count > 0

    @property
    def few(self) -> NDArray[np.bool_]:
        """Return which bins hold fewer than `FEW_TOKENS` tokens, but some, ``[bins]``."""
        return self.filled & (self.count < FEW_TOKENS)

    @property
    def ece(self) -> float:
        """Return ``sum_b n_b / n * |accuracy_b - confidence_b|``; NaN without tokens."""
        filled = self.filled
        if not filled.any():
            return math.nan
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((self.count[filled] * gaps).sum() / self.count.sum())

    def density(self) -> tuple[Array, Array]:
        """Return edges ``[cells + 1]`` and the density ``[cells]``: the share of the tokens per 0.01 of confidence.

        Cells are those of the histogram, or the bins where there is none; as a density, curves with different bins are
        comparable.
        """
        counts, edges = self.count, self.edges
        if self.histogram is not None:
            counts, edges = self.histogram, np.arange(len(self.histogram) + 1) / len(self.histogram)
        # empty adaptive bins may have width 0
        hundredths = np.where(counts > 0, np.diff(edges) * 100, 1.0)
        return edges, counts / max(self.tokens, 1) / hundredths

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the scaled curve as plain numbers and lists for JSON."""

        def plain(values: Array | None, kind: type = float) -> list[Any] | None:
            return None if values is None else [None if math.isnan(v) else kind(v) for v in values]

        return {
            "model": self.name,
            "temperature": self.temperature,
            "tokens": self.tokens,
            "bins": len(self.count),
            "ece": json_number(self.ece),
            "ece_interval": None if self.ece_interval is None else list(self.ece_interval),
            "ece_null": self.ece_null,
            "edges": plain(self.edges),
            "count": plain(self.count, int),
            "histogram": plain(self.histogram, int),
            **{name: plain(getattr(self, name)) for name in ("confidence", "accuracy", "low", "high")},
        }

    def with_scaled(self) -> list[CurveSeries]:
        """Return the curve, followed by the scaled one if there is one."""
        return [self] if self.scaled is None else [self, self.scaled]


def curve_series(
    curve: CurveLike | Mapping[str, Any],
    name: str,
    *,
    temperature: float | None = 1.0,
    metrics: Mapping[str, Any] | None = None,
    intervals: Mapping[str, Any] | None = None,
) -> CurveSeries:
    """Check a curve, and add the interval and the null level of its ECE if they are known.

    Args:
        curve: object or mapping with ``edges``, ``confidence``, ``accuracy``, ``count``, and optionally ``low``,
            ``high`` and ``histogram``; None stands for NaN.
        name: of the model.
        temperature: that the logits were divided by.
        metrics: its ``ece_<bins>_null`` is the null level of a curve with equal bins.
        intervals: its ``ece_<bins>`` is the interval of a curve with equal bins.

    Raises:
        ValueError: if an array is missing, holds impossible values, or does not fit the others.
    """
    found = {key: _array(curve, key, name) for key in (*_NEEDED, *_OPTIONAL)}
    missing = [key for key in _NEEDED if found[key] is None]
    if missing:
        held = f"; it has {sorted(curve)}" if isinstance(curve, Mapping) else ""
        raise ValueError(f"The calibration curve of {name!r} has no {missing[0]!r}{held}.")
    if (found["low"] is None) != (found["high"] is None):
        one, other = ("low", "high") if found["high"] is None else ("high", "low")
        raise ValueError(f"The calibration curve of {name!r} has {one!r} but no {other!r}; give both or neither.")
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"The temperature of {name!r} is {temperature!r}; it must be a positive number.")
    arrays = {key: value for key, value in found.items() if value is not None}
    bins = len(arrays["count"])
    lengths = {key: len(value) for key, value in arrays.items() if key not in ("count", "histogram")}
    if bins == 0 or any(length != bins + (key == "edges") for key, length in lengths.items()):
        raise ValueError(
            f"The calibration curve of {name!r} does not fit together: {bins} counts but {lengths}; "
            f"expected one confidence and accuracy a bin and one edge more."
        )
    _check_values(arrays, name)
    given: dict[str, Any] = dict(arrays)
    if np.allclose(arrays["edges"], np.arange(bins + 1) / bins, rtol=0, atol=1e-9):
        bounds = [math.nan if bound is None else float(bound) for bound in (intervals or {}).get(f"ece_{bins}") or ()]
        if len(bounds) == 2 and all(math.isfinite(bound) for bound in bounds):
            given["ece_interval"] = bounds[0], bounds[1]
        if (null := (metrics or {}).get(f"ece_{bins}_null")) is not None:
            given["ece_null"] = float(null)
    return CurveSeries(name, **given, temperature=temperature)


def record_series(record: Mapping[str, Any], name: str, *, scaled: bool = True) -> CurveSeries:
    """Return the curve of a calibration file's content, with the scaled one if wanted and there.

    Args:
        record: with ``curve``, optionally ``metrics``, ``intervals``, ``temperature`` and ``scaled``, a mapping
            with ``curve``, ``metrics`` and ``intervals`` after temperature scaling.
        name: of the model.
        scaled: whether it is wanted.

    Raises:
        ValueError: as `curve_series`.
    """

    def view(part: Mapping[str, Any], temperature: float | None) -> CurveSeries:
        metrics, intervals = part.get("metrics"), part.get("intervals")
        return curve_series(part["curve"], name, temperature=temperature, metrics=metrics, intervals=intervals)

    after = record.get("scaled")
    series = view(record, 1.0)
    if not scaled or after is None:
        return series
    if not isinstance(after, Mapping) or not isinstance(after.get("curve"), Mapping):
        raise ValueError(f"'scaled' of {name!r} holds no calibration curve; expected a mapping with the key 'curve'.")
    return replace(series, scaled=view(after, record.get("temperature")))


def write_series(series: Sequence[CurveSeries], split: str, path: str | Path) -> Path:
    """Write the data of a diagram of one split, see `ReliabilityDisplay.save_data`; scaled curves after their own."""
    path = Path(path)
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"{path} ends in {path.suffix!r}; the data of a diagram is written as '.json' or '.csv'.")
    curves = [curve for one in series for curve in one.with_scaled()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        write_json({"schema": 1, "split": split, "curves": [curve.as_dict() for curve in curves]}, path)
        return path
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "temperature", *_COLUMNS])
    for curve in curves:
        held = curve.as_dict()
        held |= {"left": held["edges"][:-1], "right": held["edges"][1:]}
        empty = [None] * len(curve.count)
        for cells in zip(*(held[column] or empty for column in _COLUMNS), strict=True):
            writer.writerow([curve.name, curve.temperature, *cells])  # None is an empty cell
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def read_record(path: str | Path) -> Any:
    """Read a calibration file; ValueError if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Give a file that CalibrationCallback wrote.") from None


def _array(curve: CurveLike | Mapping[str, Any], key: str, name: str) -> Array | None:
    value = curve.get(key) if isinstance(curve, Mapping) else getattr(curve, key, None)
    if value is None:
        return None
    try:
        array = np.asarray([math.nan if item is None else item for item in value], dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{key!r} of the calibration curve of {name!r} is not a list of numbers.") from None
    if array.ndim != 1:
        raise ValueError(f"{key!r} of the calibration curve of {name!r} has shape {array.shape}; expected a list.")
    return array


def _check_values(arrays: Mapping[str, Array], name: str) -> None:
    """Raise for impossible values, which would go unnoticed in a picture."""

    def refuse(key: str, values: Array, wrong: NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            value = values[wrong][0]
            raise ValueError(f"{key!r} of the calibration curve of {name!r} holds {value:g}; expected {expected}.")

    edges, count = arrays["edges"], arrays["count"]
    if not (np.diff(edges) >= 0).all() or edges[0] < 0 or edges[-1] > 1:
        raise ValueError(f"'edges' of the calibration curve of {name!r} do not rise from 0 to 1: {edges.tolist()}.")
    for key in ("count", "histogram"):
        values = arrays.get(key, np.empty(0))
        whole = np.isfinite(values) & (values >= 0) & (np.floor(values) == values)
        refuse(key, values, ~whole, "whole numbers from 0 on")
    for key in ("confidence", "accuracy"):
        values = arrays[key][count > 0]
        refuse(key, values, ~((values >= 0) & (values <= 1)), "shares between 0 and 1 in bins with tokens")
    for key in ("low", "high"):
        values = arrays.get(key, np.empty(0))
        refuse(key, values, (values < 0) | (values > 1), "shares between 0 and 1")
    if "histogram" in arrays and arrays["histogram"].sum() != count.sum():
        raise ValueError(
            f"The calibration curve of {name!r} counts {count.sum():.0f} tokens in its bins but "
            f"{arrays['histogram'].sum():.0f} in its histogram; both must count the same tokens."
        )
