"""Run a program as a child process: its output shown as it comes, its time and peak memory measured."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_LINES = 20


@dataclass(frozen=True)
class ChildResult:
    """How a child process ended.

    Args:
        exit_code: its exit code; negative for a signal.
        seconds: wall-clock time from start to end.
        cpu_seconds: processor time of all its threads; ``None`` where the system does not say.
        peak_memory_mb: largest resident set in MB; ``None`` where the system does not say.
        tail: its last lines of output.
    """

    exit_code: int
    seconds: float
    cpu_seconds: float | None
    peak_memory_mb: float | None
    tail: tuple[str, ...]


def run_child(command: Sequence[str], log: Path) -> ChildResult:
    """Run a command with its output shown as it comes, and measured.

    Args:
        command: the command line.
        log: file that gets a copy of the output, progress bars reduced to their last state.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Threads that wait spin; where another program wants the same cores, that makes both crawl. A tenth of libgomp's
    # own patience was as fast on idle cores and nearly twice as fast on busy ones.
    environment.setdefault("GOMP_SPINCOUNT", "30000")
    # The child writes into a pipe, so it cannot see how wide the terminal is.
    environment.setdefault("COLUMNS", str(shutil.get_terminal_size((100, 24)).columns))
    if not sys.stderr.isatty():
        environment.setdefault("TQDM_MININTERVAL", "5")
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    started = time.perf_counter()
    with (
        log.open("w", encoding="utf-8") as copy,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            _show(process, copy, tail)
            exit_code, cpu_seconds, memory = _reap(process)
        except KeyboardInterrupt:
            # The terminal has sent the interrupt to the child too, which saves and stops after its current step.
            try:
                process.wait(timeout=20)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
            raise
    return ChildResult(exit_code, time.perf_counter() - started, cpu_seconds, memory, tuple(tail))


def _show(process: subprocess.Popen[bytes], copy: Any, tail: deque[str]) -> None:
    assert process.stdout is not None  # it was opened as a pipe
    pending = b""
    while chunk := os.read(process.stdout.fileno(), 65536):
        sys.stderr.write(chunk.decode("utf-8", errors="replace"))
        sys.stderr.flush()
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            _keep(line, copy, tail)
    _keep(pending, copy, tail)


def _keep(line: bytes, copy: Any, tail: deque[str]) -> None:
    text = line.decode("utf-8", errors="replace").rstrip("\r").rsplit("\r", 1)[-1].rstrip()
    if text:
        copy.write(text + "\n")
        copy.flush()
        tail.append(text)


def _reap(process: subprocess.Popen[bytes]) -> tuple[int, float | None, float | None]:
    """Wait for a child and return its exit code, its processor time and the peak of its resident memory in MB."""
    if not hasattr(os, "wait4"):
        return process.wait(), None, None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    # Kibibytes on Linux, bytes on macOS.
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return process.returncode, usage.ru_utime + usage.ru_stime, memory
