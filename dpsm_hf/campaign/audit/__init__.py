"""The efficiency audit: time, memory, floating-point operations and energy of a step of every variation."""

from .audit import run_audit, table

__all__ = ["run_audit", "table"]
