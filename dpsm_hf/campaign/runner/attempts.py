"""One process of one run, from the record that announces it to the record that says how it ended."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...runtime.child_process import Child, ChildResult, tail_of
from ...runtime.files import write_json
from ..spec.design import Campaign
from .collecting import collect, diverged, forget_results, has_results, is_finished, reached_step
from .endings import LOG_LINES, Ending, classify, memory_kill_count
from .launching import (
    LOG_NAME,
    SETTINGS_NAME,
    launch_command,
    launch_environment,
    run_folder,
    script_settings,
    shown_command,
)
from .lock import end_orphans, interrupt_run, kill_run, processes_of
from .machine import machine_facts
from .records import Record, write_record


@dataclass(frozen=True)
class Workplace:
    """What all attempts of a campaign have in common.

    Args:
        campaign: the campaign.
        directory: of the campaign, absolute.
        names: of the runs, by id.
        threads: of a run, shared by its processes.
    """

    campaign: Campaign
    directory: Path
    names: Mapping[str, str]
    threads: int


class Attempt:
    """A run under way.

    Args:
        place: what all attempts have in common.
        run_id: of the run.
        record: of earlier attempts, None for the first.
        devices: GPUs that it may use.
        tokenizer: the shared one, None where the run has its own.
        rung: number of the rung of halving that it is to stop at, None to go to the end.

    Raises:
        OSError: the record could not be written, or no process could be started.
    """

    def __init__(
        self,
        place: Workplace,
        run_id: str,
        record: Record | None,
        *,
        devices: Sequence[str] = (),
        tokenizer: Path | None = None,
        rung: int | None = None,
    ) -> None:
        campaign, directory, name = place.campaign, place.directory, place.names[run_id]
        run = campaign.runs[run_id]
        self.run_id, self.devices, self.rung = run_id, tuple(devices), rung
        self.folder = run_folder(directory, run_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = self.folder / SETTINGS_NAME
        self.asked = False
        self._told: set[int] = set()
        stop = campaign.budget.halving_rungs[rung] if rung is not None else None
        forget_results(self.folder)
        write_json(
            script_settings(campaign, run, name, directory, tokenizer=tokenizer, stop_at_step=stop), self.settings
        )
        threads = max(1, place.threads // run.processes)
        command = launch_command(run, self.settings, threads)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        attempt: dict[str, Any] = {"started": started, "from_step": reached_step(self.folder)}
        if devices:
            attempt["devices"] = list(devices)
        if rung is not None:
            attempt["rung"] = rung
        fresh = Record(run_id=run_id, name=name, task=run.task, arguments=dict(run.arguments))
        self.record = replace(
            record or fresh,
            name=name,
            status="running",
            message="",
            command=shown_command(command, directory),
            attempts=[*(record.attempts if record is not None else ()), attempt],
            machine=machine_facts(devices),
        )
        write_record(self.record, self.folder)
        self._memory_kills = memory_kill_count()
        with (self.folder / LOG_NAME).open("a", encoding="utf-8") as log:
            log.write(f"=== attempt {len(self.record.attempts)}, {started}, from step {attempt['from_step']} ===\n")
        environment = launch_environment(campaign, run, name, directory, devices=devices, threads=threads)
        self.child = Child(command, self.folder / LOG_NAME, environment)

    @property
    def saving(self) -> bool:
        """Return whether its training processes were told to save a checkpoint and stop."""
        return bool(self._told)

    def interrupt(self) -> None:
        """Have the training processes save a checkpoint and stop, each told once; before there is one, end at once."""
        self.asked = True
        self._told = interrupt_run(self.settings, self._told)
        if not self._told:
            self.kill()

    def kill(self) -> None:
        """Stop it at once."""
        self.asked = True
        self.child.kill()
        kill_run(self.settings)

    def poll(self) -> tuple[Record, Ending] | None:
        """Return its record and how it ended, None while it runs."""
        result = self.child.poll()
        if result is None:
            return None
        if processes_of(self.settings):
            kill_run(self.settings)  # what its launcher has left behind would go on writing
        self.record, ending = _finish(self, result)
        write_record(self.record, self.folder)
        return self.record, ending


def _finish(attempt: Attempt, result: ChildResult) -> tuple[Record, Ending]:
    before, now = attempt._memory_kills, memory_kill_count()
    ending = classify(
        result.exit_code,
        tail_of(attempt.child.log, attempt.child.log_start, LOG_LINES),
        asked=attempt.asked,
        memory_kills=now - before if now is not None and before is not None else None,
        free_bytes=shutil.disk_usage(attempt.folder).free,
    )
    record = collect(attempt.record, attempt.folder)
    step = reached_step(attempt.folder)
    if ending.status == "interrupted" and attempt.asked and step == 0:
        ending = Ending("interrupted", "interrupted before it had a checkpoint; it begins anew")
    if ending.status == "ok":
        ending = _finished(record, attempt.folder, attempt.rung, step)
    last = {
        **record.attempts[-1],
        "seconds": round(result.seconds, 2),
        "exit_code": result.exit_code,
        "to_step": int(record.efficiency.get("steps") or step) if ending.status == "ok" else step,
        "status": ending.status,
        "message": ending.message,
        "cpu_seconds": _rounded(result.cpu_seconds),
        "peak_memory_mb": _rounded(result.peak_memory_mb),
    }
    attempts = [*record.attempts[:-1], last]
    record = replace(record, status=ending.status, message=ending.message, attempts=attempts)
    return replace(record, efficiency={**record.efficiency, **_measured(attempts)}), ending


def _finished(record: Record, folder: Path, rung: int | None, step: int) -> Ending:
    if has_results(folder):
        why = diverged(record)
        return Ending("diverged", why) if why else Ending("ok")
    if rung is not None and step > 0:
        return Ending("paused", f"waits at step {step} for the runs it is compared with")
    return Ending("failed", "exit code 0, but the script has left no results: do its arguments ask for any work?")


def _measured(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return processor time and peak memory of all attempts; of one that nobody could measure the time is unknown."""
    times = [attempt["cpu_seconds"] for attempt in attempts if attempt.get("cpu_seconds") is not None]
    peaks = [attempt["peak_memory_mb"] for attempt in attempts if attempt.get("peak_memory_mb") is not None]
    return {
        "cpu_seconds": round(sum(times), 1) if len(times) == len(attempts) else None,
        "peak_memory_mb": max(peaks, default=None),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def recover(record: Record, directory: Path) -> Record:
    """Return the record of a run whose runner was killed, after ending what is left of its processes.

    Args:
        record: that says ``running``.
        directory: of the campaign.
    """
    folder = run_folder(directory, record.run_id)
    orphans = end_orphans(folder / SETTINGS_NAME)
    record = collect(record, folder)
    # The outcome is the last thing a script writes: only the runner had not come to take it.
    if is_finished(folder):
        why = diverged(record)
        ending = Ending("diverged", why) if why else Ending("ok")
    else:
        left = f"; {orphans} of its processes were still at work and have been stopped" if orphans else ""
        ending = Ending("interrupted", f"its runner ended without a word, killed for instance{left}")
    last = {**record.attempts[-1], "to_step": reached_step(folder), "status": ending.status, "message": ending.message}
    attempts = [*record.attempts[:-1], last]
    efficiency = {**record.efficiency, **_measured(attempts)}
    record = replace(record, status=ending.status, message=ending.message, attempts=attempts, efficiency=efficiency)
    write_record(record, folder)
    return record
