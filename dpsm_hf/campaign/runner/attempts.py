"""`Attempt`: one launch of one run, with a record written at its start and at its end.

`classify` finds out how it ended and why, from its exit code, the last lines of its log, and the kernel's counters.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...runtime.child_process import Child
from ...runtime.files import write_json
from .collecting import begun_at, collect, diverged, forget_results, is_finished, reached_step
from .launching import (
    LOG_NAME,
    SETTINGS_NAME,
    Workplace,
    launch_command,
    launch_environment,
    machine_facts,
    run_folder,
    script_settings,
    shown_command,
)
from .lock import end_orphans, interrupt_run, kill_run, processes_of
from .records import Record, write_record

#: How many of the log's last lines are searched for the cause: a launcher adds a traceback of its own below it.
LOG_LINES = 200

_FULL_DISK = ("No space left on device", "Disk quota exceeded", "os error 28)", "[Errno 28]", "[Errno 122]")
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "Cannot allocate memory", "MemoryError", "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)  # fmt: skip
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*|error: .*)$")
# Exceptions that a launcher adds: they say that a process failed, not why.
_LAUNCHER_ERRORS = ("subprocess.CalledProcessError", "torch.distributed.elastic")
# How launchers write the exit code of the training process.
_CODES = (
    re.compile(r"CalledProcessError: .*returned non-zero exit status (\d+)\."),
    re.compile(r"CalledProcessError: .*died with <Signals\.\w+: (\d+)>\."),
    re.compile(r"^\s*exitcode\s*:\s*(-?\d+)"),
)
_MEMORY_KILLS = r"^oom_kill (\d+)"
_LITTLE_SPACE = 2**20
_SIGKILL = 9
# Exit codes after a signal that a person or a scheduler may send (a shell reports SIGINT as 130, SIGTERM as 143);
# other signals are crashes. Listed by name, because Windows lacks some of them.
_SENT = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGKILL")
_STOPPED = frozenset({130, 143, *(-number for number in signal.Signals if number.name in _SENT)})


class Attempt:
    """One launch of a run, up to its end or, under successive halving, up to a rung.

    Args:
        place: what all runs of the campaign share.
        run_id: `Run.id`.
        devices: GPUs it gets; none on a CPU.
        tokenizer: folder of the shared tokenizer, if it uses one.
        rung: number of the rung to pause at, from 0 on; None runs to the end.

    Raises:
        OSError: if the record cannot be written, or no process can be started.
    """

    def __init__(
        self, place: Workplace, run_id: str, devices: Sequence[str], tokenizer: Path | None, rung: int | None
    ) -> None:
        campaign, directory, name = place.campaign, place.directory, place.names[run_id]
        run, record = campaign.runs[run_id], place.records.get(run_id)
        self.devices, self.rung = tuple(devices), rung
        self.folder = run_folder(directory, run_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = self.folder / SETTINGS_NAME
        self.asked = False
        self._told: set[int] = set()
        stop = campaign.budget.halving_rungs[rung] if rung is not None else None
        forget_results(self.folder)
        write_json(script_settings(campaign, run, name, directory, tokenizer, stop), self.settings)
        threads = max(1, place.threads // run.processes)
        command = launch_command(run, self.settings, threads)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        attempt: dict[str, Any] = {"started": started, "from_step": reached_step(self.folder)}
        if devices:
            attempt["devices"] = list(devices)
        if rung is not None:
            attempt["rung"] = rung
        record = record or Record(run_id, name, run.task, dict(run.arguments))
        known: dict[str, Any] = {"command": shown_command(command, directory), "machine": machine_facts(devices)}
        attempts = [*record.attempts, attempt]
        self.record = replace(record, name=name, status="running", message="", attempts=attempts, **known)
        write_record(self.record, self.folder)
        self._memory_kills = memory_kill_count()
        with (self.folder / LOG_NAME).open("a", encoding="utf-8") as log:
            log.write(f"=== attempt {len(attempts)}, {started}, from step {attempt['from_step']} ===\n")
        environment = launch_environment(campaign, run, name, directory, devices=devices, threads=threads)
        self.child = Child(command, self.folder / LOG_NAME, environment)

    @property
    def saving(self) -> bool:
        """Return whether its training processes have been sent the signal to save a checkpoint and stop."""
        return bool(self._told)

    def interrupt(self) -> None:
        """Signal the training processes, each once, to save a checkpoint and stop; kill the run if there are none."""
        self.asked = True
        self._told = interrupt_run(self.settings, self._told)
        if not self._told:
            self.kill()

    def kill(self) -> None:
        """Kill all its processes."""
        self.asked = True
        self.child.kill()
        kill_run(self.settings)

    def poll(self) -> tuple[Record, Ending] | None:
        """Return its record and its ending, once it has ended; None while it runs."""
        result = self.child.poll()
        if result is None:
            return None
        if processes_of(self.settings):
            kill_run(self.settings)  # processes that outlived their launcher would go on writing
        before, now = self._memory_kills, memory_kill_count()
        kills = now - before if now is not None and before is not None else None
        free = shutil.disk_usage(self.folder).free
        ending = classify(result.exit_code, self.child.tail(LOG_LINES), self.asked, kills, free)
        record = collect(self.record, self.folder)
        step = reached_step(self.folder)
        if ending.status == "interrupted" and self.asked and step == 0:
            ending = Ending("interrupted", "interrupted before its first checkpoint; it will start over")
        if ending.status == "ok":
            ending = self._finished(record, step)
        to_step = int(record.efficiency.get("steps") or step) if ending.status == "ok" else step
        facts = {"seconds": round(result.seconds, 2), "exit_code": result.exit_code, "to_step": to_step}
        used = {"cpu_seconds": result.cpu_seconds, "peak_memory_mb": result.peak_memory_mb}
        rounded = {name: None if value is None else round(value, 1) for name, value in used.items()}
        self.record = _write_end(record, self.folder, ending, facts, rounded)
        return self.record, ending

    def _finished(self, record: Record, step: int) -> Ending:
        if is_finished(self.folder, ended_well=True):
            return _ok_or_diverged(record)
        if self.rung is not None and step > 0:
            return Ending("paused", f"waits at step {step} for the runs it is compared with")
        return Ending("failed", "exit code 0, but the script has left no results: set do_train or do_eval")


def _write_end(
    record: Record, folder: Path, ending: Ending, facts: Mapping[str, Any], used: Mapping[str, Any]
) -> Record:
    """Write a record with the end of its last attempt, and return it."""
    end = {**facts, "status": ending.status, "message": ending.message, **used}
    if (step := begun_at(folder)) is not None:
        end["from_step"] = step
    attempts = [*record.attempts[:-1], {**record.attempts[-1], **end}]
    efficiency = {**record.efficiency, **_measured(attempts)}
    record = replace(record, status=ending.status, message=ending.message, attempts=attempts, efficiency=efficiency)
    write_record(record, folder)
    return record


def _ok_or_diverged(record: Record) -> Ending:
    why = diverged(record)
    return Ending("diverged", why) if why else Ending("ok")


def _measured(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return processor time and peak memory of all attempts together; None if one of them was not measured."""
    times, peaks = ([attempt.get(name) for attempt in attempts] for name in ("cpu_seconds", "peak_memory_mb"))
    return {
        "cpu_seconds": None if None in times else round(sum(filter(None, times)), 1),
        "peak_memory_mb": None if None in peaks else max(filter(None, peaks), default=None),
    }


