"""Reliability diagrams: accuracy against confidence."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .curve_series import FEW_TOKENS, CurveLike, CurveSeries, curve_series, read_record, record_series, write_series
from .figures import OKABE_ITO, empty_figure, figure_of, run_style, run_styles, save_figure

__all__ = ["FEW_TOKENS", "CurveLike", "ReliabilityDisplay"]

_INK = "0.1"
_HOLLOW = f"hollow: < {FEW_TOKENS} tokens"
# The legend has two columns if no label is longer.
_COLUMN_CHARACTERS = 27
# Characters that fit on a line of title and legend.
_HEADING_CHARACTERS, _LABEL_CHARACTERS = 54, 50
_WIDTH, _DIAGRAM, _HISTOGRAM, _LINE = 4.4, 3.7, 1.3, 0.19  # inches


class ReliabilityDisplay:
    """Reliability diagram of one or several models: accuracy against confidence above, histogram of confidence below.

    One model is drawn as bars with the gap to the diagonal hatched, several models as points joined by lines. Vertical
    lines are the 95 % confidence intervals of the accuracy, where the curve has them. The curve after temperature
    scaling is a line over the bars, or with several models a thin line without intervals. The histogram is the share
    of the tokens per 0.01 of confidence on a logarithmic axis. The title gives the number of tokens and bins, the ECE
    with its confidence interval (with several models in the legend), and about what ECE a perfectly calibrated model
    would show on this number of tokens. ECE is ``sum_b n_b / N * |accuracy_b - confidence_b|``
    (Naeini et al., 2015).

    Args:
        series: the curves; use `from_curve`, `from_json` or `overlay` to make a display.
        split: name of the evaluated split, for the title; empty to leave out.

    Attributes:
        figure_: the figure drawn on, after `plot`.
        ax_: the axes of the diagram, after `plot`.
        histogram_ax_: the axes of the histogram, after `plot`; ``None`` when it was left out.

    Raises:
        ValueError: without curves.
    """

    figure_: Figure
    ax_: Axes
    histogram_ax_: Axes | None

    def __init__(self, series: Sequence[CurveSeries], split: str = "") -> None:
        if not series:
            raise ValueError("A reliability diagram needs at least one calibration curve; got none.")
        self._series = list(series)
        self.split = split
        self._given: Mapping[str, Mapping[str, Any]] = {}

    @classmethod
    def from_curve(
        cls,
        curve: CurveLike | Mapping[str, Any],
        name: str = "",
        split: str = "",
        *,
        scaled: CurveLike | Mapping[str, Any] | None = None,
        temperature: float | None = None,
    ) -> ReliabilityDisplay:
        """Make a display of one curve.

        Args:
            curve: object or mapping with ``edges`` (bins + 1), ``confidence``, ``accuracy`` and ``count`` (bins each),
                and optionally ``low`` and ``high`` (bins each) and ``histogram``, as in `CalibrationCurve`; empty bins
                hold NaN or ``None``.
            name: name of the model, for the legend; ``ce``, ``brier`` and ``dpsm`` choose fixed colours.
            split: name of the evaluated split.
            scaled: the curve of the same model after temperature scaling.
            temperature: the temperature of ``scaled``.

        Raises:
            ValueError: if an array is missing, holds impossible values, or does not fit the others.
        """
        series = curve_series(curve, name)
        if scaled is not None:
            series = replace(series, scaled=curve_series(scaled, name, temperature=temperature))
        return cls([series], split)

    @classmethod
    def from_json(
        cls, source: str | Path | Mapping[str, Any], name: str = "", *, scaled: bool = True
    ) -> ReliabilityDisplay:
        """Make a display from a file that `CalibrationCallback` wrote, or from its parsed content.

        Args:
            source: path of ``calibration/eval-step-*.json``, or the mapping in it.
            name: name of the model.
            scaled: whether to draw the curve after temperature scaling too, if there is one.

        Raises:
            ValueError: if the content holds no calibration curve, or one that does not fit together.
        """
        where = name or "the given mapping" if isinstance(source, Mapping) else str(source)
        content = source if isinstance(source, Mapping) else read_record(source)
        if not isinstance(content, Mapping) or not isinstance(content.get("curve"), Mapping):
            raise ValueError(
                f"{where} holds no calibration curve; expected a file of CalibrationCallback, with the key 'curve'."
            )
        return cls([record_series(content, name, scaled=scaled)], str(content.get("split", "")))

    @classmethod
    def overlay(
        cls, displays: Sequence[ReliabilityDisplay | str | Path], *, scaled: bool = True
    ) -> ReliabilityDisplay:
        """Put the curves of several displays into one diagram.

        Args:
            displays: displays, or paths of files that `CalibrationCallback` wrote, of one split and of models with
                different names. A model without a name is called ``model 2`` by its position; the model of a file is
                called by the folder of its run, followed by the file's name if several files are of one run.
            scaled: whether to draw curves after temperature scaling too, where there are any.

        Raises:
            ValueError: without displays, for different splits, or if two models have the same name.
        """
        given = _file_names([d for d in displays if not isinstance(d, ReliabilityDisplay)])
        shown = [d if isinstance(d, ReliabilityDisplay) else cls.from_json(d, given[str(d)]) for d in displays]
        splits = sorted({display.split for display in shown})
        if len(splits) > 1:
            raise ValueError(
                f"These reliability diagrams show different splits ({', '.join(splits)}); draw one diagram a split."
            )
        found = [series for display in shown for series in display._series]
        if len(found) > 1:
            found = [replace(s, name=s.name or f"model {i}") for i, s in enumerate(found, start=1)]
        names = [series.name for series in found]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(
                f"{names.count(repeated)} of these models are named {repeated!r}; give each its own name, "
                "ReliabilityDisplay.from_json(path, name=...)."
            )
        if not scaled:
            found = [replace(series, scaled=None) for series in found]
        return cls(found, splits[0] if splits else "")

    @property
    def ece(self) -> dict[str, float]:
        """Expected calibration error of each model by name, with the bins drawn, before temperature scaling."""
        return {series.name: series.ece for series in self._series}

    @property
    def ece_scaled(self) -> dict[str, float]:
        """Expected calibration error after temperature scaling, of the models that have such a curve."""
        return {series.name: series.scaled.ece for series in self._series if series.scaled is not None}

    def title(self) -> str:
        """Return the title in one line."""
        return " · ".join(part for line in _title_lines(self._series, self.split) for part in line)

    def styled(self, styles: Mapping[str, Mapping[str, Any]]) -> ReliabilityDisplay:
        """Return the display with colours, markers and dashes of its models by name, as in other pictures of them.

        Args:
            styles: ``color``, ``marker`` and ``linestyle`` of each model, as `run_styles` returns; models that it does
                not name have their usual ones.
        """
        made = ReliabilityDisplay(self._series, self.split)
        made._given = styles
        return made

    def _styles(self) -> list[dict[str, Any]]:
        usual = run_styles([series.name for series in self._series])
        return [dict(self._given.get(s.name, style)) for s, style in zip(self._series, usual, strict=True)]

    def _color(self, series: CurveSeries) -> str:
        """Return the colour of one model's bars."""
        given = self._given.get(series.name)
        return _single_color(series.name) if given is None else str(given["color"])

    def plot(self, ax: Axes | None = None, histogram: bool = True) -> ReliabilityDisplay:
        """Draw the diagram.

        Args:
            ax: axes to draw on, without histogram and with a short legend; by default a new figure is made.
            histogram: whether the new figure gets the histogram of confidence.

        Returns:
            The display itself, with ``figure_``, ``ax_`` and ``histogram_ax_`` set.
        """
        self.histogram_ax_ = None
        own = ax is None
        if ax is None:
            figure = empty_figure(_WIDTH, _DIAGRAM + (_HISTOGRAM if histogram else 0))
            if histogram:
                ratios = {"height_ratios": [_DIAGRAM, _HISTOGRAM]}
                ax, self.histogram_ax_ = figure.subplots(2, 1, sharex=True, gridspec_kw=ratios)
            else:
                ax = figure.add_subplot()
        self.ax_, self.figure_ = ax, figure_of(ax)
        ax.plot([0, 1], [0, 1], color="0.45", linestyle="--", linewidth=1, label="perfectly calibrated", zorder=1.5)
        if len(self._series) == 1:
            self._draw_bars(ax, self._series[0])
        else:
            self._draw_lines(ax, _ece_with_interval if own else _short_ece)
        # a little more than [0, 1], so that markers at the ends are not cut off
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="accuracy (top label)")
        ax.grid(alpha=0.3, linewidth=0.6)
        ax.set_axisbelow(True)
        if self.histogram_ax_ is None:
            ax.set_xlabel("confidence (token-level)")
        else:
            self._draw_histogram(self.histogram_ax_)
        self._write_around(ax, own)
        return self

    def figure(self) -> Figure:
        """Draw the diagram with its histogram on a new figure and return the figure."""
        return self.plot().figure_

    def save(self, path: str | Path, dpi: int = 150) -> Path:
        """Draw on a new figure and write it to a file, whose ending names the format.

        At 91 dots per inch (of pixel formats) a picture is 400 pixels wide.
        """
        return save_figure(self.figure(), path, dpi)

    def save_data(self, path: str | Path) -> Path:
        """Write the numbers behind the diagram to a file.

        Args:
            path: where to; ``.csv`` gives a line for each bin with the columns ``model``, ``temperature``, ``left``,
                ``right``, ``count``, ``confidence``, ``accuracy``, ``low`` and ``high``, empty where unknown;
                ``.json`` has the same by curve, with histogram, ECE, its interval and its null level. A curve before
                temperature scaling has temperature 1.

        Raises:
            ValueError: for another ending.
        """
        return write_series(self._series, self.split, path)

    def _write_around(self, ax: Axes, own: bool) -> None:
        name = self._series[0].name if len(self._series) == 1 else ""
        said = [" · ".join(line) for line in _title_lines(self._series, self.split)]
        said.insert(0, f"{name or 'Reliability'}: token-level, top-label")
        lines = [part for line in said for part in _wrapped(line)]
        style: dict[str, Any] = {"fontsize": 9.5, "linespacing": 1.25}
        if not own:
            ax.set_title("\n".join(lines), **style)
            ax.legend(loc="best", fontsize=8, framealpha=0.9, labelspacing=0.3)
            return
        self.figure_.suptitle("\n".join(lines), **style)
        # the legend is below the axes, where it hides no data; the figure grows by the lines of title and legend
        handles, labels = ax.get_legend_handles_labels()
        columns = 2 if max(map(len, labels)) <= _COLUMN_CHARACTERS else 1
        rows = math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)
        figure = self.figure_
        figure.set_figheight(figure.get_figheight() + _LINE * (len(lines) + rows))
        style = {"frameon": False, "fontsize": 8.5, "handlelength": 2.6, "columnspacing": 1.2, "labelspacing": 0.3}
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)

    def _draw_bars(self, ax: Axes, series: CurveSeries) -> None:
        left, width = series.edges[:-1], np.diff(series.edges)
        many = len(width) > 40
        color = self._color(series)
        outline: dict[str, Any] = {"edgecolor": "white", "linewidth": 0 if many else 0.8}
        full = series.filled & ~series.few
        for part, alpha, label in ((full, 0.75, "accuracy"), (series.few, 0.3, f"accuracy, < {FEW_TOKENS} tokens")):
            if part.any():
                style: dict[str, Any] = {"color": color, "alpha": alpha, **outline, "label": label}
                ax.bar(left[part], series.accuracy[part], width[part], align="edge", **style)
        filled = series.filled
        if filled.any():
            style = {"facecolor": "none", "edgecolor": "0.25", "hatch": "////", "hatch_linewidth": 0.5}
            gap, base = (series.confidence - series.accuracy)[filled], series.accuracy[filled]
            style |= {"linewidth": 0.4 if many else 0.8, "label": "gap to confidence"}
            ax.bar(left[filled], gap, width[filled], bottom=base, align="edge", **style)
        if series.low is not None and series.high is not None and filled.any():
            middle = (left + width / 2)[filled]
            shade = tuple(0.55 * part for part in to_rgb(color))  # darker than the bars, lighter than the scaled curve
            style = {"color": shade, "linewidth": 1.0 if many else 3.0, "label": "95 % interval of accuracy"}
            ax.vlines(middle, series.low[filled], series.high[filled], **style, zorder=3)
        if series.scaled is not None:
            scaled = series.scaled
            label = f"{_after(scaled)} ({_short_ece(scaled)})"
            style = {"color": _INK, "marker": "D", "linestyle": "-", "linewidth": 1.3, "markersize": 4.5, "zorder": 5}
            if many:
                style |= {"linewidth": 0.9, "markersize": 1.8}
            _draw_points(ax, scaled, label, style, interval=not many)
            if scaled.few.any():
                ax.plot([], [], "D", color=_INK, markerfacecolor="white", markersize=4.5, label=_HOLLOW)

    def _draw_lines(self, ax: Axes, written: Callable[[CurveSeries], str]) -> None:
        for series, style in zip(self._series, self._styles(), strict=True):
            style |= {"linewidth": 1.6, "markersize": 5.5, "zorder": 4}
            _draw_points(ax, series, f"{series.name} ({written(series)})", style)
            if series.scaled is not None:
                label = f"{series.name} {_after(series.scaled)} ({written(series.scaled)})"
                style |= {"linewidth": 0.8, "markersize": 3, "zorder": 3}
                _draw_points(ax, series.scaled, label, style, interval=False)
        if any(series.low is not None for series in self._series):
            ax.vlines([], [], [], color="0.4", linewidth=1.2, label="95 % interval of accuracy")
        if any(curve.few.any() for series in self._series for curve in series.with_scaled()):
            ax.plot([], [], "o", color="0.4", markerfacecolor="white", label=_HOLLOW)

    def _draw_histogram(self, ax: Axes) -> None:
        several = len(self._series) > 1
        for series, style in zip(self._series, self._styles(), strict=True):
            edges, share = series.density()
            if several:
                ax.stairs(share, edges, color=style["color"], linestyle=style["linestyle"], linewidth=1.3)
                continue
            ax.stairs(share, edges, fill=True, color=self._color(series), alpha=0.75)
            if series.tokens:
                _mark_mean(ax, float((series.count * series.confidence)[series.filled].sum() / series.tokens))
            if series.scaled is not None:
                edges, share = series.scaled.density()
                ax.stairs(share, edges, color=_INK, linewidth=1.0)
        drawn = [curve for series in self._series for curve in series.with_scaled()]
        shares = np.concatenate([curve.density()[1] for curve in drawn])
        if shares.any():
            # whole decades, so that ticks have numbers, and room above for the label of the mean
            least, most = shares[shares > 0].min() / 1.2, shares.max()
            ax.set_yscale("log")
            ax.set_ylim(10.0 ** math.floor(math.log10(least)), max(10.0 ** math.ceil(math.log10(most)), 2 * most))
            ax.yaxis.set_major_locator(LogLocator(numticks=5))
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_ylim(0, 1)
        label = "share per 0.01\n(log)" if shares.any() else "share per 0.01"
        ax.set(xlim=(-0.02, 1.02), xlabel="confidence (token-level)", ylabel=label)
        ax.grid(alpha=0.3, linewidth=0.6)
        ax.set_axisbelow(True)


