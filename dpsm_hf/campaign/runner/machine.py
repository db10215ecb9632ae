"""What a run was made on: device, versions, the state of the code. Found without importing torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...runtime.environment import ROOT, versions
from ...runtime.processor import processor_name


def machine_facts(devices: Sequence[str] = (), root: Path = ROOT) -> dict[str, Any]:
    """Return ``device``, ``versions``, ``cores``, and ``commit`` and ``dirty`` where the code is a git checkout."""
    names = gpu_names()
    device = ", ".join(names.get(d, f"GPU {d}") for d in devices) if devices else processor_name()
    return {"device": device, "cores": cores(), "versions": versions(), **code_state(root)}


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def gpu_names() -> dict[str, str]:
    """Return the names of the NVIDIA GPUs by index; empty where there is none."""
    listed = _output(["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader"])
    pairs = (line.split(",", 1) for line in (listed or "").splitlines() if "," in line)
    return {index.strip(): name.strip() for index, name in pairs}


def visible_devices() -> tuple[str, ...]:
    """Return the GPUs that runs may use: those of CUDA_VISIBLE_DEVICES, or all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part.strip() for part in named.split(",") if part.strip() and part.strip() != "-1")
    return tuple(gpu_names())


def code_state(root: Path) -> dict[str, Any]:
    """Return ``commit`` and ``dirty`` of a git checkout; nothing where the folder is none."""
    git = ("git", "-C", str(root))
    top, _, commit = (_output([*git, "rev-parse", "--show-toplevel", "HEAD"]) or "").partition("\n")
    # An installation below somebody else's checkout is not theirs.
    if not commit or Path(top).resolve() != root.resolve():
        return {}
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": bool(changed)} if changed is not None else {}


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
