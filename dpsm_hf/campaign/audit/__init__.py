"""What a training step of every variation costs in time, memory, operations and energy."""

from .audit import run_audit, table

__all__ = ["run_audit", "table"]
