"""How a training process ended, from its exit code, its last lines, and what the kernel says."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Lines of the log that are looked at: a launcher's own traceback stands below the cause.
LOG_LINES = 200

_FULL_DISK = ("No space left on device", "Disk quota exceeded", "os error 28)", "[Errno 28]", "[Errno 122]")
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "MemoryError",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
# The exceptions below are what a launcher adds: they say that a process failed, not why.
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*|error: .*)$")
_LAUNCHER_ERRORS = ("subprocess.CalledProcessError", "torch.distributed.elastic")
_CODES = (
    re.compile(r"CalledProcessError: .*returned non-zero exit status (\d+)\."),
    re.compile(r"CalledProcessError: .*died with <Signals\.\w+: (\d+)>\."),
    re.compile(r"^\s*exitcode\s*:\s*(-?\d+)"),
)
_LITTLE_SPACE = 2**20
# Windows has not all of them.
_SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGKILL"))
_SIGKILL = 9
# a shell's codes for an interrupt and for SIGTERM, and what somebody may send; other signals are crashes
_STOPPED = frozenset({130, 143, *(-number for number in _SIGNALS)})


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Args:
        status: one of `records.STATUSES`.
        message: why, in a sentence; empty for ``ok``.
        disk_full: whether the disk had no room left, which every other run would meet too.
    """

    status: str
    message: str = ""
    disk_full: bool = False


def classify(
    exit_code: int,
    lines: Sequence[str],
    *,
    asked: bool = False,
    memory_kills: int | None = None,
    free_bytes: int | None = None,
) -> Ending:
    """Say how a run ended.

    Args:
        exit_code: of the launcher; negative for a signal.
        lines: the last ones of its log.
        asked: whether the runner has interrupted it.
        memory_kills: processes that the kernel killed for want of memory meanwhile; None where it does not say.
        free_bytes: room left on the disk; None where unknown.
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
        return Ending("oom", f"killed by the kernel for want of memory (it has killed {memory_kills} meanwhile)")
    if last.startswith("FloatingPointError"):
        return Ending("diverged", last.partition(": ")[2] or last)
    if asked:
        return Ending("interrupted", "interrupted; it goes on from its newest checkpoint")
    if code in _STOPPED:
        return Ending("interrupted", _signalled(code, memory_kills))
    if free_bytes is not None and free_bytes < _LITTLE_SPACE:
        # torch does not pass on why it could not write, and the log may have had no room for more either
        what = f": {last}" if last else ""
        return Ending("failed", f"the disk is full ({free_bytes} bytes free){what}", disk_full=True)
    what = last or (lines[-1] if lines else "it wrote nothing")
    return Ending("failed", f"exit code {code}: {what}")


def real_exit_code(exit_code: int, lines: Sequence[str]) -> int:
    """Return the exit code of the training process, which its launcher tells in words only.

    Args:
        exit_code: of the launcher.
        lines: the last ones of its log.
    """
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
        return "killed (signal 9): by somebody, or by the kernel for want of memory, which does not say so here"
    return "killed (signal 9) by somebody: the kernel has killed nothing for want of memory meanwhile"


def _first(errors: Sequence[str], parts: Sequence[str]) -> str | None:
    return next((error for error in errors if any(part in error for part in parts)), None)


def memory_kill_count(root: Path = Path("/")) -> int | None:
    """Return how many processes the kernel has killed for want of memory so far, None where it does not say.

    That of the own control group where there is one, else that of the whole machine.

    Args:
        root: of the file system.
    """
    group = ""
    try:
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                group = line[3:].strip("/")
    except OSError:
        pass
    for path in (root / "sys/fs/cgroup" / group / "memory.events", root / "proc/vmstat"):
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        except (OSError, ValueError):
            continue
    return None
