"""What measurements share: peak memory of a call, processes of their own, percentiles, and the name of the machine."""

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

#: Environment of a process whose memory is measured: malloc gives memory of at least this size back at once, so that
#: a high-water mark is a sum of live tensors. Times are not to be measured in it.
EXACT_MEMORY: Mapping[str, str] = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_M_MMAP_THRESHOLD = -3


def peak_above(run: Callable[[], object], device: torch.device) -> float | None:
    """Return the MiB that a call needs at its peak beyond what was there before; None where that is not known.

    On CUDA what PyTorch's allocator had handed out at most. On a CPU under Linux the kernel's high-water mark of the
    process; meanwhile malloc gives back at once what is freed, from 64 KiB on: the mark is then a peak of live
    tensors, and not of what an allocator keeps for later.

    Args:
        run: the call.
        device: that it computes on.
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
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)  # where glibc's own rule ends up with large tensors
    return process_memory("VmHWM") - before


def process_memory(name: str) -> float:
    """Return a line of /proc/self/status in MiB: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of at least one value by linear interpolation; the share 0.5 is the median."""
    return float(np.quantile(values, share))


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return the median, the tenth and the ninetieth percentile of values, and how many there are."""
    shares = {"median": 0.5, "p10": 0.1, "p90": 0.9}
    return {**{name: percentile(values, share) for name, share in shares.items()}, "samples": len(values)}


def device_name(device: torch.device) -> str:
    """Return a device's name for a record: the GPU's, or the processor's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} cores, {processor_name()}"


def commit() -> str:
    """Return the short commit hash of this package, marked where its files differ from it.

    Where it is no checkout, a hash of its sources: equal for equal code.
    """
    if _git("ls-files", "--error-unmatch", "version.py") is None:
        return f"source-{source_hash()}"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{_git('rev-parse', '--short', 'HEAD')}" + ("-dirty" if changed else "")


def source_hash() -> str:
    """Return 12 hexadecimal digits of the SHA-256 of this package's sources, for telling one state from another."""
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
    """Return the environment of a child that measures: it finds this package, and malloc does as the measure needs."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # as in the runs of a campaign, see `runtime.child_process`: on cores that others use too, spinning threads crawl
    environment.setdefault("GOMP_SPINCOUNT", "30000")
    return {**environment, **EXACT_MEMORY} if exact_memory else environment
