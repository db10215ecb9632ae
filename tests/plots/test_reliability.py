"""Reliability diagrams: drawing, texts, files and errors."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from dpsm_hf import ReliabilityDisplay, TokenCalibration
from dpsm_hf.evaluation.panel import EvaluationPanel

# Worked by hand: 4 bins, one empty. ECE = 10/20*|.2-.1| + 6/20*|.5-.6| + 4/20*|.75-.9| = .05 + .03 + .03 = .11
CURVE: dict[str, Any] = {
    "bins": 4,
    "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
    "confidence": [0.1, None, 0.6, 0.9],
    "accuracy": [0.2, None, 0.5, 0.75],
    "count": [10, 0, 6, 4],
}
# After scaling, with another empty bin: 12/20*|.3-.25| + 8/20*|.7-.6| = .03 + .04 = .07
AFTER: dict[str, Any] = {
    "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
    "confidence": [None, 0.3, 0.7, None],
    "accuracy": [None, 0.25, 0.6, None],
    "count": [0, 12, 8, 0],
}
BANDS: dict[str, Any] = {"low": [0.06, None, 0.19, 0.3], "high": [0.51, None, 0.81, 0.95]}
HISTOGRAM = [10, *[0] * 59, 6, *[0] * 38, 4]
RECORD: dict[str, Any] = {
    "schema": 2,
    "step": 7,
    "split": "eval",
    "tokens": 20,
    "metrics": {"ece_4_null": 0.0512, "ece_15_null": 0.9},
    "intervals": {"ece_4": [0.04, 0.1234], "ece_15": [0.8, 0.9]},
    "curve": {**CURVE, **BANDS, "histogram": HISTOGRAM},
    "temperature": 1.4321,
    "scaled": {"metrics": {}, "intervals": {"ece_4": [0.01, 0.09]}, "curve": AFTER},
}


@dataclass
class ArrayCurve:
    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def array_curve() -> ArrayCurve:
    confidence, accuracy = np.array([0.1, math.nan, 0.6, 0.9]), np.array([0.2, math.nan, 0.5, 0.75])
    return ArrayCurve(np.linspace(0, 1, 5), confidence, accuracy, np.array([10, 0, 6, 4], dtype=np.int64))


def panel_record(tokens: int = 3000, bins: int = 15, seed: int = 0, power: float = 2.0) -> dict[str, Any]:
    """Return a calibration file's content with both curves, of over-confident tokens."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 1, tokens)
    correct = rng.random(tokens) < confidence**power
    panel = EvaluationPanel(temperature=1.5)
    assert panel.scaled is not None
    panel.tokens.update(confidence=confidence, correct=correct, document=np.arange(tokens) % 50)
    panel.scaled.update(confidence=confidence**power, correct=correct, document=np.arange(tokens) % 50)
    return json.loads(json.dumps({"schema": 2, "step": 1, "split": "eval", **panel.record(bins)}))


def legend(display: ReliabilityDisplay) -> list[str]:
    (box,) = display.figure_.legends
    return [text.get_text() for text in box.get_texts()]


def heading(display: ReliabilityDisplay) -> list[str]:
    return display.figure_.get_suptitle().split("\n")


def line(ax: Axes, label: str) -> Line2D:
    (found,) = [line for line in ax.get_lines() if str(line.get_label()).startswith(label)]
    return found


def intervals(ax: Axes) -> list[list[tuple[float, float, float]]]:
    """Return the vertical lines on the axes as (x, low, high), by collection."""
    found = []
    for lines in ax.collections:
        assert isinstance(lines, LineCollection)
        ends = [np.asarray(segment).round(6).tolist() for segment in lines.get_segments()]
        found.append([(low[0], low[1], high[1]) for low, high in ends])
    return [part for part in found if part]


