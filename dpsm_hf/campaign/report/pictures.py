"""The pictures of a campaign's report (matplotlib, never pyplot), and how templates and pictures become a page."""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from ...plots.figures import empty_figure, plain_log_axis, run_styles, save_figure
from ...plots.reliability import ReliabilityDisplay
from ..spec.design import Campaign, Setting
from ..verdict.results import Results, series
from . import tables

#: Log key, axis, caption, logarithmic.
Curve: TypeAlias = tuple[str, str, str, bool]
Names: TypeAlias = Callable[[Setting], list[str]]

_CURVES = (
    ("eval_perplexity", "perplexity, validation", "Perplexity on the validation split", True),
    ("eval_rougeL", "ROUGE-L, validation", "ROUGE-L on the validation split", False),
    ("eval_ece_15", "ECE-15, validation", "Calibration error on the validation split, 15 bins, top-label", True),
    ("eval_brier", "Brier score, validation", "Brier score on the validation split", False),
)
_SCHEDULE = (
    ("alpha", "α (weight of the Brier score)", "α: 0 is pure cross-entropy, 1 is pure Brier score", False),
    ("grad_norm", "gradient norm", "Norm of the gradient before clipping", True),
    ("grad_norm_ce", "norm of cross-entropy's gradient", "The gradient that cross-entropy would have alone", True),
    ("grad_norm_brier", "norm of Brier's gradient", "The gradient that the Brier score would have alone", True),
)
#: What a line in the titles of reliability diagrams means.
NULL_ECE = '"Perfectly calibrated": the ECE that such a model would show on so many tokens, by chance alone.'
#: Points of the common axis on which the curves of several seeds are averaged.
_GRID = 60
_LONGEST_NAME = 100  # of a file, in characters


def render(template: str, path: Path, **context: Any) -> Path:
    """Fill in a template of ``dpsm_hf/templates``, with escapes in HTML, write it to a file and return that."""
    html = template.endswith(".html.j2")
    environment = Environment(loader=PackageLoader("dpsm_hf"), autoescape=html, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _markdown_cell, "quoted": _markdown_quote, "parted": _parted}
    path.write_text(environment.get_template(template).render(**context), encoding="utf-8")
    return path


def _markdown_cell(text: str) -> str:
    """Return text of a campaign's file or a record as one line that stands for itself, in a table or a title."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(str(text).split()))


def _parted(text: str) -> tuple[str, str]:
    """Part a table's figure from what stands in brackets behind it: an interval, a difference, how many seeds."""
    figure, bracket, aside = re.fullmatch(r"(.*?)(?: ([(\[])(.*))?", text, re.DOTALL).groups("")  # type: ignore[union-attr]
    return figure, f"{bracket}{aside}"


def _markdown_quote(text: str) -> str:
    """Return a text of a model between fences that are longer than any in it."""
    fence = "`" * max(4, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.strip()}\n{fence}"


def sections(*made: tuple[str, str, list[dict[str, str]]]) -> list[dict[str, Any]]:
    """Return sections as the templates want them (title, text, pictures), without those that have no picture."""
    return [{"title": title, "text": text, "pictures": found} for title, text, found in made if found]


class Pictures:
    """Saves each figure as PNG beside the page and hands it to the page as an inlined SVG.

    The files of an earlier page in the folder are deleted, for its variations may be gone.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths: list[Path] = []
        for path in directory.glob("*.png"):
            path.unlink()

    def add(self, name: str, figure: Figure | None, caption: str) -> list[dict[str, str]]:
        """Save a figure in a file of this name, and return it with its caption in a list; an empty one for None."""
        if figure is None:
            return []
        name = re.sub(r"[^\w.-]+", "_", name)
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
        self.paths.append(save_figure(figure, self.directory / f"{name}.png", dpi=110))
        vector = save_figure(figure, self.directory / f"{name}.svg")
        data = base64.b64encode(vector.read_bytes()).decode("ascii")
        vector.unlink()
        return [{"data": f"data:image/svg+xml;base64,{data}", "caption": caption, "png": f"plots/{name}.png"}]


# ---- what is drawn, of whom ----------------------------------------------------------------------------------------


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
    fronts: list[dict[str, str]] = []
    reliability: list[dict[str, str]] = []
    for prefix, setting in places:
        front = pareto(results, setting, metric, label)
        fronts += pictures.add(f"{prefix}pareto", front, tables.describe(results, setting))
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
            "Each variation before and after temperature scaling: means and standard deviations over seeds. The "
            "dashed line joins the means that no other mean surpasses in both; means over a part of the seeds are "
            "left out of it.",
            fronts,
        ),
        (
            "Reliability",
            f"Below the diagonal a model is overconfident. Token-level, top-label, {results.split} split, first seed. "
            f"{NULL_ECE}",
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
        figure = learning_curves(results, setting, names, key, axis, x, log)
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
    styles = {results.title(name): style for name, style in _styles(results).items()}
    if len(displays) > 1:
        together = ReliabilityDisplay.overlay([display for *_, display in displays]).styled(styles).figure()
        caption = "All together; below, the distribution of confidence"
        found += pictures.add(f"{prefix}reliability-all", together, caption)
    for name, title, seed, display in displays:
        found += pictures.add(f"{prefix}reliability-{name}", display.styled(styles).figure(), f"{title}, seed {seed}")
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
    quality = results.campaign.quality[0]
    metrics = {quality: quality.replace("rouge", "ROUGE-"), "ece_15": "ECE-15"}
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
                    figure = heat_map(results, part, name, metric, label, (column, row))
                    caption = "; ".join(words for words in (tables.describe(results, plain), others) if words)
                    file = f"grid-{plain.study}-{plain.size}-{plain.data}-{name}-{metric}-{others}"
                    found += pictures.add(file, figure, caption)
    return found


# ---- how it is drawn -----------------------------------------------------------------------------------------------


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
        places, values = _together(curves)
        title = results.title(name)
        if lost is not None:
            title += f" (not finite from step {lost:g})"
            ax.scatter(places[-1], values[0, -1], s=120, marker="x", color=style["color"], linewidths=2.5)
        ax.plot(places, values.mean(0), label=title, lw=1.6, ms=5, markevery=max(1, len(places) // 8), **style)
        if len(values) > 1:
            ax.fill_between(places, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)
    if not ax.lines:
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
    """Give each variation the same style in all pictures: the first of each loss that loss's own."""
    own = [v for v in results.campaign.variations if v.of is None]
    first: dict[str, str] = {}
    for variation in own:
        first.setdefault(str(variation.arguments.get("scoring_rule")), variation.name)
    known = {name: loss for loss, name in first.items() if loss in ("ce", "brier", "dpsm", "focal", "spherical")}
    return dict(zip((v.name for v in own), run_styles([known.get(v.name, f"{v.name} ") for v in own]), strict=True))


def colours(results: Results) -> dict[str, tuple[str, bool]]:
    """Return the colour of each variation by title, and whether it is another's that it only reads."""
    styles = _styles(results)
    return {v.title: (styles[v.of or v.name]["color"], v.of is not None) for v in results.campaign.variations}


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
