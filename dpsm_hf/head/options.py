"""The two kinds of output layer, a linear one and any other module, and the options for scoring inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from ..rules.extra_statistics import ExtraStatistics
from ..rules.post_ops import PostOps
from ..rules.scoring_rules import Objective

Implementation = Literal["auto", "torch", "triton", "reference"]

#: Values of the argument ``fused_head``.
FUSED_MODES = ("auto", "on", "off")


@dataclass(frozen=True)
class HeadOptions:
    """The options for scoring inside a head: the scoring rule, the post-ops, the chunk size.

    Args:
        objective: the scoring rule to differentiate; None computes the statistics only.
        post: the post-ops that turn the head's output into logits.
        entropy: also compute each token's entropy.
        chunk_tokens: rows of a chunk; None chooses for the device.
        impl: which implementation of the row pass; see `linear_scoring_loss`.
        extra: further statistics to compute from the logits of each chunk; only where no gradient is computed.
        varentropy: with entropy, also compute the variance of ``log p_j`` under p.
    """

    objective: Objective | None
    post: PostOps = field(default_factory=PostOps)
    entropy: bool = False
    chunk_tokens: int | None = None
    impl: Implementation = "auto"
    extra: ExtraStatistics | None = None
    varentropy: bool = False

    def __post_init__(self) -> None:
        if self.impl not in get_args(Implementation):
            raise ValueError(f"impl={self.impl!r} is unknown; choose one of {', '.join(get_args(Implementation))}.")
        if self.chunk_tokens is not None and (not isinstance(self.chunk_tokens, int) or self.chunk_tokens < 1):
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} must be a whole number from 1 on; None chooses for the device."
            )


@dataclass(frozen=True)
class LinearHead:
    """An output layer that is ``F.linear(hidden, weight, bias)``."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """Return V."""
        return self.weight.shape[0]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that may need a gradient."""
        return (self.weight, self.bias)


@dataclass(frozen=True)
class ModuleHead:
    """Any other output layer, such as one with LoRA or quantised weights; run chunk by chunk under autograd.

    Args:
        forward: from hidden states ``[n, D]`` to the head's output ``[n, V]``.
        parameters: every tensor that ``forward`` depends on and that may need a gradient; the gradient of any other
            would be lost.
        vocab_size: V.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor | None, ...]
    vocab_size: int


Head = LinearHead | ModuleHead
