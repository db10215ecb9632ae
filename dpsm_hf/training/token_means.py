"""Running sums over the tokens trained since the last log, kept on the device and divided once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules.losses import TokenScores
from ..runtime.devices import widest_float
from ..runtime.distributed import sum_over_processes

_COLUMNS = ("nll", "brier", "correct", "confidence")
_NAMES = {"correct": "token_accuracy"}


class TokenTally:
    """Sum the statistics of scored tokens without ever waiting for the device, until they are drained."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, scores: TokenScores) -> None:
        """Add the tokens of one micro-batch."""
        columns = torch.stack([scores.scored.to(scores.nll.dtype), *(getattr(scores, name) for name in _COLUMNS)])
        sums = columns.sum(-1, dtype=widest_float(columns.device))  # the sum of many steps keeps its digits
        self._sums = sums if self._sums is None else self._sums + sums

    def reset(self) -> None:
        """Forget everything."""
        self._sums = None

    def drain(self, device: torch.device) -> tuple[dict[str, float], int]:
        """Return the token means over all processes and the number of tokens, and begin anew.

        Every process must call this. Without a scored token the means are left out.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(1 + len(_COLUMNS), dtype=widest_float(device), device=device)
        self.reset()
        tokens, *totals = sum_over_processes(sums).tolist()
        if not tokens:
            return {}, 0
        means = zip(_COLUMNS, totals, strict=True)
        return {_NAMES.get(name, name): total / tokens for name, total in means}, int(tokens)
