"""Make sure that one runner at a time works in a campaign's folder, and end the processes that a killed one left."""

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
#: Seconds that an orphaned training process gets to save a checkpoint before it is killed.
ORPHAN_SECONDS = 60.0
_KILL_SECONDS = 10.0
# Seconds to wait for the lock: enough for a second try after its holder has ended.
_LOCK_SECONDS = 0.5


class RunnerError(RuntimeError):
    """A reason why the whole campaign cannot run, in a sentence."""


@contextmanager
def campaign_lock(directory: Path) -> Iterator[None]:
    """Lock a campaign's folder for this process, during a context.

    The operating system's file lock is used, which ends with its process, so a killed runner leaves none behind. Where
    there is no such lock, the lock file has the id of its process, and counts only while that runs. ``runner.lock``
    names the holder.

    Raises:
        RunnerError: if another runner holds the lock, or ``runner.lock`` names a runner on another machine.
    """
    path = directory / LOCK_NAME
    # the lock is a file of its own: some systems do not let others read a locked file, and runner.lock is to be read
    lock = FileLock(path.with_name(f".{LOCK_NAME}"), timeout=_LOCK_SECONDS)
    try:
        held = lock.acquire()
    except Timeout:
        raise RunnerError(f"{_describe(_holder(path))} works in {directory} already: wait for it to end.") from None
    with held, path.open("a+", encoding="utf-8") as file:
        found = _holder(path)
        # not every shared file system shows the lock of one machine to the others
        if found and found.get("host") != socket.gethostname():
            raise RunnerError(
                f"{_describe(found)} has not released {directory}, and from this machine it cannot be seen whether it "
                f"still runs. If it does not, delete {path}."
            )
        # a runner of an earlier version of this package holds another lock
        if (working := runner_at_work(directory)) is not None:
            raise RunnerError(f"{working} works in {directory} already: wait for it to end.")
        file.truncate(0)
        me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": socket.gethostname()}
        file.write(json.dumps(me) + "\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def runner_at_work(directory: Path) -> str | None:
    """Return a description of the runner that works in a campaign's folder; None if there is none."""
    found = _holder(directory / LOCK_NAME)
    if not found:
        return None
    if found.get("host") == socket.gethostname():
        try:
            # process ids are reused; the start time shows whether it is the same process
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
    """Return the processes of a run, found by its settings file: launcher, ranks, and the helpers of the ranks."""
    others = (process for process in psutil.process_iter(["cmdline", "ppid"]) if process.pid != os.getpid())
    # the command line is None if this process may not see it
    return [process for process in others if str(settings) in (process.info["cmdline"] or ())]


def ranks_of(settings: Path) -> list[psutil.Process]:
    """Return the training processes (ranks) of a run, without launcher and helpers."""
    training = {process.pid: process for process in processes_of(settings) if LAUNCHER not in process.info["cmdline"]}
    return [process for process in training.values() if process.info["ppid"] not in training]


def interrupt_run(settings: Path, told: Collection[int] = ()) -> set[int]:
    """Send SIGINT to the training processes of a run: they save a checkpoint and stop.

    Args:
        settings: the run's settings file.
        told: ids of the processes that have got the signal before; a second one would stop them at once.

    Returns:
        The ids of all processes that have got it now.
    """
    signalled = set(told)
    for process in ranks_of(settings):
        if process.pid not in signalled:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGINT)
                signalled.add(process.pid)
    return signalled


def kill_run(settings: Path) -> None:
    """Kill all processes of a run, and wait until they are gone."""
    for process in processes_of(settings):
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait_for_end(processes_of, settings, _KILL_SECONDS)


def _wait_for_end(found: Callable[[Path], Collection[object]], settings: Path, seconds: float) -> None:
    # not psutil's wait: it would take the exit code of a child, which whoever started it still needs
    until = time.monotonic() + seconds
    while found(settings) and time.monotonic() < until:
        time.sleep(0.05)


def end_orphans(settings: Path, patience: float = ORPHAN_SECONDS) -> int:
    """End the processes of a run that a killed runner left behind, and return how many training processes there were.

    They get ``patience`` seconds to save a checkpoint, then they are killed.
    """
    found = len(ranks_of(settings))
    if found:
        interrupt_run(settings)
        _wait_for_end(ranks_of, settings, patience)
    kill_run(settings)
    return found