# ---- one model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CURVE, array_curve()], ids=["mapping", "arrays"])
def test_ece_and_title_of_a_worked_example(source: Any) -> None:
    display = ReliabilityDisplay.from_curve(source, name="dpsm", split="eval").plot()
    assert display.ece == {"dpsm": pytest.approx(0.11)} and display.ece_scaled == {}
    assert display.title() == "eval · 20 tokens · 4 bins · ECE 0.110"
    assert heading(display) == ["dpsm: token-level, top-label", "eval · 20 tokens · 4 bins", "ECE 0.110"]


def test_bars_stand_on_their_bins_and_empty_bins_have_none() -> None:
    display = ReliabilityDisplay.from_curve(CURVE, name="ce").plot()
    # All of these bins hold few tokens, so there is one kind of bar.
    bars = [(round(b.get_x(), 2), round(b.get_height(), 2)) for b in display.ax_.containers[0]]  # type: ignore[union-attr]
    assert bars == [(0.0, 0.2), (0.5, 0.5), (0.75, 0.75)]
    gaps = [(round(b.get_y(), 2), round(b.get_height(), 2)) for b in display.ax_.containers[1]]  # type: ignore[union-attr]
    assert gaps == [(0.2, -0.1), (0.5, 0.1), (0.75, 0.15)]


def test_bins_with_few_tokens_stand_back() -> None:
    many = {**CURVE, "count": [1000, 0, 49, 50]}
    display = ReliabilityDisplay.from_curve(many, name="ce").plot()
    assert {"accuracy", "accuracy, < 50 tokens", "gap to confidence"} < set(legend(display))
    full, faint = display.ax_.containers[:2]
    assert [round(b.get_x(), 2) for b in full] == [0.0, 0.75]  # type: ignore[union-attr]
    assert [round(b.get_x(), 2) for b in faint] == [0.5]  # type: ignore[union-attr]
    both = ReliabilityDisplay.overlay([ReliabilityDisplay.from_curve(many, name) for name in ("ce", "dpsm")]).plot()
    hollow = [line for line in both.ax_.get_lines() if line.get_markerfacecolor() == "white"]
    assert [np.asarray(line.get_xdata()).tolist() for line in hollow] == [[0.6], [0.6], []]
    assert "hollow: < 50 tokens" in legend(both)


def test_the_interval_of_each_accuracy_is_drawn_where_the_curve_has_it() -> None:
    display = ReliabilityDisplay.from_curve({**CURVE, **BANDS}, "ce").plot()
    assert intervals(display.ax_) == [[(0.125, 0.06, 0.51), (0.625, 0.19, 0.81), (0.875, 0.3, 0.95)]]
    assert "95 % interval of accuracy" in legend(display)
    without = ReliabilityDisplay.from_curve(CURVE, "ce").plot()
    assert intervals(without.ax_) == [] and "95 % interval of accuracy" not in legend(without)


def test_the_histogram_has_a_hundred_cells_on_a_logarithmic_axis() -> None:
    display = ReliabilityDisplay.from_json(RECORD, "ce", scaled=False).plot()
    ax = display.histogram_ax_
    assert ax is not None and ax.get_yscale() == "log"
    (steps,) = ax.patches
    values, edges, _ = steps.get_data()  # type: ignore[attr-defined]
    assert edges == pytest.approx(np.arange(101) / 100)
    assert values == pytest.approx(np.array(HISTOGRAM) / 20)
    # (10 * .1 + 6 * .6 + 4 * .9) / 20
    assert [text.get_text() for text in ax.texts] == ["mean 0.410"]


def test_every_cell_with_tokens_can_be_seen_in_the_histogram() -> None:
    record = panel_record()
    ax = ReliabilityDisplay.from_json(record, "ce").plot().histogram_ax_
    assert ax is not None
    low, high = ax.get_ylim()
    counts = np.array([record["curve"]["histogram"], record["scaled"]["curve"]["histogram"]])
    assert counts[counts > 0].min() / 3000 > low > 0 and counts.max() / 3000 < high <= 1


