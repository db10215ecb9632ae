"""The tables of a campaign's report, as rows of cells that HTML and Markdown both show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...statistics import holm, paired_difference, summarize
from ..runner.records import Record
from ..verdict.results import Results, Setting, setting_of

ALPHA = 0.05
#: If the reference's own speed varies by more than this share, the table carries a warning.
_UNSTEADY = 0.05


@dataclass(frozen=True)
class Column:
    """A figure of the tables.

    Args:
        metric: see `Results.value`.
        label: heading.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        decimals: digits after the point.
        scale: factor between the stored and the shown value.
        scaled: the figure after temperature scaling; None as the variation reads it.
        split: of the evaluation; None is the campaign's.
    """

    metric: str
    label: str
    better: int = -1
    decimals: int = 4
    scale: float = 1.0
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
    """Text and its state: ``best``, ``bad`` (worse than the reference, and tested) or nothing."""

    text: str
    state: str = ""


@dataclass(frozen=True)
class Table:
    """Rows with a caption.

    Args:
        caption: what it is.
        headings: of the columns, the first one's included.
        rows: cells, the row's name first.
        notes: below it.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=list)


def as_text(table: Table) -> str:
    """Lay a table out for a terminal, its caption above it, the best of each column marked with ``*``.

    Args:
        table: the table; its notes are left out.
    """
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


QUALITY = {
    "language-modelling": (
        Column("perplexity", "perplexity", decimals=2),
        Column("nll", "NLL"),
        Column("token_accuracy", "accuracy, %", 1, 2, 100.0),
    ),
    "summarization": (
        Column("rouge1", "ROUGE-1", 1, 2),
        Column("rouge2", "ROUGE-2", 1, 2),
        Column("rougeL", "ROUGE-L", 1, 2),
        Column("rougeLsum", "ROUGE-Lsum", 1, 2),
        Column("bertscore_f1", "BERTScore", 1, 2, 100.0),
        Column("perplexity", "perplexity", decimals=2),
    ),
}
CALIBRATION = (
    Column("brier", "Brier"),
    Column("spherical", "spherical"),
    Column("ece_10", "ECE-10"),
    Column("ece_15", "ECE-15"),
    Column("ece_100", "ECE-100"),
    Column("signed_gap", "signed gap", 0),
    Column("expected_depth", "depth", 0, 2),
)
AFTER = tuple(
    Column(metric, f"{label}, scaled", better, decimals, scaled=True)
    for metric, label, better, decimals in (
        ("temperature", "T", 0, 3), ("perplexity", "perplexity", -1, 2), ("brier", "Brier", -1, 4),
        ("ece_10", "ECE-10", -1, 4), ("ece_15", "ECE-15", -1, 4), ("ece_100", "ECE-100", -1, 4),
    )
)  # fmt: skip
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


def comparison(
    results: Results, setting: Setting, columns: Sequence[Column], caption: str, tested: bool = True
) -> Table:
    """Compare all variations of a setting: mean ± sd over the seeds, stars of the paired t-test against the reference.

    The stars are those of each test alone; a dagger marks what is still below .05 after Holm's correction over the
    variations of the column. Columns and variations without any figure are left out, and where every column is one
    after temperature scaling those that only read another's runs so. Without ``tested`` nothing is starred or marked.
    """
    reference = results.campaign.reference
    names = results.variations(setting)
    if all(column.scaled for column in columns):
        names = [name for name in names if results.campaign.variation(name).of is None]
    shown = [c for c in columns if any(_values(results, setting, name, c) for name in names)]
    stars = {c: _tests(results, setting, names, reference, c) if tested else {} for c in shown}
    best = {c: _best(results, setting, names, c) if tested else set() for c in shown}
    rows = []
    for name in names:
        cells = [Cell(results.campaign.variation(name).title)]
        for column in shown:
            values = list(_values(results, setting, name, column).values())
            planned = len(results.points(setting, name))
            text = _mean(column, values) + stars[column].get(name, "")
            if 0 < len(values) < planned:
                text += f" ({len(values)} of {planned})"
            cells.append(Cell(text, "best" if name in best[column] else ""))
        rows.append(cells)
    notes = _status_notes(results, setting, names)
    return Table(f"{caption}: {describe(results, setting)}", ["", *(c.heading for c in shown)], _filled(rows), notes)


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
    paused = [
        name
        for name in results.variations(setting)
        if any((r := results.record(p)) is not None and len(r.attempts) > 1 for p in results.points(setting, name))
    ]
    if paused:
        titles = "; ".join(results.campaign.variation(name).title for name in paused)
        notes.append(f"In several processes, each with its own peak memory, of which the largest counts: {titles}.")
    return replace(made, notes=notes)


