"""Pictures: what they say, what they refuse, and that they touch no global state."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpsm_hf.plots import ReliabilityDisplay, plot_alpha, plot_training_curves, series_of

# Worked by hand: 4 bins, one empty. ECE = 10/20*|.2-.1| + 6/20*|.5-.6| + 4/20*|.75-.9| = .05 + .03 + .03 = .11
CURVE: dict[str, Any] = {
    "bins": 4,
    "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
    "confidence": [0.1, None, 0.6, 0.9],
    "accuracy": [0.2, None, 0.5, 0.75],
    "count": [10, 0, 6, 4],
}


@dataclass
class Run:
    name: str
    log_history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class ArrayCurve:
    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def array_curve() -> ArrayCurve:
    nan = math.nan
    return ArrayCurve(
        np.linspace(0, 1, 5),
        np.array([0.1, nan, 0.6, 0.9]),
        np.array([0.2, nan, 0.5, 0.75]),
        np.array([10, 0, 6, 4], dtype=np.int64),
    )


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    assert box is not None
    return [text.get_text() for text in box.get_texts()]


@pytest.mark.parametrize("source", [CURVE, array_curve()], ids=["mapping", "arrays"])
def test_ece_and_title_of_a_worked_example(source: Any) -> None:
    display = ReliabilityDisplay.from_curve(source, name="dpsm", split="eval").plot()
    assert display.ece["dpsm"] == pytest.approx(0.11)
    assert display.title() == "eval · 20 tokens · 4 bins · ECE 0.110"
    heading = display.ax_.get_title()
    assert heading == "dpsm: token-level, top-label\neval · 20 tokens · 4 bins · ECE 0.110"


def test_bars_stand_on_their_bins_and_empty_bins_have_none() -> None:
    display = ReliabilityDisplay.from_curve(CURVE, name="ce").plot()
    # All of these bins hold few tokens, so there is one kind of bar.
    bars = [(round(b.get_x(), 2), round(b.get_height(), 2)) for b in display.ax_.containers[0]]  # type: ignore[union-attr]
    assert bars == [(0.0, 0.2), (0.5, 0.5), (0.75, 0.75)]
    gaps = [(round(b.get_y(), 2), round(b.get_height(), 2)) for b in display.ax_.containers[1]]  # type: ignore[union-attr]
    assert gaps == [(0.2, -0.1), (0.5, 0.1), (0.75, 0.15)]
    assert display.histogram_ax_ is not None
    shares = [b.get_height() for b in display.histogram_ax_.containers[0]]  # type: ignore[union-attr]
    assert shares == pytest.approx([0.5, 0.0, 0.3, 0.2])


def test_bins_with_few_tokens_stand_back() -> None:
    many = {**CURVE, "count": [1000, 0, 49, 50]}
    display = ReliabilityDisplay.from_curve(many, name="ce").plot()
    assert legend(display.ax_)[1:] == ["accuracy", "accuracy, under 50 tokens", "gap to confidence"]
    full, faint = display.ax_.containers[:2]
    assert [round(b.get_x(), 2) for b in full] == [0.0, 0.75]  # type: ignore[union-attr]
    assert [round(b.get_x(), 2) for b in faint] == [0.5]  # type: ignore[union-attr]
    both = ReliabilityDisplay.overlay([ReliabilityDisplay.from_curve(many, name) for name in ("ce", "dpsm")]).plot()
    hollow = [line for line in both.ax_.get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[0.6], [0.6], []]


def test_several_models_share_one_diagram_with_their_ece_in_the_legend() -> None:
    other = {**CURVE, "accuracy": [0.1, None, 0.6, 0.9]}
    displays = [ReliabilityDisplay.from_curve(CURVE, "ce"), ReliabilityDisplay.from_curve(other, "dpsm")]
    display = ReliabilityDisplay.overlay(displays).plot()
    labels = ["ce (ECE 0.110)", "dpsm (ECE 0.0000)"]
    assert legend(display.ax_) == ["perfectly calibrated", *labels, "hollow: under 50 tokens"]
    lines = [line for line in display.ax_.get_lines() if line.get_label() in labels]
    assert len({line.get_marker() for line in lines}) == 2
    assert len({line.get_color() for line in lines}) == 2
    assert display.histogram_ax_ is not None and len(display.histogram_ax_.patches) == 2


def test_from_json_reads_what_the_callback_writes(tmp_path: Any) -> None:
    path = tmp_path / "eval-step-000007.json"
    path.write_text(json.dumps({"schema": 1, "step": 7, "split": "eval", "tokens": 20, "curve": CURVE}))
    picture = ReliabilityDisplay.from_json(path, name="ce").save(tmp_path / "a" / "reliability.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_the_same_numbers_give_the_same_file(tmp_path: Any) -> None:
    for name in ("one.png", "two.png"):
        ReliabilityDisplay.from_curve(CURVE, "ce").save(tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_curve_without_tokens_is_drawn_and_says_so(tmp_path: Any) -> None:
    nothing = {"edges": [0.0, 0.5, 1.0], "confidence": [None, None], "accuracy": [None, None], "count": [0, 0]}
    display = ReliabilityDisplay.from_curve(nothing, "ce")
    display.save(tmp_path / "empty.png")
    assert display.title() == "0 tokens · 2 bins · ECE not a number"


def test_drawing_on_axes_of_the_caller_keeps_their_figure() -> None:
    figure = Figure()
    display = ReliabilityDisplay.from_curve(CURVE).plot(ax=figure.add_subplot())
    assert display.figure_ is figure and display.histogram_ax_ is None and len(figure.axes) == 1


def test_wrong_curves_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'dpsm' has no 'count'"):
        ReliabilityDisplay.from_curve({k: v for k, v in CURVE.items() if k != "count"}, name="dpsm")
    with pytest.raises(ValueError, match=r"'ce' does not fit together: 4 counts"):
        ReliabilityDisplay.from_curve({**CURVE, "edges": [0.0, 1.0]}, name="ce")
    with pytest.raises(ValueError, match="holds no calibration curve"):
        ReliabilityDisplay.from_json({"metrics": {}}, name="ce")
    with pytest.raises(ValueError, match="different splits"):
        parts = [ReliabilityDisplay.from_curve(CURVE, "a", split) for split in ("eval", "test")]
        ReliabilityDisplay.overlay(parts)
    with pytest.raises(ValueError, match="at least one"):
        ReliabilityDisplay.overlay([])


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
    assert list(ax.get_lines()[0].get_xdata()) == [0.0, 1.6, 3.1]
    assert ax.get_ylabel() == "NLL" and "seconds" in ax.get_xlabel()


def test_a_diverged_run_ends_at_its_last_finite_value() -> None:
    broken = [*history()[:3], {"step": 20, "eval_nll": math.nan, "eval_train_seconds": 3.0}]
    broken.append({"step": 30, "eval_nll": 4.0, "eval_train_seconds": 4.0})
    (ax,) = plot_training_curves([Run("brier", broken), Run("ce", [])], "step", "eval_nll").axes
    assert list(ax.get_lines()[0].get_xdata()) == [0, 10]
    assert legend(ax) == ["brier (not finite from step 20)", "ce (not logged)"]
    assert len(ax.collections) == 1  # the cross


def test_alpha_is_drawn_between_zero_and_one() -> None:
    (ax,) = plot_alpha([Run("dpsm", history())]).axes
    assert list(ax.get_lines()[0].get_ydata()) == [0.5, 1.0]
    low, high = ax.get_ylim()
    assert low < 0 and high > 1
    with pytest.raises(ValueError, match="at least one run"):
        plot_alpha([])


def test_drawing_never_imports_pyplot() -> None:
    code = (
        "import sys; from dpsm_hf.plots import ReliabilityDisplay as R;"
        "R.from_curve({'edges': [0, 1], 'confidence': [.5], 'accuracy': [.5], 'count': [3]}).plot();"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    # Libraries below the package may import pyplot for their own ends; hence the module files alone.
    prelude = "import sys, types, pathlib; p = types.ModuleType('dpsm_hf'); p.__path__ = ['dpsm_hf']; "
    subprocess.run([sys.executable, "-c", prelude + "sys.modules['dpsm_hf'] = p; " + code], check=True)