def test_without_a_histogram_the_bins_stand_in_at_the_same_scale() -> None:
    display = ReliabilityDisplay.from_curve(CURVE, "ce").plot()
    assert display.histogram_ax_ is not None
    (steps,) = display.histogram_ax_.patches
    values, edges, _ = steps.get_data()  # type: ignore[attr-defined]
    assert list(edges) == CURVE["edges"]
    assert values == pytest.approx([0.5 / 25, 0, 0.3 / 25, 0.2 / 25])  # 25 hundredths wide


# ---- interval and null level of the ECE -----------------------------------------------------------------------------


def test_the_title_gives_interval_and_null_level_of_the_bins_drawn() -> None:
    display = ReliabilityDisplay.from_json(RECORD, "ce", scaled=False)
    assert (
        display.title()
        == "eval · 20 tokens · 4 bins · ECE 0.110, 95 %: 0.0400–0.123 · perfectly calibrated: about 0.0512"
    )
    other = {"metrics": {"ece_15_null": 0.9}, "intervals": {"ece_15": [0.8, 0.9]}, "curve": CURVE}
    assert ReliabilityDisplay.from_json(other).title() == "20 tokens · 4 bins · ECE 0.110"
    unknown = {"metrics": {"ece_4_null": None}, "intervals": {"ece_4": [None, None]}, "curve": CURVE}
    assert ReliabilityDisplay.from_json(unknown).title() == "20 tokens · 4 bins · ECE 0.110"


def test_bins_of_unequal_width_take_no_figures_of_equal_bins() -> None:
    record = {**RECORD, "curve": {**CURVE, "edges": [0, 0.2, 0.5, 0.75, 1]}, "scaled": None}
    assert ReliabilityDisplay.from_json(record).title() == "eval · 20 tokens · 4 bins · ECE 0.110"


@pytest.mark.parametrize("bins", [10, 15, 100])
def test_figures_of_a_record_are_those_of_its_metrics(bins: int) -> None:
    record = panel_record(bins=bins)
    display = ReliabilityDisplay.from_json(record, "ce", scaled=False)
    assert display.ece["ce"] == pytest.approx(record["metrics"][f"ece_{bins}"], rel=1e-9)
    shown = [
        record["metrics"][f"ece_{bins}"],
        *record["intervals"][f"ece_{bins}"],
        record["metrics"][f"ece_{bins}_null"],
    ]
    ece, low, high, null = (f"{value:.4f}" if value < 0.1 else f"{value:.3f}" for value in shown)
    assert (
        display.title()
        == f"eval · 3,000 tokens · {bins} bins · ECE {ece}, 95 %: {low}–{high} · perfectly calibrated: about {null}"
    )


# ---- before and after temperature -----------------------------------------------------------------------------------


def test_the_scaled_curve_is_a_line_over_the_bars() -> None:
    display = ReliabilityDisplay.from_json(RECORD, "ce").plot()
    assert display.ece["ce"] == pytest.approx(0.11) and display.ece_scaled["ce"] == pytest.approx(0.07)
    drawn = line(display.ax_, "at T = 1.43 (ECE 0.0700)")
    assert np.asarray(drawn.get_xydata()).tolist() == [[0.3, 0.25], [0.7, 0.6]]
    assert drawn.get_marker() != "None" and drawn.get_linestyle() == "-"
    assert "at T = 1.43 (ECE 0.0700)" in legend(display)
    assert heading(display)[-1] == "at T = 1.43: ECE 0.0700, 95 %: 0.0100–0.0900"
    assert display.histogram_ax_ is not None and len(display.histogram_ax_.patches) == 2


def test_the_scaled_curve_can_be_left_out() -> None:
    display = ReliabilityDisplay.from_json(RECORD, "ce", scaled=False).plot()
    assert display.ece_scaled == {} and not any("T =" in label for label in legend(display))
    assert "T =" not in display.title()


