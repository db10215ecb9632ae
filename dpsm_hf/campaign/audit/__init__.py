"""What a training step of every variation costs in time, memory, operations and energy."""

from typing import Any

__all__ = ["run_audit", "table"]


def __getattr__(name: str) -> Any:
    # at their first use: they are slow to import
    if name == "run_audit":
        from .audit import run_audit

        return run_audit
    if name == "table":
        from .tables import table

        return table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
