"""Run a program as a child process, its time and peak memory measured, its output kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TAIL_LINES = 20
#: Environment variable that names the process that started a run; the run ends when that process does.
RUNNER_VARIABLE = "DPSM_RUNNER_PID"
#: File in its folder where a run that a runner has started says which step its training goes on from.
STARTED_NAME = "started.json"


@dataclass(frozen=True)
class ChildResult:
    """How a child process ended.

    Args:
        exit_code: its exit code; negative for a signal.
        seconds: wall-clock time from start to end.
        cpu_seconds: processor time of all its threads and of those that it has waited for; ``None`` where the system
            does not say, and after a signal: a launcher that was killed has waited for nobody.
        peak_memory_mb: largest resident set in MB, of it or of one that it has waited for; ``None`` likewise. Never
            less than this process had when it started the child: Linux counts from the fork on.
        tail: its last lines of output.
    """

    exit_code: int
    seconds: float
    cpu_seconds: float | None
    peak_memory_mb: float | None
    tail: tuple[str, ...]


class Child:
    """A program that runs by itself: its output goes straight to a file, its end is asked for, not waited for.

    It leads a session of its own, so that the terminal's Ctrl-C reaches only who started it, and on Linux the kernel
    kills it when that process ends, however it ends.

    Args:
        command: the command line.
        log: file that its output is appended to.
        environment: variables beyond those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.log = log
        self.started = time.perf_counter()
        with log.open("ab") as output:
            self.log_start = output.tell()
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
                # This process has one thread, so that running Python between fork and exec is safe.
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )

    @property
    def pid(self) -> int:
        """Return its process id, which is that of its session and process group too."""
        return self._process.pid

    def poll(self) -> ChildResult | None:
        """Return how it ended, None while it runs."""
        usage: Any = None
        if not hasattr(os, "wait4"):
            if self._process.poll() is None:
                return None
        elif self._process.returncode is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid == 0:
                return None
            self._process.returncode = os.waitstatus_to_exitcode(status)
        cpu_seconds = memory = None
        if usage is not None and self._process.returncode >= 0:
            cpu_seconds = usage.ru_utime + usage.ru_stime
            memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else kibibytes
        return ChildResult(
            self._process.returncode, time.perf_counter() - self.started, cpu_seconds, memory, self.tail()
        )

    def tail(self, lines: int = TAIL_LINES) -> tuple[str, ...]:
        """Return the last lines it has written."""
        return tail_of(self.log, self.log_start, lines)

    def kill(self) -> None:
        """Kill it and what is left of its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self._process.kill()


def tail_of(log: Path, start: int = 0, lines: int = TAIL_LINES, longest: int = 2**18) -> tuple[str, ...]:
    """Return the last lines of a log that are not blank, progress bars reduced to their last state.

    Only what lies behind byte `start` is read, and at most `longest` bytes of it.
    """
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(start, file.tell() - longest))
        text = file.read().decode("utf-8", errors="replace")
    cleaned = (line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))
    return tuple([line for line in cleaned if line][-lines:])


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux: PR_SET_PDEATHSIG; elsewhere nothing happens)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_runner() -> None:
    """End this process when the one that started the run has ended or ends, even if it was killed.

    An orphan would go on writing into a folder that the next runner uses. Nothing happens without the environment
    variable `RUNNER_VARIABLE`, or, for what is still to come, on systems other than Linux.
    """
    runner = os.environ.get(RUNNER_VARIABLE)
    if not runner:
        return
    end_with_parent()
    # It may have ended before the line above took effect.
    if not psutil.pid_exists(int(runner)):
        sys.exit(f"The runner (process {runner}) has ended: so does this run, which the next runner continues.")


_PR_SET_PDEATHSIG = 1
# Loaded here because nothing may be loaded between fork and exec.
_LIBC: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
