"""Helpers for measuring: peak memory of a call, a measuring process's environment, percentiles, machine, commit."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..runtime.environment import PACKAGE
from ..runtime.processor import processor_name

MIB = 2**20

#: Environment for a process whose memory is measured: malloc returns freed blocks from this size (bytes) on to the
#: system at once, so that the peak of the process is the peak of its live tensors. It is too slow to measure times.
EXACT_MEMORY: Mapping[str, str] = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_M_MMAP_THRESHOLD = -3


def peak_above(run: Callable[[], object], device: torch.device) -> float | None:
    """Return the peak memory of a call in MiB, beyond what was in use before; None if it cannot be measured.

    On CUDA it is the peak of PyTorch's allocator. On a CPU under Linux it is the kernel's peak of the resident memory
    of the process; during the call malloc returns freed blocks of 64 KiB and more to the system at once, so that the
    peak is that of live tensors.

    Args:
        run: the call.
        device: the device it computes on.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / MIB
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        run()
        return None
    libc.mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
    before = process_memory("VmRSS")
    try:
        run()
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)  # the value that glibc itself settles at with large tensors
    return process_memory("VmHWM") - before


def process_memory(name: str) -> float:
    """Return an entry of /proc/self/status in MiB, such as ``VmRSS`` (resident memory) or ``VmHWM`` (its peak)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the quantile ``share`` of at least one value by linear interpolation; 0.5 is the median."""
    return float(np.quantile(values, share))


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return the median, the 10th and the 90th percentile of values, and their number."""
    shares = {"median": 0.5, "p10": 0.1, "p90": 0.9}
    return {**{name: percentile(values, share) for name, share in shares.items()}, "samples": len(values)}


def device_name(device: torch.device) -> str:
    """Return a device's name for a record: the GPU's model, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} cores, {processor_name()}"


def commit() -> str:
    """Return the short commit hash of this package, with ``-dirty`` if its files differ from the commit.

    Without a checkout it is ``source-`` and a hash of the sources, which is equal for equal code.
    """
    if _git("ls-files", "--error-unmatch", "version.py") is None:
        return f"source-{source_hash()}"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{_git('rev-parse', '--short', 'HEAD')}" + ("-dirty" if changed else "")


def source_hash() -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def own_process_environment(exact_memory: bool) -> dict[str, str]:
    """Return the environment for a measuring child process, in which it can import this package.

    Args:
        exact_memory: add `EXACT_MEMORY`, for measuring memory.
    """
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # as in the runs of a campaign (`runtime.child_process`): on shared cores, spinning threads are very slow
    environment.setdefault("GOMP_SPINCOUNT", "30000")
    return {**environment, **EXACT_MEMORY} if exact_memory else environment
