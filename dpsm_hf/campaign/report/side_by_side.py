"""Single runs side by side: a table, pictures, plain sentences, one HTML page and one JSON file.

``dpsm report runs/ce runs/brier runs/dpsm --output_dir report`` makes them from any runs' folders; the demo ends with
them.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...plots.reliability import FEW_TOKENS
from ...runtime.files import check_folder, strict, write_json
from ...runtime.mistakes import exit_status
from ...statistics import Standing
from ..runner.collecting import read_run
from ..runner.records import Record
from ..spec.design import Campaign, Point, Setting, Variation
from ..verdict.results import Results
from .pictures import NULL_ECE, Pictures, colours, curve_pictures, reliability_pictures, render, sections
from .report import texts_of
from .sentences import MEASURES, SingleRun, began_alike, compared, judged, size_of, story_of
from .tables import AFTER, CALIBRATION, QUALITY, Cell, Column, Table, as_text, comparison

LOSS_TITLES = {"ce": "cross-entropy", "brier": "Brier", "dpsm": "DPSM", "focal": "focal loss"}

# Caption and columns of each table; what training cost stands by itself.
_TABLES = (
    ("Generated texts against the references (ROUGE F1, out of 100)", QUALITY["summarization"][:4]),
    ("Token-level figures on the {split} split, at the end of training", (
        *QUALITY["language-modelling"][:2],
        *(column for column in CALIBRATION if column.metric in ("brier", "ece_10", "ece_15", "ece_100")),
        Column("token_accuracy", "accuracy (%)", 1, 2, 100.0),
    )),
    ("After the temperature that fits the calibration split best, which the runs have not trained on", tuple(
        replace(column, label=column.label.removesuffix(", scaled")) for column in AFTER
    )),
)  # fmt: skip
_COST = (
    "Cost of training (scored tokens a second: median of the log; peak memory of the whole process)",
    (
        Column("tokens_per_second", "tokens/s", 1, 0),
        Column("peak_memory_mb", "peak memory (MB)", decimals=0),
        Column("train_seconds", "training (s)", decimals=1),
    ),
)
#: The row with the figures before the first step, which all runs share.
_BEFORE = "before training"
#: How a run is marked that leads a column.
_MARK = "better than every other run there: the 95 % intervals do not overlap"
# see `pictures.Curve`
_CURVES = (
    ("eval_nll", "NLL (nats a token), validation", "Negative log-likelihood on the validation split", False),
    ("eval_brier", "Brier score, validation", "Brier score on the validation split", False),
    ("eval_ece_15", "ECE-15, validation", "Calibration error on the validation split, 15 bins, top-label", False),
    ("eval_token_accuracy", "accuracy, validation", "Share of validation tokens predicted exactly", False),
    ("nll", "training NLL (nats a token)", "Training negative log-likelihood", False),
    ("grad_norm", "gradient norm", "Norm of the gradient before clipping", True),
    ("alpha", "α (weight of the Brier score)", "α: 0 is pure cross-entropy, 1 is pure Brier score", False),
)


@dataclass(frozen=True)
class RunsPage:
    """The page, the JSON file and the pictures that were written, the tables as text, and what the runs show.

    ``sentences`` are the chief one and its points; the page and the JSON file have the details too.
    """

    html: Path
    results: Path
    plots: tuple[Path, ...]
    table: str
    sentences: tuple[str, ...]


def results_of(records: Sequence[Record], title: str) -> Results:
    """Return runs that no campaign has planned together as the results of one: each a variation of its own.

    No run at all, or two of the same name, are a ValueError.
    """
    names = [record.name for record in records]
    if not names:
        raise ValueError("A report needs at least one run; got none.")
    if len(set(names)) < len(names):
        raise ValueError(f"Two runs have the same name ({', '.join(names)}); rename one in its run.json.")
    losses = {record.name: str(record.arguments.get("scoring_rule", record.name)) for record in records}
    words = {name: LOSS_TITLES.get(loss, loss) for name, loss in losses.items()}
    titles = {name: word if name == losses[name] else f"{word} ({name})" for name, word in words.items()}
    by_loss = {loss: name for name, loss in reversed(losses.items())}
    variations = tuple(Variation(name, titles[name], arguments={"scoring_rule": losses[name]}) for name in names)
    campaign = Campaign(
        "runs", title, "small", records[0].task, variations,
        tuple(Point("main", r.name, "", "", int(r.arguments.get("seed") or 0), r.run_id) for r in records), {},
        reference=by_loss.get("ce", names[0]), brier=by_loss.get("brier", names[0]), test_split="validation",
    )  # fmt: skip
    return Results(campaign, {record.run_id: record for record in records})


def write_runs_page(results: Results, output_dir: str | Path, title: str, subtitle: str = "") -> RunsPage:
    """Write ``report.html``, ``results.json`` and ``plots/*.png`` on the runs of one seed.

    Failed and diverged runs are named as such, those without a record are left out. ``subtitle`` is a line below the
    heading: what was trained on what.
    """
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    setting = results.settings()[0]
    found = [(v, results.record(results.points(setting, v.name)[0])) for v in results.campaign.variations]
    runs = [SingleRun(v.name, v.title, r, results.split, v.of is not None) for v, r in found if r is not None]
    story, pictures = story_of(runs), Pictures(directory / "plots")
    tables, against = _tables(results, setting, runs), _against(runs)
    html = render(
        "runs.html.j2", directory / "report.html", title=title, subtitle=subtitle, story=story, tables=tables,
        against=against, mark=_MARK, colours=colours(results), runs=[_made_by(run) for run in runs],
        sections=_sections(results, setting, runs, pictures), samples=texts_of(results, setting),
    )  # fmt: skip
    path = directory / "results.json"
    content = {"schema": 1, "findings": story.sentences, "runs": [_numbers(run) for run in runs]}
    write_json(strict(content), path)
    legend = f"↓ lower is better, ↑ higher is better, * {_MARK}"
    text = "\n\n".join([*map(as_text, tables), legend] if tables else [])
    return RunsPage(html, path, tuple(pictures.paths), text, (story.headline, *story.points))


def _tables(results: Results, setting: Setting, runs: Sequence[SingleRun]) -> list[Table]:
    by_name = {run.name: run for run in runs if run.comparable}

    def leading(names: Sequence[str], column: Column) -> set[str]:
        there = [by_name[name] for name in names if name in by_name]
        return {
            run.name
            for run in there
            if len(there) > 1
            and all(
                judged(run, other, column.metric, column.better) is Standing.BETTER
                for other in there
                if other is not run
            )
        }

    made = []
    for caption, columns in _TABLES:
        table = comparison(results, setting, columns, "", False, leading)
        made.append((caption.format(split=results.split), _with_start(table, columns, runs)))
    # seconds and memory of one run on a machine that does other things too: nobody leads
    made.append((_COST[0], comparison(results, setting, _COST[1], "", tested=False)))
    shown = [(caption, table) for caption, table in made if table.rows]
    return [
        replace(table, caption=caption, headings=["loss", *table.headings[1:]], notes=() if number else table.notes)
        for number, (caption, table) in enumerate(shown)
    ]


def _with_start(table: Table, columns: Sequence[Column], runs: Sequence[SingleRun]) -> Table:
    """Put the figures before training above the runs, where the log of any run has them and the runs began alike."""
    begun = [run for run in runs if run.comparable and any(step == 0 for step, _ in run.logged("eval_nll"))]
    if not begun or not began_alike(runs):
        return table
    by_heading = {column.heading: column for column in columns if not column.scaled}
    cells = []
    for heading in table.headings[1:]:
        column = by_heading.get(heading)
        logged = [] if column is None else begun[0].logged(f"eval_{column.metric}")
        found = [value for step, value in logged if step == 0]
        cells.append(Cell(column.show(found[0]) if column is not None and found else "–"))
    known = any(cell.text != "–" for cell in cells)
    return replace(table, rows=[[Cell(_BEFORE), *cells], *table.rows]) if known else table


def _against(runs: Sequence[SingleRun]) -> Table | None:
    """Say of each run on which figures it is better or worse than cross-entropy, and how much the figures differ."""
    usable = [run for run in runs if run.comparable]
    base = next((run for run in usable if run.is_reference), None)
    if base is None:
        return None
    others = [run for run in usable if run is not base]
    found = [(run, {m.key: (said, change) for m, said, change in compared(run, base)}) for run in others]
    shown = [measure for measure in MEASURES if any(measure.key in of for _, of in found)]
    rows = []
    for run, of in found:
        cells = [Cell(run.title)]
        for measure in shown:
            if measure.key not in of:
                cells.append(Cell("–"))
                continue
            said, change = of[measure.key]
            ours, theirs = run.value(measure.key), base.value(measure.key)
            size = "" if ours is None or theirs is None else f" ({size_of(measure, change, ours, theirs)})"
            cells.append(Cell(f"{said}{size}", said.value.replace(" ", "-")))
        rows.append(cells)
    if not shown:
        return None
    note = (
        "Better or worse is said where the 95 % intervals of the two evaluations do not overlap. They cover the "
        "choice of the evaluated text, not that of the seed."
    )
    return Table(f"Against {base.title}", ["loss", *(measure.words for measure in shown)], rows, [note])


def _sections(
    results: Results, setting: Setting, runs: Sequence[SingleRun], pictures: Pictures
) -> list[dict[str, Any]]:
    names = [run.name for run in runs]
    return sections(
        ("Over training steps", "", curve_pictures(results, setting, names, "step", _CURVES, pictures)),
        (
            "Over seconds of training",
            "The same figures over wall-clock seconds of training, evaluation excluded: what the loss costs in time.",
            curve_pictures(results, setting, names, "seconds", _CURVES[:2], pictures),
        ),
        (
            "Reliability diagrams",
            "Below the diagonal a model is overconfident, above it underconfident. Token-level, top-label. Faint bars "
            f"and hollow points hold fewer than {FEW_TOKENS} tokens: their height is mostly chance. {NULL_ECE}",
            reliability_pictures(results, setting, names, pictures),
        ),
    )


def _numbers(run: SingleRun) -> dict[str, Any]:
    record = run.record
    cost = {key: record.efficiency.get(key) for key in ("train_seconds", "tokens_per_second", "peak_memory_mb")}
    metrics = {f"eval_{name}": value for name, value in run.metrics.items()}
    metrics |= {key: value for key, value in cost.items() if value is not None}
    return {
        "name": run.name, "scoring_rule": run.scoring_rule,
        "status": "finished" if record.status == "ok" else record.status, "message": record.message,
        "metrics": dict(sorted(metrics.items())),
        "run": {
            "id": record.run_id, "seed": record.arguments.get("seed"), "command": record.command,
            "arguments": record.arguments, "versions": record.machine.get("versions", {}), "seconds": record.seconds,
            "exit_code": record.attempts[-1].get("exit_code") if record.attempts else None,
            **{key: record.efficiency.get(key) for key in ("cpu_seconds", "peak_memory_mb")},
        },
        "calibration": run.calibration or None,
    }  # fmt: skip


def _made_by(run: SingleRun) -> dict[str, str]:
    record, seconds = run.record, run.record.seconds
    return {
        "title": run.title,
        "summary": ", ".join([_numbers(run)["status"]] + ([f"{seconds:.0f} s from start to end"] if seconds else [])),
        "command": shlex.join(record.command).replace(" --", " \\\n  --"),
        "arguments": "\n".join(f"{name}: {value}" for name, value in record.arguments.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in record.machine.get("versions", {}).items()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Report on the runs' folders that a command line names (``sys.argv``'s by default) and return the exit code."""
    parser = argparse.ArgumentParser(prog="dpsm report", description="Compare finished training runs.")
    parser.add_argument("runs", nargs="+", help="output_dir of each run; scoring_rule ce is the reference")
    parser.add_argument("--output_dir", default="report", help="where report.html, results.json and plots/ go")
    parser.add_argument("--title", default="Training losses side by side", help="heading of the page")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    folder = check_folder(options.output_dir, "--output_dir")
    results = results_of([read_run(run) for run in options.runs], options.title)
    page = write_runs_page(results, folder, options.title)
    print(*filter(None, [page.table]), *page.sentences, f"page: {page.html}", sep="\n\n")
    return 0
