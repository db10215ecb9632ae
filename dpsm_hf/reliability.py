"""Reliability diagrams: accuracy against confidence, from the data that calibration collects."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from .figures import empty_figure, figure_of, run_style, save_figure

# Below this, the standard error of a bin's accuracy reaches 0.07.
FEW_TOKENS = 50


class CurveLike(Protocol):
    """Anything with the four arrays of a calibration curve, e.g. `dpsm_hf.calibration.CalibrationCurve`."""

    @property
    def edges(self) -> ArrayLike: ...
    @property
    def confidence(self) -> ArrayLike: ...
    @property
    def accuracy(self) -> ArrayLike: ...
    @property
    def count(self) -> ArrayLike: ...


@dataclass(frozen=True)
class _Series:
    """One model's curve, checked, as float64 arrays of one value per bin (edges: one more)."""

    name: str
    edges: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.float64]

    @property
    def tokens(self) -> int:
        return int(self.count.sum())

    @property
    def few(self) -> NDArray[np.bool_]:
        """Bins with so few tokens that their accuracy is mostly chance."""
        return self.count < FEW_TOKENS

    @property
    def ece(self) -> float:
        """Sum over the bins of their share of the tokens times |accuracy - confidence|; NaN without tokens."""
        filled = self.count > 0
        if not filled.any():
            return math.nan
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((self.count[filled] * gaps).sum() / self.count.sum())


def _series(curve: CurveLike | Mapping[str, Any], name: str) -> _Series:
    def array(key: str) -> NDArray[np.float64]:
        if isinstance(curve, Mapping):
            if key not in curve:
                raise ValueError(f"The calibration curve of {name!r} has no {key!r}; it has {sorted(curve)}.")
            value = [math.nan if item is None else item for item in curve[key]]
        else:
            value = getattr(curve, key)
        return np.asarray(value, dtype=np.float64)

    series = _Series(name, array("edges"), array("confidence"), array("accuracy"), array("count"))
    bins = len(series.count)
    lengths = {"edges": len(series.edges), "confidence": len(series.confidence), "accuracy": len(series.accuracy)}
    if bins == 0 or lengths != {"edges": bins + 1, "confidence": bins, "accuracy": bins}:
        raise ValueError(
            f"The calibration curve of {name!r} does not fit together: {bins} counts but {lengths}; "
            f"expected one confidence and accuracy a bin and one edge more."
        )
    return series


