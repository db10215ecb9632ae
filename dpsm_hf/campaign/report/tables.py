"""The tables of a campaign's report, as rows of cells that HTML and Markdown both show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...statistics import (
    DocumentBins,
    DocumentMeans,
    PairedComparison,
    approximate_randomization,
    holm,
    paired_bootstrap,
    paired_difference,
    summarize,
)
from ..runner.records import Record
from ..spec.design import Setting
from ..verdict.results import Results

ALPHA = 0.05
#: If the reference's own speed varies by more than this share, the table carries a warning.
_UNSTEADY = 0.05
# Of runs that the same command takes up again.
_UNFINISHED = ("interrupted", "paused", "running")
#: Random sets of swaps, and resamples, of the tests over documents.
SAMPLES = 2000


@dataclass(frozen=True)
class Column:
    """A figure of the tables; ``metric``, ``scaled`` and ``split`` are those of `Results.value`."""

    metric: str
    label: str
    better: int = -1  # 1 where more is better, -1 where less is, 0 where neither is
    decimals: int = 4
    scale: float = 1.0  # factor between the stored and the shown value
    scaled: bool | None = None
    split: str | None = None

    @property
    def heading(self) -> str:
        """Return the label with an arrow to the better side."""
        return f"{self.label} {('', '↑', '↓')[self.better]}".rstrip()

    def show(self, value: float) -> str:
        """Format a value."""
        if not math.isfinite(value):
            return "never" if value > 0 else str(value)
        return f"{value * self.scale:,.{self.decimals}f}"


@dataclass(frozen=True)
class Cell:
    """Text, and ``best`` as its state where it is the best of its column."""

    text: str
    state: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the row's name first, with headings, a caption above and notes below."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=list)


def as_text(table: Table) -> str:
    """Lay a table out for a terminal without its notes, the best of each column marked with ``*``."""
    rows = [[table.headings[0], *(f"{heading} " for heading in table.headings[1:])]]
    # The marks of the best hang outside the columns, so that the digits stay in line with the headings.
    for name, *cells in table.rows:
        rows.append([name.text, *(f"{cell.text}{'*' if cell.state == 'best' else ' '}" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    ]
    return "\n".join([table.caption, "-" * len(lines[0]), *(line.rstrip() for line in lines)])


_PERPLEXITY = Column("perplexity", "perplexity", decimals=2)
QUALITY = {
    "language-modelling": (_PERPLEXITY, Column("nll", "NLL"), Column("token_accuracy", "accuracy, %", 1, 2, 100.0)),
    "summarization": (
        *(Column(f"rouge{kind}", f"ROUGE-{kind}", 1, 2) for kind in ("1", "2", "L", "Lsum")),
        Column("bertscore_f1", "BERTScore", 1, 2, 100.0),
        _PERPLEXITY,
    ),
}
# What a page shows of a wide table at first.
_KEY = ("rougeL", "rougeLsum", "perplexity", "token_accuracy", "brier", "ece_15", "signed_gap")
_BINS = tuple(Column(f"ece_{bins}", f"ECE-{bins}") for bins in (10, 15, 100))
CALIBRATION = (
    Column("brier", "Brier"), Column("spherical", "spherical"), *_BINS, Column("signed_gap", "signed gap", 0),
    Column("expected_depth", "depth", 0, 2),
)  # fmt: skip
AFTER = (
    Column("temperature", "T", 0, 3, scaled=True),
    *(
        replace(column, label=f"{column.label}, scaled", scaled=True)
        for column in (_PERPLEXITY, CALIBRATION[0], *_BINS)
    ),
)
EFFICIENCY = (
    Column("tokens_per_second", "tokens/s", 1, 0),
    Column("train_seconds", "training, s", decimals=1),
    Column("seconds_to_quality", "s to 95 % of CE", decimals=1),
    Column("steps_to_quality", "steps to it", decimals=0),
    Column("peak_memory_mb", "peak memory, MB", decimals=0),
    Column("peak_device_memory_mb", "peak GPU memory, MB", decimals=0),
    Column("flops_per_step", "GFLOP a step", 0, 2, 1e-9),
    Column("energy_joules", "energy, J", decimals=0),
)


def key_first(columns: Sequence[Column]) -> tuple[Column, ...]:
    """Put the columns that matter most first: a page shows them at once and the others on demand."""
    return tuple(sorted(columns, key=lambda column: column.metric not in _KEY))


def comparison(
    results: Results,
    setting: Setting,
    columns: Sequence[Column],
    caption: str,
    tested: bool = True,
    leading: Callable[[Sequence[str], Column], set[str]] | None = None,
) -> Table:
    """Compare all variations of a setting: mean ± sd over the seeds, stars of the paired t-test against the reference.

    The stars are those of each test alone; a dagger marks what is still below .05 after Holm's correction over the
    variations of the column. Columns and variations without any figure are left out, and where every column is one
    after temperature scaling those that only read another's runs so. Without ``tested`` nothing is starred. What is
    marked as best is what ``leading`` names of a column: by default the variation whose difference from each other
    one has an interval on the better side of 0, without ``tested`` nothing.
    """
    names = results.variations(setting)
    if all(column.scaled for column in columns):
        names = [name for name in names if results.campaign.variation(name).of is None]
    shown = [c for c in columns if any(_values(results, setting, name, c) for name in names)]
    stars = {c: _tests(results, setting, names, c) if tested else {} for c in shown}
    if leading is None and tested:
        leading = partial(_best, results, setting)
    best: dict[Column, set[str]] = {c: leading(names, c) if leading is not None else set() for c in shown}

    def cell(name: str, column: Column) -> Cell:
        values = _values(results, setting, name, column)
        text = _mean(column, values) + stars[column].get(name, "") + _part(results, setting, name, values)
        return Cell(text, "best" if name in best[column] else "")

    rows = _rows({name: results.title(name) for name in names}, shown, cell)
    notes = _status_notes(results, setting, names)
    return Table(f"{caption}: {describe(results, setting)}", _headings(shown), rows, notes)


def cost(results: Results, setting: Setting) -> Table:
    """Show what training cost: figures without tests; the claims test throughput and memory.

    Seconds and memory depend on what else the machine did, and the memory of a run that was paused at a rung on its
    having been several processes: neither stars nor a best one would tell of the losses.
    """
    made = comparison(results, setting, EFFICIENCY, "Cost of training", tested=False)
    notes = list(made.notes)
    speed = summarize(list(_finite(_values(results, setting, results.campaign.reference, EFFICIENCY[0])).values()))
    if speed.mean > 0 and speed.sd / speed.mean > _UNSTEADY:
        notes.append(
            f"Cross-entropy's own tokens/s vary by {100 * speed.sd / speed.mean:.0f} % (sd) between seeds: the "
            "machine was not idle, or too small for statements about 2 %."
        )
    records = {name: map(results.record, results.points(setting, name)) for name in results.variations(setting)}
    paused = [name for name, found in records.items() if any(r is not None and len(r.attempts) > 1 for r in found)]
    if paused:
        titles = "; ".join(map(results.title, paused))
        notes.append(f"In several processes, each with its own peak memory, of which the largest counts: {titles}.")
    return replace(made, notes=notes)


def differences(results: Results, columns: Sequence[Column], main: str = "main") -> list[Table]:
    """Show every other study's figures and their difference from clean cross-entropy of the same seed.

    "Clean" is the reference in the main study, of the same size and data where it has them, else in its first setting.
    A table for each study, size and data; what the study varies stands with the variation.
    """
    blocks: dict[Setting, list[Setting]] = {}
    for setting in results.settings():
        if setting.study != main:
            blocks.setdefault(setting.plain, []).append(setting)
    tables = []
    for plain, settings in blocks.items():
        place = describe(results, plain if len(settings) > 1 else settings[0])
        base = _clean_setting(results, plain, main)
        alike = base is None or (base.size, base.data) == (plain.size, plain.data)
        where = "" if alike or base is None else f" of {describe(results, base)}"
        caption = (
            f"{place}: the figure, and in brackets its mean difference from clean cross-entropy{where}, same seed"
        )
        rows, notes = [], []
        for setting in settings:
            rows += _compared(results, setting, base, columns, len(settings) > 1)
            notes += _status_notes(results, setting, results.variations(setting))
        tables.append(Table(caption, _headings(columns), rows, notes))
    return tables


def _compared(
    results: Results, setting: Setting, base: Setting | None, columns: Sequence[Column], named: bool
) -> list[list[Cell]]:
    """Return the rows of a setting beside clean cross-entropy, with what the study varies in the names if wanted."""

    def cell(name: str, column: Column) -> Cell:
        ours = _values(results, setting, name, column)
        theirs = {} if base is None else _values(results, base, results.campaign.reference, column)
        gaps = [ours[s] - theirs[s] for s in ours if s in theirs]
        text = _mean(column, ours) + _part(results, setting, name, ours)
        if gaps and np.isfinite(gaps).all():
            text += f" ({column.scale * float(np.mean(gaps)):+,.{column.decimals}f})"
        return Cell(text)

    varied = [f"{name} {value}" for name, value in setting.settings] if named else []
    titles = {name: results.title(name) for name in results.variations(setting)}
    return _rows(
        {n: f"{title}, {', '.join(varied)}" if varied else title for n, title in titles.items()}, columns, cell
    )


def out_of_domain(results: Results, setting: Setting, columns: Sequence[Column]) -> list[Table]:
    """Compare the variations on each further evaluation set of a setting's runs."""
    splits: dict[str, None] = {}
    for name in results.variations(setting):
        for record in map(results.record, results.points(setting, name)):
            splits |= dict.fromkeys(record.metrics.get(results.checkpoint, {}) if record is not None else ())
    caption = "Out of domain, {} (the temperature is that of the calibration split in the domain)"
    return [
        comparison(results, setting, [replace(column, split=split) for column in columns], caption.format(split))
        for split in splits
        if split not in ("validation", "test", "calibration", "train")
    ]


