"""Figures: reliability diagrams and training curves, drawn from data that other rooms compute."""

from typing import Any

__all__ = ["ReliabilityDisplay"]


def __getattr__(name: str) -> Any:
    if name == "ReliabilityDisplay":  # at its first use: it is slow to import
        from . import reliability

        return reliability.ReliabilityDisplay
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
