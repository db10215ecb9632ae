"""Typed records of finished training runs, read from their output directories.

A run directory is what a `Trainer` script leaves behind (``trainer_state.json``, ``all_results.json``), the files of
`CalibrationCallback` (``calibration/*.json``), and optionally a ``run.json`` written by whoever started the run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...training.clock import seconds_trained

LOSS_TITLES = {
    "ce": "cross-entropy",
    "brier": "Brier",
    "dpsm": "DPSM",
    "spherical": "spherical",
    "focal": "focal loss",
}


@dataclass(frozen=True)
class Column:
    """One column of the comparison table.

    Args:
        key: name of the metric in `RunRecord.metrics`.
        label: heading.
        higher_is_better: direction.
        decimals: digits after the point.
        scale: factor between the stored and the shown value.
        unit: appended to the heading in brackets, empty for none.
        group: caption of the table it stands in.
    """

    key: str
    label: str
    higher_is_better: bool = False
    decimals: int = 4
    scale: float = 1.0
    unit: str = ""
    group: str = "Token-level figures on held-out text, at the end of training"

    @property
    def heading(self) -> str:
        """Label, unit and an arrow that points to the better side."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.label}{unit} {'↑' if self.higher_is_better else '↓'}"

    def show(self, value: float | None) -> str:
        """Format a value; a missing one is a dash, one that is not finite says so."""
        if value is None:
            return "–"
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return f"{value * self.scale:,.{self.decimals}f}"


_TEXTS = "Generated texts against the references (ROUGE F1, out of 100)"
_COST = "Cost of training (scored tokens a second: median of the log; peak memory of the whole process)"
COLUMNS: tuple[Column, ...] = (
    Column("eval_rouge1", "ROUGE-1", True, 2, group=_TEXTS),
    Column("eval_rouge2", "ROUGE-2", True, 2, group=_TEXTS),
    Column("eval_rougeL", "ROUGE-L", True, 2, group=_TEXTS),
    Column("eval_rougeLsum", "ROUGE-Lsum", True, 2, group=_TEXTS),
    Column("eval_perplexity", "perplexity", False, 2),
    Column("eval_nll", "NLL", False, 4),
    Column("eval_brier", "Brier", False, 4),
    Column("eval_ece_10", "ECE-10", False, 4),
    Column("eval_ece_15", "ECE-15", False, 4),
    Column("eval_ece_100", "ECE-100", False, 4),
    Column("eval_token_accuracy", "accuracy", True, 2, 100.0, "%"),
    Column("tokens_per_second", "tokens/s", True, 0, group=_COST),
    Column("peak_memory_mb", "peak memory", False, 0, unit="MB", group=_COST),
    Column("train_seconds", "training", False, 1, unit="s", group=_COST),
)


@dataclass(frozen=True)
class RunRecord:
    """What is known of one training run.

    Args:
        name: name of the run, unique in a report.
        loss_type: the loss it was trained with.
        metrics: final evaluation figures (``eval_*``), ``tokens_per_second``, ``train_seconds``, ``peak_memory_mb``;
            values may be NaN, unknown ones are absent.
        log_history: the Trainer's log entries, in order.
        calibration: parsed content of the last calibration file, or ``None``.
        status: ``finished``, ``failed`` or ``interrupted``.
        message: why it did not finish, empty when it did.
        run: parsed ``run.json`` (command, versions, seed and whatever else its writer put there).
        path: the run directory, ``None`` for a record that was made by hand.
    """

    name: str
    loss_type: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] | None = None
    status: str = "finished"
    message: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def title(self) -> str:
        """The loss in words, followed by the name where that says more."""
        words = LOSS_TITLES.get(self.loss_type, self.loss_type)
        return words if self.name == self.loss_type else f"{words} ({self.name})"

    @property
    def diverged_at(self) -> int | None:
        """First logged step with a figure that is not finite; ``None`` when there is none."""
        for entry in self.log_history:
            for key in ("loss", "nll", "grad_norm", "eval_nll", "eval_loss"):
                value = entry.get(key)
                if isinstance(value, (int, float)) and not math.isfinite(value):
                    return int(entry.get("step", 0))
        return None

    @property
    def diverged(self) -> bool:
        """Whether the run ended with figures that are not finite."""
        final = [self.metrics.get(key) for key in ("eval_nll", "eval_loss", "eval_perplexity")]
        losses = [entry["loss"] for entry in self.log_history if isinstance(entry.get("loss"), (int, float))]
        return any(value is not None and not math.isfinite(value) for value in [*final, *losses[-1:]])

    @property
    def comparable(self) -> bool:
        """Whether the run finished, with finite figures."""
        return self.status == "finished" and not self.diverged and bool(self.metrics)

    def value(self, key: str) -> float | None:
        """Return a final figure when it exists and is finite.

        Args:
            key: name of the metric.
        """
        value = self.metrics.get(key)
        return value if value is not None and math.isfinite(value) else None


