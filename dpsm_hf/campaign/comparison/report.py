"""Turn finished runs into a report: a table, pictures, plain sentences, one HTML page and one JSON file.

Run it on any run directories: ``dpsm report runs/ce runs/brier runs/dpsm --output_dir report``.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

from ...plots.figures import save_figure
from ...plots.reliability import FEW_TOKENS
from ...plots.training_curves import ReliabilityDisplay, plot_alpha, plot_training_curves, series_of
from .findings import findings
from .records import Column, RunRecord, best_of, read_run, table_columns

# metric, name of the axis, caption, logarithmic
_CURVES = (
    ("eval_nll", "held-out NLL (nats a token)", "Held-out negative log-likelihood", False),
    ("eval_brier", "held-out Brier score", "Held-out Brier score", False),
    ("eval_ece_15", "held-out ECE-15", "Held-out calibration error, 15 bins, top-label", False),
    ("eval_token_accuracy", "held-out accuracy", "Held-out share of tokens predicted exactly", False),
    ("nll", "training NLL (nats a token)", "Training negative log-likelihood", False),
    ("grad_norm", "gradient norm", "Norm of the gradient before clipping", True),
)


@dataclass(frozen=True)
class Report:
    """Where a report was written, and its words.

    Args:
        html: the page.
        results: the JSON file.
        plots: the pictures.
        table: the comparison table as text.
        sentences: what the runs show.
    """

    html: Path
    results: Path
    plots: tuple[Path, ...]
    table: str
    sentences: tuple[str, ...]


def text_table(records: Sequence[RunRecord]) -> str:
    """Lay the comparison out for a terminal, one row a run, the best of each column marked with ``*``.

    Args:
        records: the runs.

    Raises:
        ValueError: if there are none.
    """
    if not records:
        raise ValueError("A comparison table needs at least one run; got none.")
    blocks = []
    for caption, columns in table_columns(records):
        rows = [["loss", *(column.heading for column in columns)]]
        rows += [[record.title, *(_cell(record, column, records)[0] for column in columns)] for record in records]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        # The marks of the best hang outside the columns, so that the digits stay in line with the headings.
        rows[0][1:] = [f"{heading} " for heading in rows[0][1:]]
        lines = [
            "  ".join(cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i] + 1) for i, cell in enumerate(row))
            for row in rows
        ]
        blocks.append("\n".join([caption, "-" * len(lines[0]), *(line.rstrip() for line in lines)]))
    return "\n\n".join([*blocks, "↓ lower is better, ↑ higher is better, * best of its column"])


def _cell(record: RunRecord, column: Column, records: Sequence[RunRecord]) -> tuple[str, str]:
    """Text of a cell (padded for the mark of the best) and its state: ``best``, ``bad`` or nothing."""
    value = record.metrics.get(column.key)
    state = "best" if record.name in best_of(records, column) else ""
    if value is not None and not math.isfinite(value):
        state = "bad"
    return column.show(value) + ("*" if state == "best" else " "), state


def _html_tables(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    tables = []
    for caption, columns in table_columns(records):
        rows = []
        for record in records:
            cells = [_cell(record, column, records) for column in columns]
            note = record.status if record.status != "finished" else "diverged" if record.diverged else ""
            shown = [{"text": text.rstrip(" *"), "state": state} for text, state in cells]
            rows.append({"title": record.title, "note": note, "cells": shown})
        tables.append({"caption": caption, "columns": columns, "rows": rows})
    return tables


class _Pictures:
    """Saves each figure as PNG beside the report and hands it to the page as an inlined SVG."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths: list[Path] = []

    def add(self, name: str, figure: Figure, caption: str) -> dict[str, str]:
        name = re.sub(r"[^\w.-]+", "_", name)
        self.paths.append(save_figure(figure, self.directory / f"{name}.png"))
        vector = save_figure(figure, self.directory / f"{name}.svg")
        data = base64.b64encode(vector.read_bytes()).decode("ascii")
        vector.unlink()
        return {"data": f"data:image/svg+xml;base64,{data}", "caption": caption}