def spread(results: Results, setting: Setting, columns: Sequence[Column]) -> Table:
    """Show the standard deviation over seeds, and as a multiple of the reference's over the same seeds."""

    def cell(name: str, column: Column) -> Cell:
        ours, theirs = (_finite(_values(results, setting, n, column)) for n in (name, results.campaign.reference))
        own = summarize(list(ours.values())).sd
        if math.isnan(own):
            return Cell("–")
        base = summarize([theirs[seed] for seed in ours]).sd if set(ours) <= set(theirs) else math.nan
        multiple = f" ({own / base:.2f} ×)" if base > 0 else ""
        return Cell(f"{own * column.scale:.{column.decimals + 1}f}{multiple}{_part(results, setting, name, ours)}")

    rows = _rows({name: results.title(name) for name in results.variations(setting)}, columns, cell)
    caption = f"Standard deviation over seeds, and as a multiple of cross-entropy's: {describe(results, setting)}"
    return Table(caption, _headings(columns), rows)


def stopped_early(results: Results) -> Table | None:
    """List the ablations that were stopped early: for each seed the step and the figure that decided; None if none."""
    found: dict[str, tuple[str, str, int, Record]] = {}
    for point in results.campaign.points:
        record = results.record(point)
        if record is not None and record.status == "pruned":  # a run that several studies share is listed once
            where = describe(results, point.setting)
            found.setdefault(point.run_id, (results.title(point.variation), where, point.seed, record))
    if not found:
        return None
    several = len({where for _, where, _, _ in found.values()}) > 1
    seeds = sorted({seed for _, _, seed, _ in found.values()})
    cells: dict[str, dict[int, str]] = {}
    for title, where, seed, record in found.values():
        cells.setdefault(f"{title}; {where}" if several else title, {})[seed] = _why(record)
    rows = [[Cell(name), *(Cell(by_seed.get(seed, "–")) for seed in seeds)] for name, by_seed in cells.items()]
    decided = [record.decision for *_, record in found.values()]
    notes = [f"{rule[:1].upper()}{rule[1:]}." for rule in dict.fromkeys(d["rule"] for d in decided if "rule" in d)]
    if any(d.get("kind") == "halving" for d in decided):
        notes.append("A mean over the seeds of an ablation that were not stopped is one over those that did better.")
    return Table("Stopped early by the budget's rule", ["", *(f"seed {seed}" for seed in seeds)], rows, notes)


