"""The record of one run of a campaign: a JSON file that is whole or not there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.files import read_json, strict, write_json
from ...runtime.former_names import ARGUMENTS as FORMER_ARGUMENTS
from ...runtime.secrets import without_secrets

SCHEMA = 1
RECORD_NAME = "record.json"

#: How a run can end. ``running`` is what a killed runner leaves behind; it is taken up again like ``interrupted``.
#: ``paused`` is an ablation that waits at a rung for those it is compared with.
STATUSES = ("ok", "oom", "diverged", "failed", "interrupted", "paused", "pruned", "running")
#: What the next ``run`` leaves alone.
SETTLED = frozenset({"ok", "oom", "diverged", "pruned"})
#: What it takes up again when asked to.
RETRIES = ("failed", "oom", "diverged")


@dataclass
class Record:
    """What is known of a run.

    Args:
        run_id: `design.Run.id`.
        name: of the run, for people: ``dpsm-linear/tiny/python-docs/seed-1``.
        task: language-modelling or summarization.
        arguments: of the script.
        status: one of `STATUSES`.
        message: why it is not ok; for a pruned run the rule, the rung and the figures that decided.
        command: that ran last; its paths are seen from the campaign's folder.
        attempts: for each process started: ``started`` (ISO time), ``seconds``, ``exit_code``, ``from_step`` (that it
            really went on from; of the newest checkpoint until it says so), ``to_step`` (of the newest checkpoint),
            ``status``, ``message``, ``devices`` on GPUs, and ``rung`` where it was to stop there.
        decision: of the budget: ``kind`` (``halving`` or ``limit``) and everything that it was decided by.
        machine: ``device``, ``versions``, ``commit``, ``dirty``.
        metrics: ``metrics[checkpoint][split][name]`` with checkpoint ``last`` or ``best`` and names without prefix;
            ``..._scaled`` after temperature scaling. What is not finite is null.
        best_step: optimizer step of the best checkpoint.
        history: the Trainer's log entries.
        efficiency: ``train_seconds`` (evaluation excluded), ``tokens_per_second``, ``peak_memory_mb``,
            ``peak_device_memory_mb``, ``flops_per_step``, ``steps``, ``cpu_seconds``, ``energy_joules``; null where
            not measured, never zero.
        calibration: the last `CalibrationCallback` content by split: curve, metrics, intervals.
        samples: texts written by the model, ``{"prompt", "reference", "output"}``.
        documents: names of the files with sums by block of documents, relative to the record, by
            ``checkpoint-split``.
        corruption: positions corrupted and seen, as the training counted them.
    """

    run_id: str
    name: str
    task: str
    arguments: Mapping[str, Any]
    status: str = "running"
    message: str = ""
    command: Sequence[str] = ()
    attempts: list[dict[str, Any]] = field(default_factory=list)
    decision: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    best_step: int | None = None
    history: Sequence[Mapping[str, Any]] = ()
    efficiency: Mapping[str, float | None] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()
    documents: Mapping[str, str] = field(default_factory=dict)
    corruption: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def seconds(self) -> float:
        """Return the time of all attempts, as far as it was measured."""
        return sum(float(attempt.get("seconds") or 0.0) for attempt in self.attempts)

    def value(self, name: str, *, split: str = "test", checkpoint: str = "last", scaled: bool = False) -> float | None:
        """Return a metric (without prefix) at the ``last`` or ``best`` checkpoint; None if missing or not finite.

        ``scaled`` asks for the figure after temperature scaling, where one was fitted; what scaling leaves alone
        (ROUGE of greedy texts) has one figure only.
        """
        found = self.metrics.get(checkpoint, {}).get(split, {})
        value = found.get(name)
        if scaled:
            value = found.get(f"{name}_scaled", value) if "temperature" in found else None
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def read_if_whole(path: Path) -> dict[str, Any]:
    """Parse a JSON object that is written in place; empty where it is missing, or a kill has left it incomplete."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_record(record: Record, directory: Path) -> Path:
    """Write a record into its run's folder, in one step, and return the file; a kill leaves the old one or the new.

    Credentials, in a message of the script for instance, are left out.
    """
    if record.status not in STATUSES:
        raise ValueError(f"status={record.status!r} is unknown; choose one of {', '.join(STATUSES)}.")
    path = directory / RECORD_NAME
    write_json(without_secrets(strict(asdict(record))), path)
    return path


def read_record(path: Path) -> Record:
    """Read a record; a file that is none of this schema is a ValueError, which names it."""
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this version reads {SCHEMA}: move it away to repeat the run.")
    if isinstance(arguments := content.get("arguments"), dict):
        content["arguments"] = {FORMER_ARGUMENTS.get(name, name): value for name, value in arguments.items()}
    try:
        return Record(**content)
    except TypeError as error:
        raise ValueError(f"{path} is no record of a run ({error}): move it away to repeat the run.") from None


def read_records(directory: Path, run_ids: Iterable[str] | None = None) -> dict[str, Record]:
    """Read the records of a campaign's folder by run id: of these runs, or of all."""
    folders = sorted((directory / "runs").glob("*")) if run_ids is None else [directory / "runs" / i for i in run_ids]
    records = [read_record(folder / RECORD_NAME) for folder in folders if (folder / RECORD_NAME).exists()]
    return {record.run_id: record for record in records}
