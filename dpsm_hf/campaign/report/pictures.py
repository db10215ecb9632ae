"""The pictures of a campaign's report, in sections: what is drawn, and of whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ...plots.reliability import ReliabilityDisplay
from ..spec.design import Campaign
from ..verdict.results import Results, Setting
from . import charts, tables
from .pages import Pictures, sections

#: Log key, axis, caption, logarithmic.
Curve: TypeAlias = tuple[str, str, str, bool]
Names: TypeAlias = Callable[[Setting], list[str]]

_CURVES = (
    ("eval_perplexity", "held-out perplexity", "Perplexity on the validation split", True),
    ("eval_rougeL", "held-out ROUGE-L", "ROUGE-L on the validation split", False),
    ("eval_ece_15", "held-out ECE-15", "Calibration error on the validation split, 15 bins, top-label", True),
    ("eval_brier", "held-out Brier score", "Brier score on the validation split", False),
)
_SCHEDULE = (
    ("alpha", "α (weight of the Brier score)", "α: 0 is pure cross-entropy, 1 is pure Brier score", False),
    ("grad_norm", "gradient norm", "Norm of the gradient before clipping", True),
    ("grad_norm_ce", "norm of cross-entropy's gradient", "The gradient that cross-entropy would have alone", True),
    ("grad_norm_brier", "norm of Brier's gradient", "The gradient that the Brier score would have alone", True),
)


def picture_sections(results: Results, settings: Sequence[Setting], pictures: Pictures) -> list[dict[str, Any]]:
    """Draw every picture of the report, in sections: those of each of the main study's settings, then the grids."""
    campaign = results.campaign
    places = [(f"{number}-" if number else "", setting) for number, setting in enumerate(settings)]

    def main(setting: Setting) -> list[str]:
        return [n for n in results.variations(setting) if drawn(campaign, n)]

    def ablations(setting: Setting) -> list[str]:
        names = results.variations(setting)
        kept = [n for n in names if campaign.variation(n).role == "ablation" and results.finished(setting, n)]
        return [*(n for n in names if n == campaign.reference), *kept] if kept else []

    def curves(x: str, kinds: Sequence[Curve], chosen: Names = main, ending: str = "") -> list[dict[str, str]]:
        found = []
        for prefix, setting in places:
            end = f". {tables.describe(results, setting)}"
            found += curve_pictures(
                results, setting, chosen(setting), x, kinds, pictures, f"{prefix}{{}}{ending}", end
            )
        return found

    metric, label = ("rougeL", "ROUGE-L") if campaign.quality[1] else ("perplexity", "perplexity")
    pareto: list[dict[str, str]] = []
    reliability: list[dict[str, str]] = []
    for prefix, setting in places:
        front = charts.pareto(results, setting, metric, label)
        pareto += pictures.add(f"{prefix}pareto", front, tables.describe(results, setting))
        reliability += reliability_pictures(results, setting, main(setting), pictures, prefix)
    return sections(
        (
            "Learning curves",
            "Means over seeds; bands reach from the lowest to the highest seed. Main variations only.",
            curves("step", _CURVES),
        ),
        ("Over seconds of training", "Evaluation is excluded from the seconds.", curves("seconds", _CURVES)),
        ("α and gradients", "", curves("step", _SCHEDULE)),
        (
            "Ablations",
            "Beside cross-entropy those of which a run was not stopped early; means over such runs.",
            curves("step", (*_CURVES[:3], _SCHEDULE[0]), ablations, "-ablations"),
        ),
        (
            "Quality against calibration",
            "Each variation before and after temperature scaling, with standard deviations over seeds. What another "
            "point beats in both is worse than it; means over a part of the seeds only are left out of that "
            "comparison.",
            pareto,
        ),
        (
            "Reliability",
            "Below the diagonal a model is overconfident. Token-level, top-label, test split, first seed.",
            reliability,
        ),
        ("Grids", "Means over seeds.", _heat_maps(results, pictures)),
    )


def curve_pictures(
    results: Results, setting: Setting, names: Sequence[str], x: str, curves: Sequence[Curve], pictures: Pictures,
    file: str = "{}", end: str = "",
) -> list[dict[str, str]]:  # fmt: skip
    """Draw curves of some variations over steps or seconds; the names of their files and their captions may go on."""
    found = []
    for key, axis, caption, log in curves:
        figure = charts.learning_curves(results, setting, names, key, axis, x, log)
        found += pictures.add(file.format(f"{key}-over-{x}"), figure, f"{caption}{end}")
    return found


def reliability_pictures(
    results: Results, setting: Setting, names: Sequence[str], pictures: Pictures, prefix: str = ""
) -> list[dict[str, str]]:
    """Draw reliability diagrams: all variations in one, then each alone, of the first seed that has them."""
    displays = []
    for name in names:
        for point in results.points(setting, name):
            record = results.record(point)
            content = record.calibration.get(results.split) if record is not None and record.status == "ok" else None
            if content is not None:
                title = results.title(name)
                content = {**content, "split": results.split}  # Seq2SeqTrainer calls the test split predict
                displays.append((name, title, point.seed, ReliabilityDisplay.from_json(content, title)))
                break
    found = []
    if len(displays) > 1:
        together = ReliabilityDisplay.overlay([display for *_, display in displays]).figure()
        caption = "All main variations; below, the distribution of confidence"
        found += pictures.add(f"{prefix}reliability-all", together, caption)
    for name, title, seed, display in displays:
        found += pictures.add(f"{prefix}reliability-{name}", display.figure(), f"{title}, seed {seed}")
    return found


def drawn(campaign: Campaign, name: str) -> bool:
    """Return whether a variation has curves of its own: a main one with runs of its own."""
    variation = campaign.variation(name)
    return variation.role == "main" and variation.of is None


def _heat_maps(results: Results, pictures: Pictures) -> list[dict[str, str]]:
    """Draw studies that vary several arguments: the two with the most values, a map for each value of the rest."""
    studies: dict[Setting, list[Setting]] = {}
    for setting in results.settings():
        studies.setdefault(setting.plain, []).append(setting)
    found = []
    metrics = {results.campaign.quality[0]: results.campaign.quality[0], "ece_15": "ECE-15"}
    for plain, settings in studies.items():
        values: dict[str, set[str]] = {}
        for name, value in (pair for setting in settings for pair in setting.settings):
            values.setdefault(name, set()).add(value)
        if sum(len(of_one) > 1 for of_one in values.values()) < 2:
            continue  # a single row of cells reads better as a table
        column, row = sorted(values, key=lambda name: (-len(values[name]), name))[:2]
        rest: dict[str, list[Setting]] = {}
        for setting in settings:
            others = ", ".join(f"{n} {v}" for n, v in setting.settings if n not in (column, row))
            rest.setdefault(others, []).append(setting)
        for others, part in rest.items():
            for name in results.variations(part[0]):
                for metric, label in metrics.items():
                    figure = charts.heat_map(results, part, name, metric, label, (column, row))
                    caption = "; ".join(words for words in (tables.describe(results, plain), others) if words)
                    file = f"grid-{plain.study}-{plain.size}-{plain.data}-{name}-{metric}-{others}"
                    found += pictures.add(file, figure, caption)
    return found
