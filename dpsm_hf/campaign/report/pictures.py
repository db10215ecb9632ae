"""The pictures of a campaign's report, in sections: what is drawn, and of whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from ...plots.reliability import ReliabilityDisplay
from ..spec.design import Campaign
from ..verdict.results import Results, Setting
from . import charts, tables
from .pages import Pictures

# log key, axis, caption, logarithmic
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
    """Draw every picture of the report.

    Args:
        results: of the campaign.
        settings: of the main study, each with pictures of its own.
        pictures: where they go.

    Returns:
        Sections in the order of the page: ``title``, ``text`` and ``pictures``, each of these with ``data``,
        ``caption`` and ``png``.
    """
    campaign = results.campaign
    sections: list[dict[str, Any]] = []

    def section(title: str, text: str, make: Callable[[Setting, str], list[dict[str, str]]]) -> None:
        found = []
        for number, setting in enumerate(settings):
            found += make(setting, f"{number}-" if number else "")
        if found:
            sections.append({"title": title, "text": text, "pictures": found})

    def main(setting: Setting) -> list[str]:
        return [n for n in results.variations(setting) if drawn(campaign, n)]

    def ablations(setting: Setting) -> list[str]:
        names = results.variations(setting)
        kept = [n for n in names if campaign.variation(n).role == "ablation" and results.finished(setting, n)]
        return [*(n for n in names if n == campaign.reference), *kept] if kept else []

    def curves(
        x: str,
        kinds: Sequence[tuple[str, str, str, bool]],
        chosen: Callable[[Setting], list[str]] = main,
        ending: str = "",
    ) -> Callable[[Setting, str], list[dict[str, str]]]:
        def make(setting: Setting, prefix: str) -> list[dict[str, str]]:
            found = []
            for key, axis, caption, log in kinds:
                figure = charts.learning_curves(results, setting, chosen(setting), key, axis, x, log)
                place = tables.describe(results, setting)
                found += pictures.add(f"{prefix}{key}-over-{x}{ending}", figure, f"{caption}. {place}")
            return found

        return make

    words = "Means over seeds; bands reach from the lowest to the highest seed. Main variations only."
    section("Learning curves", words, curves("step", _CURVES))
    section("Over seconds of training", "Evaluation is excluded from the seconds.", curves("seconds", _CURVES))
    section("α and gradients", "", curves("step", _SCHEDULE))
    section(
        "Ablations",
        "Beside cross-entropy those of which a run was not stopped early; means over such runs.",
        curves("step", (*_CURVES[:3], _SCHEDULE[0]), ablations, "-ablations"),
    )
    metric, label = ("rougeL", "ROUGE-L") if campaign.quality[1] else ("perplexity", "perplexity")
    section(
        "Quality against calibration",
        "Each variation before and after temperature scaling, with standard deviations over seeds. What another point "
        "beats in both is worse than it; means over a part of the seeds only are left out of that comparison.",
        lambda setting, prefix: pictures.add(
            f"{prefix}pareto", charts.pareto(results, setting, metric, label), tables.describe(results, setting)
        ),
    )
    section(
        "Reliability",
        "Below the diagonal a model is overconfident. Token-level, top-label, test split, first seed.",
        lambda setting, prefix: [
            picture
            for name, figure, caption in reliability_pictures(results, setting, main(setting))
            for picture in pictures.add(f"{prefix}{name}", figure, caption)
        ],
    )
    grids = _heat_maps(results, pictures)
    if grids:
        sections.append({"title": "Grids", "text": "Means over seeds.", "pictures": grids})
    return sections


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
                content = {**content, "split": results.split}  # Seq2SeqTrainer calls the test split predict
                displays.append((name, title, point.seed, ReliabilityDisplay.from_json(content, title)))
                break
    if len(displays) > 1:
        together = ReliabilityDisplay.overlay([display for *_, display in displays])
        yield "reliability-all", together.figure(), "All main variations; below, the distribution of confidence"
    for name, title, seed, display in displays:
        yield f"reliability-{name}", display.figure(), f"{title}, seed {seed}"


def drawn(campaign: Campaign, name: str) -> bool:
    """Return whether a variation has curves of its own: a main one with runs of its own."""
    variation = campaign.variation(name)
    return variation.role == "main" and variation.of is None


def _heat_maps(results: Results, pictures: Pictures) -> list[dict[str, str]]:
    """Draw studies that vary several arguments: the two with the most values, a map for each value of the rest."""
    studies: dict[Setting, list[Setting]] = {}
    for setting in results.settings():
        if len(setting.settings) >= 2:
            studies.setdefault(setting.plain, []).append(setting)
    found = []
    kinds = [(results.campaign.quality[0], results.campaign.quality[0]), ("ece_15", "ECE-15")]
    for settings in studies.values():
        values: dict[str, set[str]] = {}
        for setting in settings:
            for name, value in setting.settings:
                values.setdefault(name, set()).add(value)
        if sum(len(of_one) > 1 for of_one in values.values()) < 2:
            continue  # a single row of cells reads better as a table
        axes = sorted(values, key=lambda name: (-len(values[name]), name))[:2]
        rest: dict[tuple[Any, ...], list[Setting]] = {}
        for setting in settings:
            rest.setdefault(tuple((n, v) for n, v in setting.settings if n not in axes), []).append(setting)
        for others, part in rest.items():
            for name in results.variations(part[0]):
                for metric, label in kinds:
                    words = ", ".join(f"{n} {v}" for n, v in others)
                    figure = charts.heat_map(results, part, name, metric, label, (axes[0], axes[1]))
                    caption = "; ".join(x for x in (tables.describe(results, part[0].plain), words) if x)
                    slug = f"grid-{part[0].study}-{part[0].size}-{part[0].data}-{name}-{metric}-{words}"
                    found += pictures.add(slug, figure, caption)
    return found