def test_two_curves_of_the_caller_are_before_and_after() -> None:
    display = ReliabilityDisplay.from_curve(array_curve(), "ce", scaled=AFTER, temperature=0.5)
    assert "at T = 0.5: ECE 0.0700" in display.title()
    assert "scaled: ECE 0.0700" in ReliabilityDisplay.from_curve(CURVE, scaled=AFTER).title()


# ---- several models -------------------------------------------------------------------------------------------------


def test_several_models_share_one_diagram_with_their_ece_in_the_legend() -> None:
    other = {**CURVE, "accuracy": [0.1, None, 0.6, 0.9]}
    displays = [ReliabilityDisplay.from_curve(CURVE, "ce"), ReliabilityDisplay.from_curve(other, "dpsm")]
    display = ReliabilityDisplay.overlay(displays).plot()
    labels = ["ce (ECE 0.110)", "dpsm (ECE 0.0000)"]
    assert legend(display) == ["perfectly calibrated", *labels, "hollow: < 50 tokens"]
    lines = [line(display.ax_, label) for label in labels]
    assert len({line.get_marker() for line in lines}) == 2
    assert len({line.get_color() for line in lines}) == 2
    assert display.histogram_ax_ is not None and len(display.histogram_ax_.patches) == 2


def test_several_models_with_their_scaled_curves() -> None:
    displays = [ReliabilityDisplay.from_json({**RECORD, "temperature": t}, n) for n, t in (("ce", 1.4), ("dpsm", 1.1))]
    display = ReliabilityDisplay.overlay(displays).plot()
    assert legend(display) == [
        "perfectly calibrated",
        "ce (ECE 0.110, 95 %: 0.0400–0.123)",
        "ce at T = 1.4 (ECE 0.0700, 95 %: 0.0100–0.0900)",
        "dpsm (ECE 0.110, 95 %: 0.0400–0.123)",
        "dpsm at T = 1.1 (ECE 0.0700, 95 %: 0.0100–0.0900)",
        "95 % interval of accuracy",
        "hollow: < 50 tokens",
    ]
    raw, scaled = line(display.ax_, "ce (ECE"), line(display.ax_, "ce at T")
    assert raw.get_color() == scaled.get_color() and raw.get_linewidth() > scaled.get_linewidth()
    assert intervals(display.ax_) == [[(0.1, 0.06, 0.51), (0.6, 0.19, 0.81), (0.9, 0.3, 0.95)]] * 2
    assert display.title() == "eval · 20 tokens · 4 bins · ECE if perfectly calibrated: about 0.0512"
    plain = ReliabilityDisplay.overlay(displays, scaled=False).plot()
    assert plain.ece_scaled == {} and not any("T =" in label for label in legend(plain))
    assert displays[0].ece_scaled, "the displays that were overlaid keep theirs"


def test_files_are_named_by_their_runs(tmp_path: Path) -> None:
    files = []
    for name in ("ce/calibration/eval-step-1.json", "dpsm/calibration/eval-step-1.json", "ce/calibration/eval-2.json"):
        files.append(tmp_path / name)
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text(json.dumps({"split": "eval", "curve": CURVE}))
    assert list(ReliabilityDisplay.overlay(files[:2]).ece) == ["ce", "dpsm"]
    assert list(ReliabilityDisplay.overlay([str(f) for f in files]).ece) == ["ce eval-step-1", "dpsm", "ce eval-2"]


def test_models_without_names_are_numbered_and_equal_names_are_refused() -> None:
    nameless = [ReliabilityDisplay.from_curve(CURVE), ReliabilityDisplay.from_curve(CURVE, "dpsm")]
    assert list(ReliabilityDisplay.overlay(nameless).ece) == ["model 1", "dpsm"]
    with pytest.raises(ValueError, match=r"2 of these models are named 'dpsm'; .*name="):
        ReliabilityDisplay.overlay([nameless[1], nameless[1]])
    assert list(ReliabilityDisplay.overlay(nameless[:1]).ece) == [""]