def read_json(path: Path) -> Any:
    """Parse a JSON file, naming it when it is not one.

    Args:
        path: the file.

    Raises:
        ValueError: if it is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and repeat the run that wrote it.") from error


def _last_calibration(directory: Path) -> Mapping[str, Any] | None:
    contents = [read_json(path) for path in sorted((directory / "calibration").glob("*.json"))]
    contents = [content for content in contents if isinstance(content, dict) and "curve" in content]
    # of the sets that are evaluated at the end, the validation split
    return max(contents, key=lambda content: (content.get("step", 0), content.get("split") == "eval"), default=None)


def _final_metrics(directory: Path, history: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, float]:
    path = directory / "all_results.json"
    results = read_json(path) if path.exists() else {}
    # The last evaluation logged stands in for a run that stopped before it wrote its results.
    last: Mapping[str, Any] = next(
        (entry for entry in reversed(history) if "eval_nll" in entry or "eval_loss" in entry), {}
    )
    merged = {key: value for key, value in {**last, **results}.items() if key.startswith(("eval_", "predict_"))}
    seconds = seconds_trained(history)
    speeds = [entry["tokens_per_second"] for entry in history if entry.get("tokens_per_second") is not None]
    extra = {
        "train_seconds": results.get("train_runtime") if seconds is None else seconds,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_mb": run.get("peak_memory_mb"),
    }
    numbers = {key: value for key, value in {**merged, **extra}.items() if isinstance(value, (int, float))}
    return {key: float(value) for key, value in numbers.items()}


def read_run(directory: str | Path) -> RunRecord:
    """Read one run directory.

    Args:
        directory: the ``output_dir`` of a training script.

    Raises:
        ValueError: if the folder does not exist, holds no run, or holds a file that is not JSON.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the output_dir of a finished run.")
    run = read_json(directory / "run.json") if (directory / "run.json").exists() else {}
    state_path = directory / "trainer_state.json"
    if not state_path.exists() and not run:
        raise ValueError(f"{directory} holds neither trainer_state.json nor run.json; give the output_dir of a run.")
    history = read_json(state_path).get("log_history", []) if state_path.exists() else []
    name = str(run.get("name", directory.name))
    return RunRecord(
        name=name,
        loss_type=str(run.get("loss_type", name)),
        metrics=_final_metrics(directory, history, run),
        log_history=history,
        calibration=_last_calibration(directory),
        status=str(run.get("status", "finished")),
        message=str(run.get("message", "")),
        run=run,
        path=directory,
    )


def best_of(records: Sequence[RunRecord], column: Column) -> set[str]:
    """Name the runs with the best shown value of a column; empty when there is nothing to choose between.

    Args:
        records: the runs; those that failed or diverged are not candidates.
        column: the column.
    """
    values = {record.name: record.value(column.key) for record in records if record.comparable}
    shown = {name: round(value * column.scale, column.decimals) for name, value in values.items() if value is not None}
    if len(set(shown.values())) < 2:
        return set()
    best = max(shown.values()) if column.higher_is_better else min(shown.values())
    return {name for name, value in shown.items() if value == best}


def table_columns(records: Sequence[RunRecord]) -> list[tuple[str, list[Column]]]:
    """Choose the columns for which at least one run has a value, in groups with a caption.

    Args:
        records: the runs.
    """
    groups: dict[str, list[Column]] = {}
    for column in COLUMNS:
        if any(column.key in record.metrics for record in records):
            groups.setdefault(column.group, []).append(column)
    return list(groups.items())