def _why(record: Record) -> str:
    decided: Mapping[str, Any] = record.decision
    if decided.get("kind") == "halving":
        figures = decided["figures"]
        limit = max((figures[name] for name in decided["kept"] if figures[name] is not None), default=None)
        own, most = ("not finite" if v is None else f"{v:.5g}" for v in (figures.get(record.name), limit))
        return f"step {decided['step']}: {own} ({len(decided['kept'])} of {len(figures)} went on, up to {most})"
    if decided.get("kind") == "limit":
        return f"no time left for its {decided['needed_seconds']:,.0f} s"
    return record.message


def _clean_setting(results: Results, setting: Setting, main: str) -> Setting | None:
    """Return the main study's setting of the same size and data, else its first one; None without a main study."""
    settings = results.settings(main)
    same = [s for s in settings if (s.size, s.data) == (setting.size, setting.data)]
    return next(iter(same or settings), None)


def describe(results: Results, setting: Setting) -> str:
    """Return a setting in the words of the campaign's file."""
    names = {"study": setting.study, "size": setting.size, "data": setting.data}
    words = [results.campaign.titles.get(kind, {}).get(name, name) for kind, name in names.items()]
    return "; ".join([*words, *(f"{name} {value}" for name, value in setting.settings)])


def _headings(columns: Sequence[Column]) -> list[str]:
    return ["", *(column.heading for column in columns)]


