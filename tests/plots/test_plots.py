"""Training curves: content and errors; and the styles and files that all plots share."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from dpsm_hf.plots.figures import empty_figure, run_style, run_styles, save_figure
from dpsm_hf.plots.training_curves import plot_alpha, plot_training_curves, series_of


@dataclass
class Run:
    name: str
    log_history: list[dict[str, Any]] = field(default_factory=list)


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    assert box is not None
    return [text.get_text() for text in box.get_texts()]


def history() -> list[dict[str, Any]]:
    return [
        {"step": 0, "eval_nll": 8.0, "eval_train_seconds": 0.0},
        {"step": 10, "loss": 6.0, "nll": 6.5, "alpha": 0.5, "train_seconds": 1.5},
        {"step": 10, "eval_nll": 6.0, "eval_train_seconds": 1.6},
        {"step": 20, "loss": 5.0, "nll": 5.5, "alpha": 1.0, "train_seconds": 3.0},
        {"step": 20, "eval_nll": 5.0, "eval_train_seconds": 3.1},
        {"step": 20, "train_runtime": 4.0},
    ]


def test_series_over_steps_and_over_seconds() -> None:
    run = Run("dpsm", history())
    assert series_of(run, "eval_nll") == ([0, 10, 20], [8.0, 6.0, 5.0])
    assert series_of(run, "eval_nll", "seconds") == ([0.0, 1.6, 3.1], [8.0, 6.0, 5.0])
    assert series_of(run, "nll", "seconds") == ([1.5, 3.0], [6.5, 5.5])
    with pytest.raises(ValueError, match=r"x='hours'.*'step' or 'seconds'"):
        series_of(run, "nll", "hours")


def test_training_curves_show_each_run_and_name_the_axes() -> None:
    figure = plot_training_curves([Run("ce", history()), Run("dpsm", history())], "seconds", "eval_nll", "NLL")
    (ax,) = figure.axes
    assert legend(ax) == ["ce", "dpsm"]
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [0.0, 1.6, 3.1]
    assert ax.get_ylabel() == "NLL" and "seconds" in ax.get_xlabel()


def test_a_diverged_run_ends_at_its_last_finite_value() -> None:
    broken = [*history()[:3], {"step": 20, "eval_nll": math.nan, "eval_train_seconds": 3.0}]
    broken.append({"step": 30, "eval_nll": 4.0, "eval_train_seconds": 4.0})
    (ax,) = plot_training_curves([Run("brier", broken), Run("ce", [])], "step", "eval_nll").axes
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [0, 10]
    assert legend(ax) == ["brier (not finite from step 20)", "ce (not logged)"]
    assert len(ax.collections) == 1  # the cross


def test_alpha_is_drawn_between_zero_and_one() -> None:
    (ax,) = plot_alpha([Run("dpsm", history())]).axes
    assert np.asarray(ax.get_lines()[0].get_ydata()).tolist() == [0.5, 1.0]
    low, high = ax.get_ylim()
    assert low < 0 and high > 1
    with pytest.raises(ValueError, match="at least one run"):
        plot_alpha([])


def test_drawing_never_imports_pyplot() -> None:
    code = (
        "import sys; from dpsm_hf.plots.training_curves import ReliabilityDisplay as R;"
        "R.from_curve({'edges': [0, 1], 'confidence': [.5], 'accuracy': [.5], 'count': [3]}).plot();"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    # only the package's own files: libraries may import pyplot for themselves
    prelude = "import sys, types, pathlib; p = types.ModuleType('dpsm_hf'); p.__path__ = ['dpsm_hf']; "
    subprocess.run([sys.executable, "-c", prelude + "sys.modules['dpsm_hf'] = p; " + code], check=True)


def test_no_two_runs_of_a_picture_look_alike() -> None:
    def look(style: dict[str, Any]) -> tuple[str, str]:
        return style["color"], style["marker"]

    for names in (["ce", "x", "y"], ["x", "ce", "dpsm"], [f"run {i}" for i in range(14)]):
        assert len({look(style) for style in run_styles(names)}) == len(names)
        assert len({(style["color"], str(style["linestyle"])) for style in run_styles(names)}) == len(names)
    named = dict(zip(["x", "ce", "dpsm"], run_styles(["x", "ce", "dpsm"]), strict=True))
    assert named["ce"] == run_style("ce", 0) and named["dpsm"] == run_style("dpsm", 5)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_numbers_give_the_same_file(tmp_path: Any, ending: str) -> None:
    pictures = []
    for name in ("one", "two"):
        figure = empty_figure()
        ax = figure.add_subplot()
        ax.bar([0, 1], [1, 2], hatch="//")
        ax.plot([0, 1], [1, 2], "o")
        pictures.append(save_figure(figure, tmp_path / f"{name}.{ending}").read_bytes())
    assert pictures[0] == pictures[1]
