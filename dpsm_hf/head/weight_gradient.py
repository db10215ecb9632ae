"""The gradient of the output layer's weight, summed over chunks of rows in float32 whatever the dtype of the model."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .matmul import by_onednn, product

# Rows of the weight whose product is added up at a time on a CPU: it stays in the cache.
_BLOCK = 2048

# Float32 blocks of this size are given back to the system one by one; glibc keeps what is freed in smaller ones.
_FREED_BYTES = 40 * 2**20


class WeightGradient:
    """Sum ``gradient.T @ hidden`` over chunks, in float32 (float64 for float64): bfloat16 sums lose whole chunks.

    Equivalent plain torch: ``total += gradient.float().T @ hidden.float()``, but each product is computed in the
    dtype of its factors.

    Args:
        weight: ``[V, D]``, whose gradient it is.
        whole: whether there is one chunk alone. Its product is then computed in the weight's own dtype: matrix
            products of bfloat16 sum in float32 and round once, as adding up in float32 does.
    """

    def __init__(self, weight: Tensor, whole: bool = False) -> None:
        self._weight = weight
        self._whole = whole and weight.dtype == torch.bfloat16
        self._blocks: list[Tensor | None] = []

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the product of one chunk: ``gradient`` ``[n, V]``, ``hidden`` ``[n, D]``."""
        transposed = gradient.t()
        first = not self._blocks
        if self._whole and hidden.dtype == self._weight.dtype:
            assert first, "one chunk was announced"
            self._blocks = [product(transposed, hidden.t())]
            return
        if first:
            self._blocks = list(self._empty_blocks(hidden))
        if hidden.dtype in (torch.float32, torch.float64) and not by_onednn(hidden, len(self._weight)):
            (total,) = self._blocks
            assert total is not None
            torch.mm(transposed, hidden, out=total) if first else total.addmm_(transposed, hidden)
        elif _adds_in_float32(hidden.device, hidden.dtype):
            (total,) = self._blocks
            assert total is not None
            if first:
                torch.mm(transposed, hidden, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, transposed, hidden, out_dtype=torch.float32, out=total)
        else:
            if hidden.dtype == torch.float16:
                hidden = hidden.float()  # the gradients of a frequent token add up to more than float16 holds
            # oneDNN is at its best on contiguous rows
            fast = by_onednn(hidden, len(self._weight))
            columns = hidden.t().contiguous() if fast else hidden.t()
            parts = [part for block in self._blocks if block is not None for part in block.split(_BLOCK)]
            for part, rows in zip(parts, transposed.split([len(part) for part in parts]), strict=True):
                rows = rows.to(hidden.dtype)
                term = product(rows.contiguous() if fast else rows, columns)
                # copying instead of adding to zeros saves a pass over the whole weight
                part.copy_(term) if first else part.add_(term)

    def _empty_blocks(self, hidden: Tensor) -> Iterator[Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows, columns = self._weight.shape
        # a low-precision result is made block by block from float32 blocks that are freed as it grows
        in_blocks = (
            self._weight.dtype.itemsize < wide.itemsize and hidden.device.type == "cpu" and hidden.dtype != wide
        )
        size = max(1, _FREED_BYTES // (columns * wide.itemsize)) if in_blocks else rows
        for start in range(0, rows, size):
            yield torch.empty(min(size, rows - start), columns, dtype=wide, device=hidden.device)

    def finish(self, factor: Tensor | None, keep: bool) -> Tensor:
        """Return ``factor * sum`` in the weight's dtype; with ``keep`` it can be asked for again."""
        blocks, dtype = self._blocks, self._weight.dtype
        if not blocks:
            return torch.zeros_like(self._weight)
        if not keep:
            self._blocks = []
        if self._whole and len(blocks) == 1 and blocks[0] is not None and blocks[0].dtype == dtype:
            result = blocks[0].clone() if keep else blocks[0]
            if factor is not None:
                for part in result.split(_BLOCK):  # the wide copies that `scaled` makes are small ones here
                    part.copy_(scaled(part, factor, keep=True))
            return result
        if len(blocks) == 1:
            return scaled(blocks.pop() if not keep else blocks[0], factor, keep).to(dtype)  # type: ignore[arg-type]
        result = torch.empty_like(self._weight)
        start = 0
        for i, block in enumerate(blocks):
            assert block is not None  # only those of an unkept sum are freed
            result[start : start + len(block)] = scaled(block, factor, keep)
            start += len(block)
            if not keep:
                blocks[i] = None
        return result


def scaled(tensor: Tensor, factor: Tensor | None, keep: bool) -> Tensor:
    """Return ``factor * tensor`` (None is 1): a new tensor if ``keep``, else made of the old one's memory."""
    if factor is not None and tensor.dtype.itemsize < factor.dtype.itemsize:
        # on a GPU the factor would be rounded to the tensor's dtype first
        return (tensor.to(factor.dtype) * factor).to(tensor.dtype)
    if keep:
        return tensor.clone() if factor is None else tensor * factor
    return tensor if factor is None else tensor.mul_(factor)


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