def test_different_numbers_of_tokens_and_bins_are_both_named() -> None:
    two = {"edges": [0, 0.5, 1], "confidence": [0.2, 0.7], "accuracy": [0.2, 0.7], "count": [1000, 500]}
    displays = [ReliabilityDisplay.from_curve(CURVE, "a"), ReliabilityDisplay.from_curve(two, "b")]
    assert ReliabilityDisplay.overlay(displays).title() == "20–1,500 tokens · 2/4 bins"


# ---- files ----------------------------------------------------------------------------------------------------------


def test_from_json_reads_what_the_callback_writes(tmp_path: Path) -> None:
    path = tmp_path / "eval-step-000007.json"
    path.write_text(json.dumps({"schema": 1, "step": 7, "split": "eval", "tokens": 20, "curve": CURVE}))
    picture = ReliabilityDisplay.from_json(path, name="ce").save(tmp_path / "a" / "reliability.png", dpi=91)
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width == 400
    assert ReliabilityDisplay.from_json(str(path)).split == "eval"


def test_the_data_as_csv_are_those_of_the_curve(tmp_path: Path) -> None:
    calibration = TokenCalibration()
    rng = np.random.default_rng(0)
    confidence = 0.5 + rng.random(500) / 2
    calibration.update(confidence=confidence, correct=rng.random(500) < confidence)
    curve = calibration.curve(10)
    path = ReliabilityDisplay.from_curve(curve, "dpsm, 2nd").save_data(tmp_path / "new" / "curve.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {(row.pop("model"), row.pop("temperature")) for row in rows} == {("dpsm, 2nd", "1.0")}
    assert rows == list(csv.DictReader(curve.as_csv().splitlines()))
    assert rows[0]["count"] == "0" and rows[0]["accuracy"] == ""


def test_the_data_of_both_curves_of_each_model(tmp_path: Path) -> None:
    records = {"ce": panel_record(), "dpsm": {**panel_record(seed=1), "temperature": 0.8}}
    display = ReliabilityDisplay.overlay([ReliabilityDisplay.from_json(r, name) for name, r in records.items()])
    written = json.loads(display.save_data(tmp_path / "curves.json").read_text())
    assert written["split"] == "eval"
    assert [(c["model"], c["temperature"]) for c in written["curves"]] == [
        ("ce", 1.0), ("ce", 1.5), ("dpsm", 1.0), ("dpsm", 0.8),
    ]  # fmt: skip
    raw, scaled = written["curves"][:2]
    for found, view in ((raw, records["ce"]), (scaled, records["ce"]["scaled"])):
        assert {key: found[key] for key in view["curve"]} == view["curve"]
        assert found["ece"] == pytest.approx(view["metrics"]["ece_15"], rel=1e-9)
        assert (found["ece_interval"], found["ece_null"]) == (
            view["intervals"]["ece_15"],
            view["metrics"]["ece_15_null"],
        )
    rows = list(csv.DictReader(display.save_data(tmp_path / "curves.csv").read_text().splitlines()))
    assert len(rows) == 4 * 15 and [row["temperature"] for row in rows[::15]] == ["1.0", "1.5", "1.0", "0.8"]


def test_data_that_are_not_known_are_null_or_empty(tmp_path: Path) -> None:
    display = ReliabilityDisplay.from_curve(CURVE, "ce")
    (curve,) = json.loads(display.save_data(tmp_path / "a.json").read_text())["curves"]
    assert [curve[key] for key in ("low", "high", "histogram", "ece_interval", "ece_null")] == [None] * 5
    rows = list(csv.DictReader(display.save_data(tmp_path / "a.csv").read_text().splitlines()))
    assert {row["low"] for row in rows} == {""} and rows[0]["accuracy"] == "0.2"
    with pytest.raises(ValueError, match=r"a\.txt ends in '\.txt'; .*'\.json' or '\.csv'"):
        display.save_data(tmp_path / "a.txt")


# ---- edges and refusals ---------------------------------------------------------------------------------------------


def test_a_curve_without_tokens_is_drawn_and_says_so(tmp_path: Path) -> None:
    nothing = {"edges": [0.0, 0.5, 1.0], "confidence": [None, None], "accuracy": [None, None], "count": [0, 0]}
    display = ReliabilityDisplay.from_curve(nothing, "ce", scaled=nothing)
    display.save(tmp_path / "empty.png")
    assert display.title() == "0 tokens · 2 bins · ECE not a number · scaled: ECE not a number"
    assert json.loads(display.save_data(tmp_path / "empty.json").read_text())["curves"][0]["ece"] is None


def test_drawing_on_axes_of_the_caller_keeps_their_figure() -> None:
    figure = Figure()
    ax = figure.add_subplot()
    display = ReliabilityDisplay.from_json(RECORD, "ce").plot(ax=ax)
    assert display.figure_ is figure and display.histogram_ax_ is None and figure.axes == [ax]
    assert not figure.legends and figure.get_suptitle() == "" and tuple(figure.get_size_inches()) == (6.4, 4.8)
    assert ax.get_title().startswith("ce: token-level, top-label\neval · 20 tokens")
    box = ax.get_legend()
    assert box is not None and len(box.get_texts()) > 3


def test_wrong_curves_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'dpsm' has no 'count'"):
        ReliabilityDisplay.from_curve({k: v for k, v in CURVE.items() if k != "count"}, name="dpsm")
    with pytest.raises(ValueError, match=r"'ce' does not fit together: 4 counts"):
        ReliabilityDisplay.from_curve({**CURVE, "edges": [0.0, 1.0]}, name="ce")
    with pytest.raises(ValueError, match="different splits"):
        ReliabilityDisplay.overlay([ReliabilityDisplay.from_curve(CURVE, "a", split) for split in ("eval", "test")])
    with pytest.raises(ValueError, match="at least one"):
        ReliabilityDisplay.overlay([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": [0.1] * 4}, r"has 'low' but no 'high'"),
        ({"low": [0.1] * 3, "high": [0.9] * 4}, "does not fit together"),
        ({"low": [-0.1] * 4, "high": [0.9] * 4}, r"'low' .* holds -0.1; expected shares"),
        ({"histogram": [1] * 100}, "counts 20 tokens in its bins but 100 in its histogram"),
        ({"count": [10, 0, 6, -4]}, r"'count' .* holds -4; expected whole numbers"),
        ({"count": [10, 0, 6, math.inf]}, r"'count' .* holds inf"),
        ({"count": [10, 3, 6, 4]}, r"'confidence' .* holds nan; .* in bins with tokens"),
        ({"accuracy": [0.2, None, 50, 0.75]}, r"'accuracy' .* holds 50"),
        ({"edges": [0, 0.5, 0.25, 0.75, 1]}, "'edges' .* do not rise"),
        ({"edges": "wrong"}, "'edges' .* not a list of numbers"),
        ({"accuracy": [[0.2]]}, "'accuracy'"),
        ({"count": []}, "does not fit together"),
    ],
)
def test_what_no_curve_can_hold_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReliabilityDisplay.from_curve({**CURVE, **change}, name="ce")


def test_wrong_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ce holds no calibration curve"):
        ReliabilityDisplay.from_json({"metrics": {}}, name="ce")
    with pytest.raises(ValueError, match=r"'scaled' of 'ce' holds no calibration curve"):
        ReliabilityDisplay.from_json({**RECORD, "scaled": {"metrics": {}}}, "ce")
    with pytest.raises(ValueError, match=r"temperature of 'ce' is -1\.0; it must be a positive number"):
        ReliabilityDisplay.from_json({**RECORD, "temperature": -1.0}, "ce")
    (tmp_path / "half.json").write_text('{"curve": {')
    with pytest.raises(ValueError, match=r"half\.json is not JSON"):
        ReliabilityDisplay.from_json(tmp_path / "half.json")