def recover(record: Record, directory: Path) -> Record:
    """Bring the record of a run whose runner was killed up to date, after ending the processes it left; return it."""
    folder = run_folder(directory, record.run_id)
    orphans = end_orphans(folder / SETTINGS_NAME)
    record = collect(record, folder)
    # the script writes its outcome last: if that is there, only the record was missing
    if is_finished(folder):
        ending = _ok_or_diverged(record)
    else:
        left = f"; {orphans} of its processes were still running and have been stopped" if orphans else ""
        ending = Ending("interrupted", f"its runner ended without recording how, so it was probably killed{left}")
    return _write_end(record, folder, ending, {"to_step": reached_step(folder)}, {})


# ---- how it ended --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How a run ended: one of `records.STATUSES`, the reason in a sentence, and whether that is a full disk."""

    status: str
    message: str = ""
    disk_full: bool = False


def classify(
    exit_code: int, lines: Sequence[str], asked: bool = False, memory_kills: int | None = None,
    free_bytes: int | None = None,
) -> Ending:  # fmt: skip
    """Return how a run ended, and why.

    Args:
        exit_code: of its launcher.
        lines: the last lines of its log.
        asked: whether the runner itself interrupted it.
        memory_kills: how many processes the kernel killed meanwhile because memory ran out; None if unknown.
        free_bytes: free space on the disk; None if unknown.
    """
    if exit_code == 0:
        return Ending("ok")
    code = real_exit_code(exit_code, lines)
    errors = [match[1] for line in lines if (match := _ERROR.match(line.strip()))]
    errors = [error for error in errors if not error.startswith(_LAUNCHER_ERRORS)]
    last = errors[-1] if errors else ""
    if full := _first(errors, _FULL_DISK):
        return Ending("failed", f"the disk is full: {full}", disk_full=True)
    if memory := _first(errors, _OUT_OF_MEMORY):
        return Ending("oom", memory)
    if code == -_SIGKILL and memory_kills:
        return Ending("oom", f"killed by the kernel because memory ran out (it killed {memory_kills} in this time)")
    if last.startswith("FloatingPointError"):
        return Ending("diverged", last.partition(": ")[2] or last)
    if asked:
        return Ending("interrupted", "interrupted; it will resume from its newest checkpoint")
    if code in _STOPPED:
        return Ending("interrupted", _signalled(code, memory_kills))
    if free_bytes is not None and free_bytes < _LITTLE_SPACE:
        # torch does not say why it could not write, and the log may have been cut off by the full disk too
        what = f": {last}" if last else ""
        return Ending("failed", f"the disk is full ({free_bytes} bytes free){what}", disk_full=True)
    what = last or (lines[-1] if lines else "it wrote nothing")
    return Ending("failed", f"exit code {code}: {what}")


