"""Single runs side by side: a table, pictures, plain sentences, one HTML page and one JSON file.

``dpsm report runs/ce runs/brier runs/dpsm --output_dir report`` makes them from any runs' folders; the demo ends with
them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...plots.reliability import FEW_TOKENS
from ...runtime.files import strict, write_json
from ..runner.collecting import read_run
from ..runner.records import Record
from ..spec.design import Campaign, Point, Setting, Variation
from ..verdict.results import Results
from .pictures import Pictures, curve_pictures, reliability_pictures, render, sections
from .report import texts_of
from .sentences import SingleRun, sentences_on
from .tables import AFTER, CALIBRATION, QUALITY, Column, Table, as_text, comparison

LOSS_TITLES = {"ce": "cross-entropy", "brier": "Brier", "dpsm": "DPSM", "focal": "focal loss"}

# Caption and columns of each table.
_TABLES = (
    ("Generated texts against the references (ROUGE F1, out of 100)", QUALITY["summarization"][:4]),
    ("Token-level figures on held-out text, at the end of training", (
        *QUALITY["language-modelling"][:2],
        *(column for column in CALIBRATION if column.metric in ("brier", "ece_10", "ece_15", "ece_100")),
        Column("token_accuracy", "accuracy (%)", 1, 2, 100.0),
    )),
    ("After the temperature that fits the calibration split best, which the runs have not trained on", tuple(
        replace(column, label=column.label.removesuffix(", scaled")) for column in AFTER
    )),
    ("Cost of training (scored tokens a second: median of the log; peak memory of the whole process)", (
        Column("tokens_per_second", "tokens/s", 1, 0), Column("peak_memory_mb", "peak memory (MB)", decimals=0),
        Column("train_seconds", "training (s)", decimals=1),
    )),
)  # fmt: skip
# see `pictures.Curve`
_CURVES = (
    ("eval_nll", "held-out NLL (nats a token)", "Held-out negative log-likelihood", False),
    ("eval_brier", "held-out Brier score", "Held-out Brier score", False),
    ("eval_ece_15", "held-out ECE-15", "Held-out calibration error, 15 bins, top-label", False),
    ("eval_token_accuracy", "held-out accuracy", "Held-out share of tokens predicted exactly", False),
    ("nll", "training NLL (nats a token)", "Training negative log-likelihood", False),
    ("grad_norm", "gradient norm", "Norm of the gradient before clipping", True),
    ("alpha", "α (weight of the Brier score)", "α: 0 is pure cross-entropy, 1 is pure Brier score", False),
)


@dataclass(frozen=True)
class RunsPage:
    """The page, the JSON file and the pictures that were written, the tables as text, and what the runs show."""

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
    losses = {record.name: str(record.arguments.get("loss_type", record.name)) for record in records}
    words = {name: LOSS_TITLES.get(loss, loss) for name, loss in losses.items()}
    titles = {name: word if name == losses[name] else f"{word} ({name})" for name, word in words.items()}
    by_loss = {loss: name for name, loss in reversed(losses.items())}
    campaign = Campaign(
        "runs", title, "small", records[0].task, tuple(Variation(name, titles[name]) for name in names),
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
    runs = [SingleRun(v.name, v.title, record, results.split) for v, record in found if record is not None]
    sentences, tables, pictures = sentences_on(runs), _tables(results, setting), Pictures(directory / "plots")
    html = render(
        "runs.html.j2", directory / "report.html", title=title, subtitle=subtitle, sentences=sentences, tables=tables,
        sections=_sections(results, setting, runs, pictures), runs=[_made_by(run) for run in runs],
        samples=texts_of(results, setting),
    )  # fmt: skip
    path = directory / "results.json"
    write_json(strict({"schema": 1, "findings": sentences, "runs": [_numbers(run) for run in runs]}), path)
    text = "\n\n".join([*map(as_text, tables), "↓ lower is better, ↑ higher is better, * best of its column"])
    return RunsPage(html, path, tuple(pictures.paths), text, tuple(sentences))


def _tables(results: Results, setting: Setting) -> list[Table]:
    made = [(caption, comparison(results, setting, columns, caption)) for caption, columns in _TABLES]
    shown = [(caption, table) for caption, table in made if table.rows]
    return [
        replace(table, caption=caption, headings=["loss", *table.headings[1:]], notes=() if number else table.notes)
        for number, (caption, table) in enumerate(shown)
    ]


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
            f"and hollow points hold fewer than {FEW_TOKENS} tokens: their height is mostly chance.",
            reliability_pictures(results, setting, names, pictures),
        ),
    )


def _numbers(run: SingleRun) -> dict[str, Any]:
    record = run.record
    cost = {key: record.efficiency.get(key) for key in ("train_seconds", "tokens_per_second", "peak_memory_mb")}
    metrics = {f"eval_{name}": value for name, value in run.metrics.items()}
    metrics |= {key: value for key, value in cost.items() if value is not None}
    return {
        "name": run.name, "loss_type": run.loss_type,
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
    parser.add_argument("runs", nargs="+", help="output_dir of each run; loss_type ce is the reference")
    parser.add_argument("--output_dir", default="report", help="where report.html, results.json and plots/ go")
    parser.add_argument("--title", default="Training losses side by side", help="heading of the page")
    options = parser.parse_args(arguments)
    try:
        results = results_of([read_run(run) for run in options.runs], options.title)
        page = write_runs_page(results, options.output_dir, options.title)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page.table, *page.sentences, f"page: {page.html}", sep="\n\n")
    return 0
