"""One runner at a time in a campaign's folder, and no training process left over from one that was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .records import read_if_whole

LOCK_NAME = "runner.lock"
LAUNCHER = "accelerate.commands.launch"
#: What an orphan gets to save a checkpoint before it is killed.
ORPHAN_SECONDS = 60.0
_KILL_SECONDS = 10.0
# Enough for a second look at a lock whose holder has ended.
_LOCK_SECONDS = 0.5


class RunnerError(RuntimeError):
    """Something that keeps the whole campaign from running, said in a sentence."""


@contextmanager
def campaign_lock(directory: Path) -> Iterator[None]:
    """Hold a campaign's folder for this process alone, until the block ends or the process does.

    The lock is the operating system's where it has one, so a killed runner leaves none behind; where it has none, the
    lock says which process holds it, and one that has ended holds it no more. ``runner.lock`` names the holder. A
    RunnerError where another runner holds it, or one on another machine has not taken its name off.
    """
    path = directory / LOCK_NAME
    # in a file of its own: some systems let nobody read a locked file, and the holder's name is there to be read
    lock = FileLock(path.with_name(f".{LOCK_NAME}"), timeout=_LOCK_SECONDS)
    try:
        held = lock.acquire()
    except Timeout:
        raise RunnerError(f"{_describe(_holder(path))} works in {directory} already: wait for it.") from None
    with held, path.open("a+", encoding="utf-8") as file:
        found = _holder(path)
        # Not every shared file system takes a lock of one machine to the others.
        if found and found.get("host") != socket.gethostname():
            raise RunnerError(
                f"{_describe(found)} has not signed off from {directory}, and whether it still works cannot be seen "
                f"from here. If it does not, delete {path}."
            )
        # one of an earlier version of this package holds another lock
        if (working := runner_at_work(directory)) is not None:
            raise RunnerError(f"{working} works in {directory} already: wait for it.")
        file.truncate(0)
        me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": socket.gethostname()}
        file.write(json.dumps(me) + "\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def runner_at_work(directory: Path) -> str | None:
    """Say who works in a campaign's folder, None where nobody does."""
    found = _holder(directory / LOCK_NAME)
    if not found:
        return None
    if found.get("host") == socket.gethostname():
        try:
            # Process ids are used again; the time of its start tells whether it is the same one.
            if abs(psutil.Process(found["pid"]).create_time() - found["started"]) > 1:
                return None
        except psutil.NoSuchProcess:
            return None
    return _describe(found)


def _holder(path: Path) -> dict[str, Any]:
    content = read_if_whole(path)
    return content if {"pid", "started", "host"} <= set(content) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "A runner"
    since = datetime.fromtimestamp(holder["started"], timezone.utc).isoformat(sep=" ", timespec="seconds")
    return f"A runner (process {holder['pid']} on {holder['host']}, since {since})"


def processes_of(settings: Path) -> list[psutil.Process]:
    """Return the processes of a run: its launcher, one for each rank, and what those have started."""
    others = (process for process in psutil.process_iter(["cmdline", "ppid"]) if process.pid != os.getpid())
    # None where this process may not see the command line
    return [process for process in others if str(settings) in (process.info["cmdline"] or ())]


def ranks_of(settings: Path) -> list[psutil.Process]:
    """Return the training processes of a run, without their launcher and their own helpers."""
    training = {process.pid: process for process in processes_of(settings) if LAUNCHER not in process.info["cmdline"]}
    return [process for process in training.values() if process.info["ppid"] not in training]


def interrupt_run(settings: Path, told: Collection[int] = ()) -> set[int]:
    """Press Ctrl-C for a run: its training processes save a checkpoint and stop.

    Those in ``told`` know already; once more would stop them at once. Returns the ids of all that know now.
    """
    knowing = set(told)
    for process in ranks_of(settings):
        if process.pid not in knowing:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGINT)
                knowing.add(process.pid)
    return knowing


def kill_run(settings: Path) -> None:
    """Kill what there is of a run, and wait until it is gone."""
    for process in processes_of(settings):
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait_for_end(processes_of, settings, _KILL_SECONDS)


def _wait_for_end(found: Callable[[Path], Collection[object]], settings: Path, seconds: float) -> None:
    # Not psutil's wait, which would take the exit code of a child away from who has started it.
    until = time.monotonic() + seconds
    while found(settings) and time.monotonic() < until:
        time.sleep(0.05)


def end_orphans(settings: Path, patience: float = ORPHAN_SECONDS) -> int:
    """End what a killed runner has left of a run, and return how many training processes that were.

    First so that it can save a checkpoint, which it gets ``patience`` seconds for, then at once.
    """
    found = len(ranks_of(settings))
    if found:
        interrupt_run(settings)
        _wait_for_end(ranks_of, settings, patience)
    kill_run(settings)
    return found
