"""The post-ops: the scale and the soft cap that some models apply to the output of their head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PostOps:
    """The scale and the soft cap that turn the output of a model's head into its logits.

    ``logits = softcap * tanh(scale * z / softcap)``; without ``softcap``, ``logits = scale * z``.

    Args:
        scale: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``.
        softcap: Gemma 2's ``final_logit_softcapping``.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, Tensor) or isinstance(self.softcap, Tensor):
            raise ValueError(
                "logit_scale and logit_softcap must be numbers: a tensor's gradient would be lost. Multiply the "
                "hidden states by a scale that is trained."
            )
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(
                f"logit_softcap={self.softcap} must be positive and finite; None leaves the logits uncapped."
            )

    def __call__(self, z: Tensor) -> Tensor:
        """Return the logits for the head's output ``z``, of any shape."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