def _file_names(paths: Sequence[str | Path]) -> dict[str, str]:
    """Name each model by the folder of its run, followed by the file's name if several files are of one run."""
    folders = {str(path): Path(path).resolve().parent for path in paths}
    runs = {path: (folder.parent if folder.name == "calibration" else folder).name for path, folder in folders.items()}
    taken = list(runs.values())
    return {path: run if taken.count(run) == 1 else f"{run} {Path(path).stem}" for path, run in runs.items()}


def _draw_points(
    ax: Axes, series: CurveSeries, label: str, style: Mapping[str, Any], *, interval: bool = True
) -> None:
    """Draw a curve as points joined by a line, hollow where a bin holds few tokens, with its intervals."""
    filled = series.filled
    x, y, few = series.confidence[filled], series.accuracy[filled], series.few[filled]
    ax.plot(x, y, label=_wrapped_label(label), **style)
    ax.plot(x[few], y[few], **{**style, "linestyle": "none", "markerfacecolor": "white"})
    if interval and series.low is not None and series.high is not None:
        quiet = {"color": style["color"], "linewidth": 1.2, "alpha": 0.7, "zorder": style["zorder"]}
        ax.vlines(x, series.low[filled], series.high[filled], **quiet)


def _mark_mean(ax: Axes, mean: float) -> None:
    ax.axvline(mean, color=_INK, linewidth=1.1, linestyle="--")
    right = mean < 0.6
    style: dict[str, Any] = {"ha": "left" if right else "right", "va": "top", "fontsize": 8.5, "zorder": 6}
    style |= {"bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}}
    style |= {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    ax.annotate(f"mean {mean:.3f}", (mean, 0.95), (4 if right else -4, 0), **style)


def _single_color(name: str) -> str:
    """Return the colour of one model's bars, replacing the light blue, which is too pale for bars."""
    color = str(run_style(name, 0)["color"])
    return OKABE_ITO[0] if color == OKABE_ITO[5] else color


# ---- title and labels of the curves ---------------------------------------------------------------------------------


def _title_lines(series: Sequence[CurveSeries], split: str) -> list[list[str]]:
    """Return the title of a diagram as lines, each a list of parts; with a single curve it has its ECE."""
    tokens, bins = _span([one.tokens for one in series], "{:,}".format), sorted({len(one.count) for one in series})
    numbers = "/".join(str(number) for number in bins)
    first = [split] if split else []
    first += [f"{tokens} tokens", f"{numbers} bin" if numbers == "1" else f"{numbers} bins"]
    errors = [_ece_with_interval(series[0])] if len(series) == 1 else []
    nulls = [one.ece_null for one in series if one.ece_null is not None]
    if nulls:
        errors.append(f"{'' if errors else 'ECE if '}perfectly calibrated: about {_span(nulls, _number)}")
    scaled = series[0].scaled if len(series) == 1 else None
    last = [] if scaled is None else [f"{_after(scaled)}: {_ece_with_interval(scaled)}"]
    return [line for line in (first, errors, last) if line]


def _wrapped(line: str) -> list[str]:
    """Break a line of the title that is too long, between its parts if possible."""
    hard = "\N{NO-BREAK SPACE}"
    kept = " · ".join(part.replace(" ", hard) for part in line.split(" · "))
    lines = textwrap.wrap(kept, _HEADING_CHARACTERS)
    return [_plain(part.replace(hard, " ").removesuffix(" ·")) for part in lines]


def _wrapped_label(text: str) -> str:
    """Break a label of the legend that is too long, before its bracket if it has one."""
    text = _plain(text)
    if len(text) <= _LABEL_CHARACTERS:
        return text
    name, bracket, rest = text.rpartition(" (")
    lines = textwrap.wrap(name if bracket else text, _LABEL_CHARACTERS)
    return "\n".join([*lines, f"({rest}"] if bracket else lines)


def _plain(text: str) -> str:
    """Escape what matplotlib reads as a formula ($) or as a label to omit from the legend (leading _)."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _after(scaled: CurveSeries) -> str:
    return "scaled" if scaled.temperature is None else f"at T = {scaled.temperature:.3g}"


def _short_ece(series: CurveSeries) -> str:
    return f"ECE {_number(series.ece)}"


def _ece_with_interval(series: CurveSeries) -> str:
    """Return the ECE of a curve as text, with its confidence interval if known."""
    if series.ece_interval is None:
        return _short_ece(series)
    low, high = (_number(bound) for bound in series.ece_interval)
    return f"{_short_ece(series)}, 95 %: {low}–{high}"


def _span(values: Sequence[Any], written: Callable[[Any], str]) -> str:
    low, high = written(min(values)), written(max(values))
    return low if low == high else f"{low}–{high}"


def _number(value: float) -> str:
    return "not a number" if math.isnan(value) else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"
