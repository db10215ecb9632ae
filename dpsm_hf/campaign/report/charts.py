"""The pictures of a campaign's report: curves over seeds, the Pareto front, heat maps (matplotlib, never pyplot)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...plots.figures import empty_figure, plain_log_axis, run_styles
from ..verdict.results import Results, Setting, series

#: Points of the common axis on which the curves of several seeds are averaged.
_GRID = 60


def learning_curves(
    results: Results, setting: Setting, names: Sequence[str], key: str, label: str, x: str = "step", log: bool = False
) -> Figure | None:
    """Draw a logged figure of each variation: the mean over its seeds, and a band from the lowest to the highest.

    A run that ended early is left out, because the mean reaches only as far as the shortest run; if it is the only run
    of its variation, it is drawn up to where it ended. At a figure that is not finite the line ends with a cross and a
    note in the legend.

    ``key`` is that of the log entries, ``eval_nll`` for instance, ``x`` is ``step`` or ``seconds`` of training,
    evaluation excluded. None where fewer than two evaluations were logged.
    """
    figure = empty_figure(5.2, 3.9)
    ax = figure.add_subplot()
    drawn = 0
    styles = _styles(results)
    for name in names:
        curves, style, lost = [], styles[name], None
        points = results.points(setting, name)
        for point in points:
            record = results.record(point)
            if record is None or (record.status != "ok" and len(points) > 1):
                continue
            found = series(record, key)
            if len(points) == 1:
                lost = next((float(e.get("step", 0)) for e in record.history if key in e and e[key] is None), None)
                found = [p for p in found if lost is None or p[1] < lost]
            if len(found) > 1:
                curves.append((np.array([p[x == "step"] for p in found]), np.array([p[2] for p in found])))
        if not curves:
            continue
        drawn += 1
        places, values = _together(curves)
        title = results.title(name)
        if lost is not None:
            title += f" (not finite from step {lost:g})"
            ax.scatter(places[-1], values[0, -1], s=120, marker="x", color=style["color"], linewidths=2.5)
        ax.plot(places, values.mean(0), label=title, lw=1.6, ms=5, markevery=max(1, len(places) // 8), **style)
        if len(values) > 1:
            ax.fill_between(places, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)
    if not drawn:
        return None
    if log:
        plain_log_axis(ax)
    else:
        ax.ticklabel_format(axis="y", useOffset=False)
    if key == "alpha":
        ax.set_ylim(-0.03, 1.03)
    ax.set(xlabel="training step" if x == "step" else "seconds of training (evaluation excluded)", ylabel=label)
    ax.grid(alpha=0.3, lw=0.6)
    ax.legend(fontsize=8, framealpha=0.9)
    return figure


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Give each variation the same style in all pictures."""
    own = [v for v in results.campaign.variations if v.of is None]
    return dict(zip((v.name for v in own), run_styles([v.title for v in own]), strict=True))


