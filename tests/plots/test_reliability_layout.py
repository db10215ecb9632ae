"""Reliability diagrams at 400 pixels: nothing is cut off, nothing overlaps, and greys are distinguishable."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from dpsm_hf import ReliabilityDisplay
from dpsm_hf.evaluation.panel import EvaluationPanel
from dpsm_hf.plots.figures import run_styles

LONG = "gpt2-wikitext103-dpsm-cosine-warmup-0.1-seed-42-second-try"


def record(tokens: int, a: float, b: float, bins: int = 15, split: str = "eval") -> dict[str, Any]:
    """Return a calibration file's content, of confidences that follow a beta distribution."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(a, b, tokens)
    correct = rng.random(tokens) < confidence**1.5
    panel = EvaluationPanel(temperature=1.4321)
    assert panel.scaled is not None
    panel.tokens.update(confidence=confidence, correct=correct, document=np.arange(tokens) % 50)
    panel.scaled.update(confidence=confidence**1.5, correct=correct, document=np.arange(tokens) % 50)
    return {"schema": 2, "split": split, **panel.record(bins)}


USUAL = record(20_000, 0.6, 0.4)
FEW = record(300, 0.6, 0.4, split="a validation split with a long name of its own")

SCHEMA_1 = {name: USUAL["curve"][name] for name in ("edges", "count", "confidence", "accuracy")}


def overlaid(content: dict[str, Any], names: list[str], scaled: bool) -> ReliabilityDisplay:
    displays = [ReliabilityDisplay.from_json(content, name) for name in names]
    return ReliabilityDisplay.overlay(displays, scaled=scaled)


CASES = {
    "single": ReliabilityDisplay.from_json(USUAL, "ce", scaled=False),
    "scaled": ReliabilityDisplay.from_json(USUAL, "dpsm"),
    "few tokens": ReliabilityDisplay.from_json(FEW, "ce"),
    "long names": ReliabilityDisplay.from_json(FEW, LONG),
    "three": overlaid(USUAL, ["ce", "brier", "dpsm"], scaled=False),
    "three scaled": overlaid(USUAL, ["ce", "brier", "dpsm"], scaled=True),
    "three long names": overlaid(FEW, [f"{LONG}-{i}" for i in range(3)], scaled=True),
    "empty bins": ReliabilityDisplay.from_json(record(5000, 30, 4), "brier"),
    "one bin": ReliabilityDisplay.from_json(record(5000, 0.6, 0.4, bins=1), "ce"),
    "last bin": ReliabilityDisplay.from_json(record(5000, 800, 2), "ce"),
    "hundred bins": ReliabilityDisplay.from_json(record(5000, 0.6, 0.4, bins=100), "ce"),
    "schema 1": ReliabilityDisplay.from_json({"curve": SCHEMA_1}),
    "no tokens": ReliabilityDisplay.from_curve(
        {"edges": [0, 0.5, 1], "confidence": [None] * 2, "accuracy": [None] * 2, "count": [0, 0]}
    ),
}  # fmt: skip


def texts_of(figure: Figure) -> list[Text]:
    """Return the visible texts of a figure, without labels of ticks beyond the ends of an axis."""
    beyond = set()
    for axis in [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in found if text.get_text() and text.get_visible() and text not in beyond]


def overlap(one: Bbox, other: Bbox) -> bool:
    # a pixel of the boxes is room around the letters
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return bool(wide > 1 and high > 1)


@pytest.mark.parametrize("case", CASES)
def test_every_text_is_whole_and_stands_alone(case: str) -> None:
    figure = CASES[case].figure()
    figure.set_dpi(400 / figure.get_figwidth())
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = enumerate(texts_of(figure))
    shown = {f"{number}: {text.get_text()}": text.get_window_extent(renderer) for number, text in texts}
    width, height = canvas.get_width_height()
    cut = [name for name, box in shown.items() if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    assert (width, cut) == (400, [])
    assert [pair for pair in combinations(shown, 2) if overlap(shown[pair[0]], shown[pair[1]])] == []
    boxes = [ax.get_window_extent(renderer) for ax in figure.axes]
    around = [figure.legends[0].get_window_extent(renderer), *(b for n, b in shown.items() if "token-level" in n)]
    assert not any(overlap(box, other) for box in boxes for other in around), "title, legend or axis name on data"
    assert boxes[0].width > 250 and boxes[0].height > 250, "the diagram itself is squeezed"


def test_a_name_is_text_whatever_is_in_it() -> None:
    names = ["_private", "a$x^2$b"]
    display = overlaid(USUAL, names, scaled=False).plot()
    texts = display.figure_.legends[0].get_texts()
    assert [name for name in names if any(name in text.get_text().replace(r"\$", "$") for text in texts)] == names
    assert not any(text.get_text().count("$") - text.get_text().count(r"\$") for text in texts), "read as a formula"


def luminance(color: Any) -> float:
    """Return the relative luminance of a colour (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(one: Any, other: Any) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["ce", "brier", "dpsm", "step 500"])
def test_without_colour_the_curves_stand_out_from_bars_and_paper(name: str) -> None:
    ax = ReliabilityDisplay.from_json(USUAL, name).plot().ax_
    bar = ax.containers[0][0]  # type: ignore[index]
    red, green, blue, alpha = bar.get_facecolor()
    seen = tuple(alpha * part + 1 - alpha for part in (red, green, blue))
    (scaled,) = [line for line in ax.get_lines() if str(line.get_label()).startswith("at T")]
    interval = next(part.get_color()[0] for part in ax.collections if part.get_label() == "95 % interval of accuracy")  # type: ignore[attr-defined]
    # 3:1 is what WCAG 2.2 asks of graphics
    assert contrast(scaled.get_color(), seen) > 3 and contrast((red, green, blue), "white") > 3
    assert contrast(interval, seen) > 2.5
    assert contrast(seen, "white") > 2


def test_without_colour_three_models_differ_by_marker_and_dashes() -> None:
    ax = CASES["three"].plot().ax_
    lines = [line for line in ax.get_lines() if "ECE" in str(line.get_label())]
    assert len(lines) == len({line.get_marker() for line in lines}) == 3
    assert len({str(style["linestyle"]) for style in run_styles(["ce", "brier", "dpsm"])}) == 3
    assert all(contrast(line.get_color(), "white") > 3 for line in lines)