def differences(results: Results, columns: Sequence[Column], main: str = "main") -> list[Table]:
    """Show every other study's figures and their difference from clean cross-entropy of the same seed.

    "Clean" is the reference in the main study, of the same size and data where it has them, else in its first setting.
    A table for each study, size and data; what the study varies stands with the variation.
    """
    blocks: dict[str, list[Sequence[Cell]]] = {}
    bases: dict[str, str] = {}
    notes_of: dict[str, list[str]] = {}
    for setting in results.settings():
        if setting.study == main:
            continue
        base = clean_setting(results, setting, main)
        several = len({s for s in results.settings(setting.study) if s.plain == setting.plain}) > 1
        place = describe(results, setting.plain if several else setting)
        rows = blocks.setdefault(place, [])
        alike = base is None or (base.size, base.data) == (setting.size, setting.data)
        where = "" if alike or base is None else f" of {describe(results, base)}"
        bases[place] = f"clean cross-entropy{where}, same seed"
        notes_of.setdefault(place, []).extend(_status_notes(results, setting, results.variations(setting)))
        varied = ", ".join(f"{name} {value}" for name, value in setting.settings) if several else ""
        for name in results.variations(setting):
            title = results.campaign.variation(name).title
            cells = [Cell(f"{title}, {varied}" if varied else title)]
            for column in columns:
                ours = _values(results, setting, name, column)
                theirs = {} if base is None else _values(results, base, results.campaign.reference, column)
                gaps = [ours[s] - theirs[s] for s in ours if s in theirs]
                text = _mean(column, list(ours.values()))
                planned = len(results.points(setting, name))
                if 0 < len(ours) < planned:
                    text += f" ({len(ours)} of {planned})"
                if gaps and np.isfinite(gaps).all():
                    text += f" ({column.scale * float(np.mean(gaps)):+,.{column.decimals}f})"
                cells.append(Cell(text))
            rows.append(cells)
    headings = ["", *(c.heading for c in columns)]
    return [
        Table(
            f"{place}: the figure, and in brackets its mean difference from {bases[place]}",
            headings,
            _filled(rows),
            notes_of[place],
        )
        for place, rows in blocks.items()
    ]


def out_of_domain(results: Results, setting: Setting, columns: Sequence[Column]) -> list[Table]:
    """Compare the variations on each further evaluation set of a setting's runs."""
    splits: dict[str, None] = {}
    for name in results.variations(setting):
        for point in results.points(setting, name):
            record = results.record(point)
            for split in record.metrics.get(results.checkpoint, {}) if record is not None else {}:
                if split not in ("validation", "test", "calibration", "train"):
                    splits.setdefault(split)
    return [
        comparison(
            results,
            setting,
            [Column(c.metric, c.label, c.better, c.decimals, c.scale, c.scaled, split) for c in columns],
            f"Out of domain, {split} (the temperature is that of the calibration split in the domain)",
        )
        for split in splits
    ]


def spread(results: Results, setting: Setting, columns: Sequence[Column]) -> Table | None:
    """Show the standard deviation over seeds, and as a multiple of the reference's over the same seeds."""
    names = results.variations(setting)
    reference = results.campaign.reference
    rows = []
    for name in names:
        cells = [Cell(results.campaign.variation(name).title)]
        for column in columns:
            ours, theirs = (_finite(_values(results, setting, n, column)) for n in (name, reference))
            own = summarize(list(ours.values())).sd
            base = summarize([theirs[seed] for seed in ours]).sd if set(ours) <= set(theirs) else math.nan
            text = "–" if math.isnan(own) else f"{own * column.scale:.{column.decimals + 1}f}"
            if not math.isnan(own) and base > 0:
                text += f" ({own / base:.2f} ×)"
            if not math.isnan(own) and len(ours) < (planned := len(results.points(setting, name))):
                text += f" ({len(ours)} of {planned})"
            cells.append(Cell(text))
        rows.append(cells)
    filled = _filled(rows)
    if not filled:
        return None
    caption = f"Standard deviation over seeds, and as a multiple of cross-entropy's: {describe(results, setting)}"
    return Table(caption, ["", *(c.heading for c in columns)], filled)


def stopped_early(results: Results) -> Table | None:
    """List the ablations that were stopped early: for each seed the step and the figure that decided; None if none.

    Args:
        results: of the campaign.
    """
    found: dict[str, tuple[str, str, int, Record]] = {}
    for point in results.campaign.points:
        record = results.record(point)
        if record is not None and record.status == "pruned":  # a run that several studies share is listed once
            title = results.campaign.variation(point.variation).title
            found.setdefault(point.run_id, (title, describe(results, setting_of(point)), point.seed, record))
    if not found:
        return None
    settings = list(dict.fromkeys(setting for _, setting, _, _ in found.values()))
    seeds = sorted({seed for _, _, seed, _ in found.values()})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for title, setting, seed, record in found.values():
        cells.setdefault((title, setting), {})[seed] = _why(record)
    rows = [
        [
            Cell(title if len(settings) == 1 else f"{title}; {setting}"),
            *(Cell(by_seed.get(seed, "–")) for seed in seeds),
        ]
        for (title, setting), by_seed in cells.items()
    ]
    decided = [record.decision for *_, record in found.values()]
    notes = [f"{rule[:1].upper()}{rule[1:]}." for rule in dict.fromkeys(d["rule"] for d in decided if "rule" in d)]
    if any(d.get("kind") == "halving" for d in decided):
        notes.append("A mean over the seeds of an ablation that were not stopped is one over those that did better.")
    return Table(
        "Stopped early by the budget's rule",
        ["", *(f"seed {seed}" for seed in seeds)],
        rows,
        notes,
    )


