"""Pictures: training curves and the schedule of alpha, and reliability diagrams (matplotlib, never pyplot)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import empty_figure, figure_of, run_styles
from .reliability import ReliabilityDisplay

__all__ = ["ReliabilityDisplay", "plot_alpha", "plot_training_curves", "series_of"]


class RunLike(Protocol):
    """Anything with a name and a Trainer's log history, e.g. `dpsm_hf.campaign.comparison.records.RunRecord`."""

    @property
    def name(self) -> str: ...
    @property
    def log_history(self) -> Sequence[Mapping[str, Any]]: ...


def series_of(run: RunLike, metric: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Take one metric of a run out of its log history.

    Args:
        run: the run.
        metric: key in the log entries, such as ``nll``, ``alpha`` or ``eval_ece_15``.
        x: ``step``, or ``seconds`` for the wall-clock training time, evaluation excluded.

    Returns:
        The places and the values (finite or not), in order; entries that lack either are left out.

    Raises:
        ValueError: if ``x`` is neither.
    """
    if x not in ("step", "seconds"):
        raise ValueError(f"x={x!r} is not an axis of the training curves; choose 'step' or 'seconds'.")
    key = "step" if x == "step" else "eval_train_seconds" if metric.startswith("eval_") else "train_seconds"
    entries = [entry for entry in run.log_history if entry.get(metric) is not None and entry.get(key) is not None]
    return [float(entry[key]) for entry in entries], [float(entry[metric]) for entry in entries]


def plot_training_curves(
    records: Sequence[RunLike],
    x: str = "step",
    metric: str = "eval_nll",
    label: str | None = None,
    ax: Axes | None = None,
    log_scale: bool = False,
) -> Figure:
    """Draw one metric of several runs over steps or over seconds of training.

    Args:
        records: the runs; those that never logged the metric are named in the legend as such.
        x: ``step`` or ``seconds`` (wall-clock since the start of training, evaluation excluded).
        metric: key in the runs' log entries.
        label: name of the vertical axis; the key by default.
        ax: axes to draw on; a new figure by default.
        log_scale: whether the vertical axis is logarithmic.

    Returns:
        The figure. A value that is not finite ends its line there, with a cross and a note in the legend.

    Raises:
        ValueError: for an unknown ``x`` or no records.
    """
    if not records:
        raise ValueError("plot_training_curves needs at least one run; got none.")
    if ax is None:
        ax = empty_figure().add_subplot()
    for run, chosen in zip(records, run_styles([run.name for run in records]), strict=True):
        places, values = series_of(run, metric, x)
        style = dict(chosen)
        finite = next((i for i, value in enumerate(values) if not math.isfinite(value)), len(values))
        note = "" if finite == len(values) else f" (not finite from {x} {places[finite]:g})"
        if not values:
            note = " (not logged)"
        # About ten markers a line tell the runs apart; one at every log entry would hide the line.
        style |= {"linewidth": 1.6, "markersize": 5.5, "markevery": max(1, finite // 10)}
        ax.plot(places[:finite], values[:finite], label=f"{run.name}{note}", **style)
        if 0 < finite < len(values):
            ax.scatter(places[finite - 1], values[finite - 1], s=120, marker="x", color=style["color"], linewidths=2.5)
    if log_scale:
        ax.set_yscale("log")
    ax.set(
        xlabel="training step" if x == "step" else "seconds of training (evaluation excluded)", ylabel=label or metric
    )
    ax.grid(alpha=0.3, linewidth=0.6, which="both")
    ax.legend(fontsize=9, framealpha=0.9)
    return figure_of(ax)


def plot_alpha(records: Sequence[RunLike], ax: Axes | None = None) -> Figure:
    """Draw the weight of the Brier score over the steps.

    Args:
        records: the runs.
        ax: axes to draw on; a new figure by default.

    Returns:
        The figure.
    """
    ax = ax or empty_figure().add_subplot()
    ax.set_ylim(-0.05, 1.05)
    return plot_training_curves(records, "step", "alpha", "α (weight of the Brier score)", ax)