def _rows(
    titles: Mapping[str, str], columns: Sequence[Column], cell: Callable[[str, Column], Cell]
) -> list[list[Cell]]:
    """Return a row for each name that has a figure in any column."""
    rows = [[Cell(title), *(cell(name, column) for column in columns)] for name, title in titles.items()]
    return [row for row in rows if any(cell.text != "–" for cell in row[1:])]


def _values(results: Results, setting: Setting, name: str, column: Column) -> dict[int, float]:
    return results.values(setting, name, column.metric, scaled=column.scaled, split=column.split)


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _part(results: Results, setting: Setting, name: str, values: Mapping[int, float]) -> str:
    """Say of how many seeds a figure is where some are missing."""
    planned = len(results.points(setting, name))
    return f" ({len(values)} of {planned})" if 0 < len(values) < planned else ""


def _mean(column: Column, by_seed: Mapping[int, float]) -> str:
    values = list(by_seed.values())
    if not values:
        return "–"
    if not np.isfinite(values).all():
        return column.show(math.inf) if np.isinf(values).all() else "some never"
    found = summarize(values)
    if math.isnan(found.sd):
        return column.show(found.mean)
    return f"{column.show(found.mean)} ± {found.sd * column.scale:,.{column.decimals}f}"


def _best(results: Results, setting: Setting, names: Sequence[str], column: Column) -> set[str]:
    """Name the variation that is better than each other one; none where an interval of a difference does not say so.

    Compared are the variations with all seeds (the missing ones may be the bad ones), by the 95 % intervals of
    `paired_difference`: the best mean alone may be the best by chance.
    """
    means = {}
    for name in names:
        values = list(_values(results, setting, name, column).values())
        if values and len(values) == len(results.points(setting, name)) and np.isfinite(values).all():
            means[name] = float(np.mean(values))
    if not column.better or len(means) < 2:
        return set()
    top = max(means, key=lambda name: column.better * means[name])
    others = [name for name in means if name != top]
    shown = {name: round(means[name] * column.scale, column.decimals) for name in means}
    alike = any(shown[name] == shown[top] for name in others)
    return set() if alike or not all(_surpasses(results, setting, top, name, column) for name in others) else {top}


def _surpasses(results: Results, setting: Setting, name: str, other: str, column: Column) -> bool:
    """Return whether the 95 % interval of the difference from another variation is on the better side of 0."""
    pairs = results.pairs(setting, name, other, column.metric, scaled=column.scaled, split=column.split)
    if pairs.missing or len(pairs.seeds) < 2:
        return False
    interval = paired_difference(pairs.ours, pairs.theirs).interval  # NaN where the differences have no spread
    return interval.low > 0 if column.better > 0 else interval.high < 0


def _tests(results: Results, setting: Setting, names: Sequence[str], column: Column) -> dict[str, str]:
    """Return each variation's mark: stars of its paired t-test, and a dagger where it survives Holm's correction."""
    reference = results.campaign.reference
    found: dict[str, PairedComparison | None] = {}
    for name in names:
        if name != reference:
            pairs = results.pairs(setting, name, reference, column.metric, scaled=column.scaled, split=column.split)
            whole = len(pairs.seeds) >= 2 and np.isfinite(pairs.ours).all() and np.isfinite(pairs.theirs).all()
            found[name] = paired_difference(pairs.ours, pairs.theirs) if whole else None
    if not found:
        return {}
    adjusted = holm([None if test is None or math.isnan(test.p_value) else test.p_value for test in found.values()])
    marks = {}
    for (name, test), p in zip(found.items(), adjusted, strict=True):
        stars = "" if test is None or math.isnan(test.p_value) else test.stars  # no test without a spread
        marks[name] = (f" {stars}" if stars else "") + ("†" if p <= ALPHA else "")
    return marks


def _status_notes(results: Results, setting: Setting, names: Sequence[str]) -> list[str]:
    seeds: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for point in results.points(setting, name):
            record = results.record(point)
            # those stopped early have a table of their own, those that go on a list (`missing_runs`)
            if record is None or record.status in ("ok", "pruned", *_UNFINISHED):
                continue
            what = f"{record.status}: {record.message}" if record.message else record.status
            seeds.setdefault((results.title(name), what), []).append(str(point.seed))
    return [f"{title}, seed {', '.join(found)}: {what}" for (title, what), found in seeds.items()]


