"""The gradient of the output layer's weight, summed over chunks of rows in float32 whatever the dtype of the model."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Rows of the weight whose low-precision product is added up at a time on a CPU: it stays in the cache.
_BLOCK = 8192


class WeightGradient:
    """Sum ``gradient.T @ hidden`` over chunks, in float32 (float64 for float64): bfloat16 sums lose whole chunks.

    Equivalent plain torch: ``total += gradient.float().T @ hidden.float()``, but each product is computed in the
    dtype of its factors.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the product of one chunk: ``gradient`` ``[n, V]``, ``hidden`` ``[n, D]``."""
        transposed = gradient.t()
        if hidden.dtype in (torch.float32, torch.float64):
            if self._total is None:
                self._total = torch.mm(transposed, hidden)
            else:
                self._total.addmm_(transposed, hidden)
        elif _adds_in_float32(hidden.device, hidden.dtype):
            if self._total is None:
                self._total = torch.mm(transposed, hidden, out_dtype=torch.float32)
            else:
                torch.addmm(self._total, transposed, hidden, out_dtype=torch.float32, out=self._total)
        else:
            first = self._total is None
            if self._total is None:
                shape = (gradient.shape[1], hidden.shape[1])
                self._total = torch.empty(shape, dtype=torch.float32, device=hidden.device)
            for start in range(0, gradient.shape[1], _BLOCK):
                product = transposed[start : start + _BLOCK] @ hidden
                block = self._total[start : start + _BLOCK]
                # copying instead of adding to zeros saves a pass over the whole weight
                block.copy_(product) if first else block.add_(product)

    def total(self) -> Tensor | None:
        """Return the sum in float32 (float64 for float64), or None if nothing was added."""
        return self._total


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this device's matrix product adds low-precision factors to a float32 matrix in place."""
    if device.type != "cuda":
        return False
    try:
        total = torch.ones(16, 16, device=device)
        ones = torch.ones(16, 16, device=device, dtype=dtype)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        return bool((total == 17).all())
    except (RuntimeError, TypeError):
        return False
