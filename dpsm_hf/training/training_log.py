"""What the next entry of the training log says: token means since the last one, scheduled numbers, gradient norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules.losses import TokenScores
from ..runtime.devices import widest_float
from ..runtime.distributed import sum_over_processes
from .checks import describe_non_finite

_COLUMNS = ("nll", "brier", "correct", "confidence")
_NAMES = {"correct": "token_accuracy"}


class TrainingLog:
    """Sum the statistics of trained tokens on the device, without waiting for it, until an entry is written.

    It also knows the micro-batch that was scored last, which is where a loss that is not finite comes from.
    """

    def __init__(self) -> None:
        #: What the schedules gave for the last micro-batch, by name: alpha of a mix, and others that have one.
        self.knobs: dict[str, float] = {}
        #: The gradient norms of the components, for the next entry.
        self.component_norms: dict[str, float] = {}
        self._sums: Tensor | None = None
        self._step, self._micro_batch = -1, 0
        self._last: tuple[TokenScores, Tensor] | None = None

    def begin_micro_batch(self, step: int) -> bool:
        """Note that a micro-batch begins, and return whether it is the first of its optimizer step.

        Args:
            step: optimizer steps done so far.
        """
        self._micro_batch = self._micro_batch + 1 if step == self._step else 1
        self._step = step
        return self._micro_batch == 1

    def add(self, scores: TokenScores, targets: Tensor) -> None:
        """Add the tokens of a micro-batch; neither argument may hold a graph."""
        self._last = scores, targets
        scored = scores.scored.to(scores.nll.dtype)
        # the entropy is there only where something else asked for it: for this alone it is not computed
        known = torch.zeros_like(scored) if scores.entropy is None else scored
        gap = known if scores.entropy is None else scores.nll - scores.entropy
        columns = torch.stack([scored, *(getattr(scores, name) for name in _COLUMNS), gap, known])
        sums = columns.sum(-1, dtype=widest_float(columns.device))  # the sum of many steps keeps its digits
        self._sums = sums if self._sums is None else self._sums + sums

    def reset(self) -> None:
        """Forget the tokens that were added."""
        self._sums = None

    def entry(self, device: torch.device, step: int, vocab_size: int | None) -> tuple[dict[str, float], int]:
        """Return what the entry says and the number of tokens, over all processes, and begin anew.

        Every process must call this. Without a scored token the means are left out.

        Args:
            device: where the processes add up.
            step, vocab_size: as `non_finite` takes them.

        Raises:
            FloatingPointError: if a mean is NaN; see `non_finite`.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(3 + len(_COLUMNS), dtype=widest_float(device), device=device)
        self.reset()
        tokens, *totals, gap, known = sum_over_processes(sums).tolist()
        found = dict(self.knobs)
        for name, total in zip(_COLUMNS, totals, strict=True) if tokens else ():
            found[_NAMES.get(name, name)] = total / tokens
        if tokens and known == tokens:
            found["nll_entropy_gap"] = gap / tokens
        if any(value != value for value in found.values()):
            raise self.non_finite(float("nan"), step, vocab_size, updated=True)
        found |= self.component_norms
        self.component_norms = {}
        return found, int(tokens)

    def non_finite(
        self, loss: float, step: int, vocab_size: int | None, *, updated: bool = False
    ) -> FloatingPointError:
        """Return the error for a loss of the last micro-batch that is NaN or infinite, with its place and cause.

        Args:
            loss: the loss.
            step: optimizer steps done so far.
            vocab_size: of the model, if it tells.
            updated: whether the optimizer may have used its gradient.
        """
        place = f"optimizer step {step + 1}, micro-batch {self._micro_batch}"
        scores, targets = self._last or (None, None)
        return FloatingPointError(describe_non_finite(loss, place, scores, targets, vocab_size, updated))