def _together(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return a common x axis and the values of each curve on it, interpolated where their own axes differ."""
    first = curves[0][0]
    if all(len(p) == len(first) and np.array_equal(p, first) for p, _ in curves):
        return first, np.array([values for _, values in curves])
    low, high = max(p[0] for p, _ in curves), min(p[-1] for p, _ in curves)
    places = np.linspace(low, high, _GRID)
    return places, np.array([np.interp(places, p, values) for p, values in curves])


def pareto(results: Results, setting: Setting, quality: str, label: str, ece: str = "ece_15") -> Figure | None:
    """Draw quality against calibration error, before (filled) and after (hollow) temperature scaling.

    Points are means over seeds, their bars standard deviations; the dashed line joins what no other point beats in
    both, before and after scaling taken together. Variations of which seeds are missing are drawn and marked so, but
    are no part of that line: their seeds may be the easier or the better ones.

    ``quality`` and ``ece`` are metrics; None where no run has both.
    """
    names = [n for n in results.variations(setting) if results.campaign.variation(n).of is None]
    figure = empty_figure(6.2, 4.6)
    ax = figure.add_subplot()
    sign = -1.0 if results.campaign.quality[1] else 1.0
    cloud: list[tuple[float, float, bool]] = []
    styles = _styles(results)
    for name in names:
        title, style = results.title(name), styles[name]
        means = []
        planned = len(results.points(setting, name))
        for scaled in (False, True):
            x, y = (results.values(setting, name, metric, scaled=scaled) for metric in (quality, ece))
            seeds = sorted(set(x) & set(y))
            if not seeds:
                continue
            xs, ys = np.array([x[s] for s in seeds]), np.array([y[s] for s in seeds])
            means.append((float(xs.mean()), float(ys.mean())))
            whole = len(seeds) == planned
            cloud.append((sign * means[-1][0], means[-1][1], whole))
            shown = title if whole else f"{title} ({len(seeds)} of {planned} seeds)"
            spread = {"xerr": xs.std(ddof=1), "yerr": ys.std(ddof=1)} if len(seeds) > 1 else {}
            ax.errorbar(
                *means[-1], **spread, fmt=style["marker"], color=style["color"], ms=6.5, lw=0.8, zorder=3,
                mfc="white" if scaled else style["color"], label=None if scaled else shown,
            )  # fmt: skip
        if len(means) == 2:
            ax.plot(*zip(*means, strict=True), color=style["color"], lw=0.7, alpha=0.6, zorder=2)
    if not cloud:
        return None
    complete = {(x, y) for x, y, whole in cloud if whole}
    front = sorted(p for p in complete if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in complete))
    if front:
        ax.plot([sign * p[0] for p in front], [p[1] for p in front], "k--", lw=1, zorder=1, label="Pareto front")
    if min(p[1] for p in cloud) > 0:
        plain_log_axis(ax)
    if sign > 0 and max(abs(p[0]) for p in cloud) > 4 * min(abs(p[0]) for p in cloud):
        ax.set_xscale("log")
    arrow = "higher" if results.campaign.quality[1] else "lower"
    ax.set(xlabel=f"{label} ({arrow} is better)", ylabel=f"{ece.replace('ece_', 'ECE-')} (lower is better)")
    ax.grid(alpha=0.3, lw=0.6, which="both")
    ax.legend(fontsize=7.5, framealpha=0.9, title="hollow: after temperature scaling", title_fontsize=7.5)
    return figure


def heat_map(
    results: Results, settings: Sequence[Setting], variation: str, metric: str, label: str, axes: tuple[str, str]
) -> Figure | None:
    """Draw the mean of a metric over the two arguments that a grid study varies; numbers in the cells.

    ``settings`` are those of the study, of one size and data set and one value of every further argument; ``axes`` are
    the arguments, columns first. None where no cell has a figure.
    """
    along = [
        sorted({dict(s.settings)[name] for s in settings if name in dict(s.settings)}, key=_number) for name in axes
    ]
    grid = np.full((len(along[1]), len(along[0])), math.nan)
    for setting in settings:
        at = dict(setting.settings)
        values = list(results.values(setting, variation, metric).values())
        if values and all(name in at for name in axes):
            grid[along[1].index(at[axes[1]]), along[0].index(at[axes[0]])] = np.mean(values)
    if not np.isfinite(grid).any():
        return None
    figure = empty_figure(1.6 + 1.0 * len(along[0]), 1.5 + 0.55 * len(along[1]))
    ax = figure.add_subplot()
    image = ax.imshow(np.ma.masked_invalid(grid), cmap="cividis", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (i, j), value in np.ndenumerate(grid):
        text = "–" if math.isnan(value) else f"{value:.4g}"
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color="black" if value > middle else "white")
    ax.set_xticks(range(len(along[0])), along[0])
    ax.set_yticks(range(len(along[1])), along[1])
    ax.set(xlabel=axes[0], ylabel=axes[1], title=f"{results.title(variation)}: {label}")
    ax.title.set_fontsize(9)
    figure.colorbar(image, ax=ax, shrink=0.9)
    return figure


def _number(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
