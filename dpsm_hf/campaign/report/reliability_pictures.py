"""Reliability diagrams of a campaign's variations, before and after temperature scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from ...plots.reliability import ReliabilityDisplay
from ..verdict.results import Results, Setting


def reliability_pictures(
    results: Results, setting: Setting, names: Sequence[str]
) -> Iterator[tuple[str, Figure, str]]:
    """Yield a name, a figure and a caption: all variations in one, then each alone, of the first seed that has them.

    Args:
        results: of the campaign.
        setting: whose runs are drawn.
        names: variations.
    """
    displays = []
    for name in names:
        for point in results.points(setting, name):
            record = results.record(point)
            content = record.calibration.get(results.split) if record is not None and record.status == "ok" else None
            if content is not None:
                title = results.campaign.variation(name).title
                content = {**content, "split": results.split}  # Seq2SeqTrainer's scripts call it predict
                displays.append((name, title, point.seed, ReliabilityDisplay.from_json(content, title)))
                break
    if len(displays) > 1:
        together = ReliabilityDisplay.overlay([display for *_, display in displays])
        yield "reliability-all", together.figure(), "All main variations; below, the distribution of confidence"
    for name, title, seed, display in displays:
        yield f"reliability-{name}", display.figure(), f"{title}, seed {seed}"