def _sections(records: Sequence[RunRecord], pictures: _Pictures) -> list[dict[str, Any]]:
    sections = []

    def logged(metric: str, x: str) -> list[RunRecord]:
        return [record for record in records if len(series_of(record, metric, x)[0]) > 1]

    def curves(metrics: Sequence[str], x: str) -> list[dict[str, str]]:
        drawn = []
        for metric, label, caption, log_scale in _CURVES:
            if metric in metrics and logged(metric, x):
                figure = plot_training_curves(logged(metric, x), x, metric, label, log_scale=log_scale)
                drawn.append(pictures.add(f"{metric}-over-{x}", figure, caption))
        return drawn

    shown = curves([metric for metric, *_ in _CURVES], "step")
    if logged("alpha", "step"):
        figure = plot_alpha(logged("alpha", "step"))
        shown.append(pictures.add("alpha-over-step", figure, "α: 0 is pure cross-entropy, 1 is pure Brier score"))
    sections.append({"title": "Over training steps", "text": "", "pictures": shown})
    text = "The same figures over wall-clock seconds of training, evaluation excluded: what the loss costs in time."
    shown = curves(("eval_nll", "eval_brier"), "seconds")
    sections.append({"title": "Over seconds of training", "text": text, "pictures": shown})
    displays = [
        ReliabilityDisplay.from_json(record.calibration, record.name)
        for record in records
        if record.calibration is not None and not record.diverged
    ]
    shown = []
    if len(displays) > 1 and len({display.split for display in displays}) == 1:
        figure = ReliabilityDisplay.overlay(displays).figure()
        shown.append(pictures.add("reliability-all", figure, "All models; below, the distribution of confidence"))
    for display in displays:
        (name,) = display.ece
        shown.append(pictures.add(f"reliability-{name}", display.figure(), f"Reliability of {name}"))
    text = (
        "Below the diagonal a model is overconfident, above it underconfident. Token-level, top-label. Faint bars and "
        f"hollow points hold fewer than {FEW_TOKENS} tokens: their height is mostly chance."
    )
    sections.append({"title": "Reliability diagrams", "text": text, "pictures": shown})
    return [section for section in sections if section["pictures"]]


def _strict(value: Any) -> Any:
    """Replace what JSON cannot hold (NaN, infinity) by null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _results(records: Sequence[RunRecord], sentences: Sequence[str]) -> dict[str, Any]:
    runs = [
        {
            "name": record.name,
            "loss_type": record.loss_type,
            "status": "diverged" if record.status == "finished" and record.diverged else record.status,
            "message": record.message,
            "metrics": dict(sorted(record.metrics.items())),
            "run": record.run,
            "calibration": record.calibration,
        }
        for record in records
    ]
    return {"schema": 1, "findings": list(sentences), "runs": runs}


def _run_details(record: RunRecord) -> dict[str, str]:
    command, versions = record.run.get("command", ()), record.run.get("versions", {})
    seconds = record.run.get("seconds")
    summary = [record.status] + ([f"{seconds:.0f} s from start to end"] if isinstance(seconds, (int, float)) else [])
    return {
        "title": record.title,
        "summary": ", ".join(summary),
        "command": shlex.join(str(part) for part in command).replace(" --", " \\\n  --"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def write_report(
    records: Sequence[RunRecord],
    output_dir: str | Path,
    title: str = "Training losses side by side",
    subtitle: str = "",
) -> Report:
    """Write ``report.html``, ``results.json`` and ``plots/*.png``.

    Args:
        records: the runs; failed and diverged ones are shown as such.
        output_dir: where to.
        title: heading of the page.
        subtitle: a line below it: what was trained on what.

    Returns:
        The paths, the table as text and the sentences.

    Raises:
        ValueError: if there are no records, or two of the same name.
    """
    names = [record.name for record in records]
    if not names:
        raise ValueError("A report needs at least one run; got none.")
    if len(set(names)) < len(names):
        raise ValueError(f"Two runs have the same name ({', '.join(names)}); rename one in its run.json.")
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    sentences = findings(records)
    pictures = _Pictures(directory / "plots")
    sections = _sections(records, pictures)
    environment = Environment(autoescape=True)
    source = resources.files("dpsm_hf").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        title=title,
        subtitle=subtitle,
        sentences=sentences,
        tables=_html_tables(records),
        sections=sections,
        runs=[_run_details(record) for record in records],
    )
    html, results = directory / "report.html", directory / "results.json"
    html.write_text(page, encoding="utf-8")
    content = json.dumps(_strict(_results(records, sentences)), indent=2, ensure_ascii=False, allow_nan=False)
    results.write_text(content + "\n", encoding="utf-8")
    return Report(html, results, tuple(pictures.paths), text_table(records), tuple(sentences))


def main(arguments: Sequence[str] | None = None) -> int:
    """Report on run directories named on the command line.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="dpsm report", description="Compare finished training runs.")
    parser.add_argument("runs", nargs="+", help="output_dir of each run; loss_type ce is the reference")
    parser.add_argument("--output_dir", default="report", help="where report.html, results.json and plots/ go")
    parser.add_argument("--title", default="Training losses side by side", help="heading of the page")
    options = parser.parse_args(arguments)
    try:
        report = write_report([read_run(run) for run in options.runs], options.output_dir, options.title)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.table, *report.sentences, f"page: {report.html}", sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
