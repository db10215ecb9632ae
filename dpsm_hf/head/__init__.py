"""The fused head: loss and gradients from hidden states, chunk by chunk, without a full tensor of logits."""

from typing import Any

__all__ = ["linear_scoring_loss"]


def __getattr__(name: str) -> Any:
    if name == "linear_scoring_loss":  # imported at first use, because it is slow to import
        from . import scoring_loss

        return scoring_loss.linear_scoring_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