class ReliabilityDisplay:
    """Reliability diagram of one or several models: accuracy against confidence above, share of the tokens below.

    One model is drawn as bars with its gap to the diagonal hatched, several as points joined by lines. The title says
    what is shown: token-level and top-label, the number of tokens and bins, and for one model the ECE (with several it
    stands in the legend). ECE is ``sum_b n_b / N * |accuracy_b - confidence_b|`` (Naeini et al., 2015).

    Args:
        series: the curves; use `from_curve`, `from_json` or `overlay` to make one.
        split: name of the evaluated split, for the title; empty to leave out.

    Attributes:
        figure_: the figure drawn on, after `plot`.
        ax_: the axes of the diagram, after `plot`.
        histogram_ax_: the axes of the histogram, after `plot`; ``None`` when it was left out.
    """

    figure_: Figure
    ax_: Axes
    histogram_ax_: Axes | None

    def __init__(self, series: Sequence[_Series], split: str = "") -> None:
        if not series:
            raise ValueError("A reliability diagram needs at least one calibration curve; got none.")
        self._series = list(series)
        self.split = split

    @classmethod
    def from_curve(cls, curve: CurveLike | Mapping[str, Any], name: str = "", split: str = "") -> ReliabilityDisplay:
        """Make a display of one curve.

        Args:
            curve: object or mapping with ``edges`` (bins + 1), ``confidence``, ``accuracy`` and ``count`` (bins each);
                empty bins hold NaN or ``None``.
            name: name of the model, for the legend; ``ce``, ``brier`` and ``dpsm`` choose fixed colours.
            split: name of the evaluated split.

        Raises:
            ValueError: if an array is missing or their lengths do not fit together.
        """
        return cls([_series(curve, name)], split)

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any], name: str = "") -> ReliabilityDisplay:
        """Make a display from a file that `CalibrationCallback` wrote, or from its parsed content.

        Args:
            source: path of ``calibration/eval-step-*.json``, or the mapping in it.
            name: name of the model.

        Raises:
            ValueError: if the content holds no calibration curve.
        """
        where = name or "the given mapping" if isinstance(source, Mapping) else str(source)
        content = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(content, Mapping) or not isinstance(content.get("curve"), Mapping):
            raise ValueError(
                f"{where} holds no calibration curve; expected a file of CalibrationCallback, with the key 'curve'."
            )
        return cls.from_curve(content["curve"], name, str(content.get("split", "")))

    @classmethod
    def overlay(cls, displays: Sequence[ReliabilityDisplay]) -> ReliabilityDisplay:
        """Put the curves of several displays into one diagram.

        Args:
            displays: the displays; their splits must agree.

        Raises:
            ValueError: if there is none, or if they show different splits.
        """
        splits = sorted({display.split for display in displays})
        if len(splits) > 1:
            raise ValueError(
                f"These reliability diagrams show different splits ({', '.join(splits)}); draw one diagram a split."
            )
        return cls([series for display in displays for series in display._series], splits[0] if splits else "")

    @property
    def ece(self) -> dict[str, float]:
        """Expected calibration error of each curve by name, with the bins drawn."""
        return {series.name: series.ece for series in self._series}

    def title(self) -> str:
        """Say in one line what the diagram shows."""
        tokens, bins = {s.tokens for s in self._series}, {len(s.count) for s in self._series}
        parts = [self.split] if self.split else []
        parts.append(
            f"{next(iter(tokens)):,} tokens" if len(tokens) == 1 else f"{min(tokens):,}–{max(tokens):,} tokens"
        )
        parts.append("/".join(str(count) for count in sorted(bins)) + " bins")
        if len(self._series) == 1:
            parts.append(f"ECE {_number(self._series[0].ece)}")
        return " · ".join(parts)

    def plot(self, ax: Axes | None = None, histogram: bool = True) -> ReliabilityDisplay:
        """Draw the diagram.

        Args:
            ax: axes to draw on, without histogram; by default a new figure is made, with one.
            histogram: whether the new figure gets the histogram of confidence.

        Returns:
            The display itself, with ``figure_``, ``ax_`` and ``histogram_ax_`` set.
        """
        self.histogram_ax_ = None
        if ax is None:
            figure = empty_figure(4.4, 5.2 if histogram else 4.4)
            if histogram:
                ax, self.histogram_ax_ = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.6, 1]})
            else:
                ax = figure.add_subplot()
        self.ax_, self.figure_ = ax, figure_of(ax)
        ax.plot([0, 1], [0, 1], color="0.45", linestyle="--", linewidth=1, label="perfectly calibrated", zorder=1)
        if len(self._series) == 1:
            self._draw_bars(ax, self._series[0])
        else:
            for position, series in enumerate(self._series):
                filled = series.count > 0
                label = f"{series.name or f'model {position + 1}'} (ECE {_number(series.ece)})"
                style = run_style(series.name, position)
                x, y, few = series.confidence[filled], series.accuracy[filled], series.few[filled]
                ax.plot(x, y, label=label, markersize=6, linewidth=1.6, **style)
                hollow = {**style, "linestyle": "none", "markerfacecolor": "white"}
                ax.plot(x[few], y[few], markersize=6, **hollow)
            if any((series.few & (series.count > 0)).any() for series in self._series):
                ax.plot([], [], "o", color="0.4", markerfacecolor="white", label=f"hollow: under {FEW_TOKENS} tokens")
        ax.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy (top label)")
        ax.set_title(self._heading(), fontsize=10)
        ax.legend(loc="best", fontsize=9, framealpha=0.9)
        ax.grid(alpha=0.3, linewidth=0.6)
        if self.histogram_ax_ is None:
            ax.set_xlabel("confidence (token-level)")
        else:
            self._draw_histogram(self.histogram_ax_)
        return self

    def figure(self) -> Figure:
        """Draw the diagram with its histogram on a new figure and return that."""
        return self.plot().figure_

    def save(self, path: str | Path, dpi: int = 150) -> Path:
        """Draw on a new figure and write it to a file.

        Args:
            path: where to; the ending names the format.
            dpi: dots per inch of pixel formats.
        """
        return save_figure(self.figure(), path, dpi)

    def _heading(self) -> str:
        name = self._series[0].name if len(self._series) == 1 else ""
        return f"{name or 'Reliability'}: token-level, top-label\n{self.title()}"

    @staticmethod
    def _draw_bars(ax: Axes, series: _Series) -> None:
        filled = series.count > 0
        left, width = series.edges[:-1][filled], np.diff(series.edges)[filled]
        accuracy, confidence, few = series.accuracy[filled], series.confidence[filled], series.few[filled]
        color = run_style(series.name, 0)["color"]
        for part, alpha, label in ((~few, 0.75, "accuracy"), (few, 0.25, f"accuracy, under {FEW_TOKENS} tokens")):
            if part.any():
                style = {"color": color, "alpha": alpha, "edgecolor": "white", "linewidth": 0.8, "label": label}
                ax.bar(left[part], accuracy[part], width[part], align="edge", **style)
        style = {"facecolor": "none", "edgecolor": "0.15", "hatch": "////", "linewidth": 0.8}
        gap = confidence - accuracy
        ax.bar(left, gap, width, bottom=accuracy, align="edge", label="gap to confidence", **style)

    def _draw_histogram(self, ax: Axes) -> None:
        for position, series in enumerate(self._series):
            style = run_style(series.name, position if len(self._series) > 1 else 0)
            share = series.count / max(series.count.sum(), 1)
            if len(self._series) == 1:
                widths = np.diff(series.edges)
                ax.bar(
                    series.edges[:-1], share, widths, align="edge", color=style["color"], alpha=0.75, edgecolor="white"
                )
                if series.tokens:
                    mean = float(np.nansum(series.count * series.confidence) / series.tokens)
                    ax.axvline(mean, color="0.15", linewidth=1.2, linestyle="--")
                    right = mean < 0.6
                    ax.annotate(
                        f"mean {mean:.3f}",
                        (mean, 0.92),
                        xycoords=("data", "axes fraction"),
                        xytext=(4 if right else -4, 0),
                        textcoords="offset points",
                        ha="left" if right else "right",
                        va="top",
                        fontsize=9,
                    )
            else:
                ax.stairs(share, series.edges, color=style["color"], linestyle=style["linestyle"], linewidth=1.6)
        ax.set(xlim=(0, 1), xlabel="confidence (token-level)", ylabel="share")
        ax.grid(alpha=0.3, linewidth=0.6)


def _number(value: float) -> str:
    return "not a number" if math.isnan(value) else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"