def _why(record: Record) -> str:
    decided: Mapping[str, Any] = record.decision
    if decided.get("kind") == "halving":
        own = decided["figures"].get(record.name)
        kept = [decided["figures"][name] for name in decided["kept"]]
        limit = max((value for value in kept if value is not None), default=None)
        went_on = f"{len(kept)} of {len(decided['figures'])} went on, up to {_shown(limit)}"
        return f"step {decided['step']}: {_shown(own)} ({went_on})"
    if decided.get("kind") == "limit":
        return f"no time left for its {decided['needed_seconds']:,.0f} s"
    return record.message


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"


def clean_setting(results: Results, setting: Setting, main: str = "main") -> Setting | None:
    """Return the main study's setting of the same size and data, else its first one; None without a main study."""
    settings = results.settings(main)
    same = [s for s in settings if (s.size, s.data) == (setting.size, setting.data)]
    found = same or settings
    return found[0] if found else None


def describe(results: Results, setting: Setting) -> str:
    """Return a setting in the words of the campaign's file."""
    titles = results.campaign.titles
    words = [
        titles.get(kind, {}).get(getattr(setting, kind), getattr(setting, kind)) for kind in ("study", "size", "data")
    ]
    return "; ".join([*words, *(f"{name} {value}" for name, value in setting.settings)])


def _filled(rows: Sequence[Sequence[Cell]]) -> list[Sequence[Cell]]:
    return [row for row in rows if any(cell.text != "–" for cell in row[1:])]


def _values(results: Results, setting: Setting, name: str, column: Column) -> dict[int, float]:
    return results.values(setting, name, column.metric, scaled=column.scaled, split=column.split)


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _mean(column: Column, values: Sequence[float]) -> str:
    if not values:
        return "–"
    if not np.isfinite(values).all():
        return column.show(math.inf) if np.isinf(values).all() else "some never"
    found = summarize(values)
    if math.isnan(found.sd):
        return column.show(found.mean)
    return f"{column.show(found.mean)} ± {found.sd * column.scale:,.{column.decimals}f}"


def _best(results: Results, setting: Setting, names: Sequence[str], column: Column) -> set[str]:
    """Name the variations whose shown mean is the best; none where all are alike or no side is better."""
    means = {}
    for name in names:
        values = list(_values(results, setting, name, column).values())
        # compare only variations with all seeds: the missing ones may be the bad ones
        complete = len(values) == len(results.points(setting, name))
        if values and complete and np.isfinite(values).all():
            means[name] = round(float(np.mean(values)) * column.scale, column.decimals)
    if not column.better or len(set(means.values())) < 2:
        return set()
    top = max(means.values(), key=lambda value: column.better * value)
    return {name for name, value in means.items() if value == top}


def _tests(results: Results, setting: Setting, names: Sequence[str], reference: str, column: Column) -> dict[str, str]:
    """Return each variation's mark: stars of its paired t-test, and a dagger where it survives Holm's correction."""
    found: dict[str, tuple[str, float]] = {}
    for name in names:
        if name == reference:
            continue
        pairs = results.pairs(setting, name, reference, column.metric, scaled=column.scaled, split=column.split)
        if len(pairs.seeds) >= 2 and np.isfinite(pairs.ours).all() and np.isfinite(pairs.theirs).all():
            test = paired_difference(pairs.ours, pairs.theirs)
            found[name] = (test.stars, test.p_value)
        else:
            found[name] = ("", math.nan)
    if not found:
        return {}
    adjusted = holm([None if math.isnan(p) else p for _, p in found.values()])
    return {
        name: f"{' ' if stars else ''}{stars}{'†' if p <= ALPHA else ''}"
        for (name, (stars, _)), p in zip(found.items(), adjusted, strict=True)
    }


def _status_notes(results: Results, setting: Setting, names: Sequence[str]) -> list[str]:
    seeds: dict[tuple[str, str], list[str]] = {}
    for name in names:
        title = results.campaign.variation(name).title
        for point in results.points(setting, name):
            record = results.record(point)
            if record is None or record.status in ("ok", "pruned"):  # those stopped early have a table of their own
                continue
            what = f"{record.status}: {record.message}" if record.message else record.status
            seeds.setdefault((title, what), []).append(str(point.seed))
    return [f"{title}, seed {', '.join(found)}: {what}" for (title, what), found in seeds.items()]


def missing_runs(results: Results) -> list[str]:
    """Name the runs that have no record yet, or none that ended, once each."""
    found = {}
    for point in results.campaign.points:
        record = results.record(point)
        if record is None or record.status in ("interrupted", "paused", "running"):
            what = "not run yet" if record is None else record.status
            found[point.run_id] = (
                f"{point.variation}, seed {point.seed}, {describe(results, setting_of(point))}: {what}"
            )
    return list(found.values())
