"""The processor that this process runs on, as Linux tells it in /proc/cpuinfo; known without importing torch."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def processor_fact(name: str) -> str | None:
    """Return what /proc/cpuinfo says in the line ``model name``, ``vendor_id`` … of the first core; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), None)


def processor_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    return processor_fact("model name") or platform.processor() or platform.machine()