def real_exit_code(exit_code: int, lines: Sequence[str]) -> int:
    """Return the exit code of the training process, which its launcher writes only into the log."""
    if exit_code != 1:
        return exit_code
    for line in reversed(lines):
        for pattern in _CODES:
            if match := pattern.search(line):
                code = int(match[1])
                return -code if "died with" in pattern.pattern else code
    return exit_code


def _signalled(code: int, memory_kills: int | None) -> str:
    if code in (130, 143):
        return f"stopped by {'an interrupt' if code == 130 else 'SIGTERM'} that did not come from the runner"
    if code != -_SIGKILL:
        return f"ended by signal {-code} ({signal.Signals(-code).name})"
    if memory_kills is None:
        return "killed (signal 9): by somebody, or by the kernel because memory ran out, which cannot be seen here"
    return "killed (signal 9) by somebody: the kernel killed no process for lack of memory in this time"


def _first(errors: Sequence[str], parts: Sequence[str]) -> str | None:
    return next((error for error in errors if any(part in error for part in parts)), None)


def memory_kill_count(root: Path = Path("/")) -> int | None:
    """Return how many processes the kernel has killed so far because memory ran out; None if it does not say.

    They are those of this process's control group if it has one, else of the whole machine.
    """
    group = _in_file(r"^0::/*(.*?)/*$", root / "proc/self/cgroup") or ""
    events = _in_file(_MEMORY_KILLS, root / "sys/fs/cgroup" / group / "memory.events")
    count = events or _in_file(_MEMORY_KILLS, root / "proc/vmstat")
    return None if count is None else int(count)


def _in_file(pattern: str, path: Path) -> str | None:
    """Return the first group of a pattern's first match in a file; None if there is no match or no file."""
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None