def missing_runs(results: Results) -> list[str]:
    """Name the runs that have no record yet, or none that ended, once each."""
    found = {}
    for point in results.campaign.points:
        record = results.record(point)
        if record is None or record.status in _UNFINISHED:
            what = "not run yet" if record is None else record.status
            place = describe(results, point.setting)
            found[point.run_id] = f"{point.variation}, seed {point.seed}, {place}: {what}"
    return list(found.values())


# ---- by documents --------------------------------------------------------------------------------------------------


def document_table(results: Results, setting: Setting, directory: Path) -> Table | None:
    """Compare each variation with the reference by blocks of the test documents, over the seeds that both have.

    The interval is of the difference of perplexity and of ECE-15 (paired bootstrap over blocks, 95 %), the p-value of
    approximate randomisation. Both speak of other documents, not of other seeds. The sums by block lie in the folders
    of the runs below ``directory``; None where fewer than two variations have them of the same documents.
    """
    least = 1.5 / (SAMPLES + 1)  # the smallest p-value that so many samples can give is 1 / (SAMPLES + 1)
    base = _sums(results, setting, results.campaign.reference, directory)
    rows = []
    for name in results.variations(setting):
        if name == results.campaign.reference:
            continue
        own = _sums(results, setting, name, directory)
        suffix = "_scaled" if any(p.scaled for p in results.points(setting, name)) else ""
        seeds = [s for s in own if s in base and _same_documents(own[s], base[s])]
        seeds = [s for s in seeds if f"count{suffix}" in own[s]]  # no scaled sums where no temperature could be fitted
        if not seeds:
            continue
        cells = [Cell(results.title(name)), Cell(str(len(seeds)))]
        for kind, decimals in (("perplexity", 2), ("ece", 4)):
            ours, theirs = (
                _documents([found[s] for s in seeds], kind, end) for found, end in ((own, suffix), (base, ""))
            )
            interval = paired_bootstrap(ours, theirs, samples=SAMPLES)
            p_value = approximate_randomization(ours, theirs, samples=SAMPLES).p_value
            low, high = interval.interval
            bounds = "" if math.isnan(low) else f" [{low:+.{decimals}f}, {high:+.{decimals}f}]"
            cells.append(Cell(f"{interval.estimate:+.{decimals}f}{bounds}"))
            cells.append(Cell(f"{'≤ ' if p_value < least else ''}{p_value:.4f}"))
        rows.append(cells)
    caption = f"By documents, difference from cross-entropy with its 95 % interval: {describe(results, setting)}"
    note = (
        f"Paired bootstrap and approximate randomisation ({SAMPLES:,} each) over blocks of test documents. They "
        "say what other documents would show; what other seeds would, the tables above say. The p-values are not "
        "corrected. An interval of ECE is too wide where two systems are nearly the same, and may then hold 0 "
        "beside a small p."
    )
    return Table(caption, ["", "seeds", "perplexity", "p", "ECE-15", "p"], rows, [note]) if rows else None


def _sums(results: Results, setting: Setting, name: str, directory: Path) -> dict[int, Mapping[str, np.ndarray]]:
    found: dict[int, Mapping[str, np.ndarray]] = {}
    for point in results.points(setting, name):
        record = results.record(point)
        if record is None or record.status != "ok":
            continue
        path = record.documents.get(f"{results.checkpoint}-{results.split}")
        file = directory / "runs" / record.run_id / path if path else None
        if file is not None and file.exists():
            with np.load(file) as arrays:
                found[point.seed] = {key: arrays[key] for key in arrays.files}
    return found


def _same_documents(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Return whether two runs were evaluated on the same rows: labels in the same order, and the same blocks."""
    labels = [str(found["labels"]) for found in (ours, theirs) if "labels" in found]
    return len(labels) == 2 and bool(labels[0]) and labels[0] == labels[1]


def _documents(runs: list[Mapping[str, np.ndarray]], kind: str, suffix: str) -> DocumentMeans | DocumentBins:
    def stacked(name: str) -> np.ndarray:
        return np.stack([run[f"{name}{suffix}"] for run in runs])

    if kind == "ece":
        return DocumentBins(stacked("count"), stacked("correct"), stacked("confidence"))
    return DocumentMeans(stacked("nll"), stacked("count").sum(-1), exponentiate=True)
