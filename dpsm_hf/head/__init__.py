"""From hidden states to loss and gradients, chunk by chunk, without a tensor of logits."""

from typing import Any

__all__ = ["linear_scoring_loss"]


def __getattr__(name: str) -> Any:
    if name == "linear_scoring_loss":  # at its first use: it is slow to import
        from . import scoring_loss

        return scoring_loss.linear_scoring_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
