"""The matrix products of the fused head, and the gradient of the output layer's weight as their sum over chunks.

PyTorch computes float32 products on a CPU with MKL, which does not use all of AVX-512 on AMD processors; oneDNN is up
to twice as fast there. It is called by the operator that `torch.compile` emits for linear layers of frozen weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..runtime.processor import processor_fact

# Multiplications in a product (n * k * m) from which on oneDNN is faster.
_WORTH_IT = 2**22

# Rows of the weight's gradient computed at a time on a CPU, so that the partial product stays in the cache.
_BLOCK = 2048

# glibc returns a freed block of this size to the system at once; freed blocks of up to 32 MiB it keeps.
_FREED_BYTES = 40 * 2**20


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return ``left @ right.T + bias``, ``[n, m]``, by the fastest library for these factors.

    Args:
        left: ``[n, k]``, any strides.
        right: ``[m, k]``, any strides.
        bias: ``[m]``.
        out: may be used for the result; oneDNN allocates its own.
    """
    if by_onednn(left, len(right)):
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    if bias is None:
        return torch.mm(left, right.t(), out=out)
    return torch.addmm(bias, left, right.t(), out=out)


def by_onednn(left: Tensor, columns: int) -> bool:
    """Return whether `product` uses oneDNN for ``left`` ``[n, k]`` and a result ``[n, columns]``."""
    return (
        left.dtype == torch.float32
        and left.device.type == "cpu"
        and left.numel() * columns >= _WORTH_IT
        and bool(torch.backends.mkldnn.enabled)
        and _onednn_is_faster()
    )


@functools.cache
def _onednn_is_faster() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        amd = processor_fact("vendor_id") == "AuthenticAMD"
        one = torch.ones(1, 1)
        return amd and float(torch.ops.mkldnn._linear_pointwise(one, one, one[0], "none", [], "")) == 2.0
    except (AttributeError, RuntimeError, TypeError):  # another system, or the operator has changed
        return False


class WeightGradient:
    """The gradient of the output layer's weight: ``gradient.T @ hidden`` summed over chunks in float32.

    In bfloat16 the sum would round away the contribution of whole chunks; float64 is summed in float64. Equivalent
    plain torch: ``total += gradient.float().T @ hidden.float()``, except that each product is computed in the dtype of
    its factors.

    Args:
        weight: the weight, ``[V, D]``.
        whole: whether there is only one chunk. A bfloat16 product is then returned as it is: matrix products of
            bfloat16 sum in float32 and round once, so a float32 sum would give nothing more.
    """

    def __init__(self, weight: Tensor, whole: bool = False) -> None:
        self._weight = weight
        self._whole = whole and weight.dtype == torch.bfloat16
        self._blocks: list[Tensor] = []

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the product of one chunk: ``gradient`` ``[n, V]``, ``hidden`` ``[n, D]``."""
        transposed = gradient.t()
        first = not self._blocks
        if self._whole and hidden.dtype == self._weight.dtype:
            assert first, "one chunk was announced"
            self._blocks = [product(transposed, hidden.t())]
            return
        if first:
            self._blocks = self._empty_blocks(hidden)
        # oneDNN is fastest on contiguous rows
        fast = by_onednn(hidden, len(self._weight))
        exact = hidden.dtype in (torch.float32, torch.float64)
        if (exact and not fast) or _adds_in_float32(hidden.device, hidden.dtype):
            (total,) = self._blocks
            dtype: dict[str, Any] = {} if exact else {"out_dtype": torch.float32}
            if first:
                torch.mm(transposed, hidden, out=total, **dtype)
            else:
                torch.addmm(total, transposed, hidden, out=total, **dtype)
            return
        if hidden.dtype == torch.float16:
            hidden = hidden.float()  # the gradients of a frequent token add up to more than float16 can hold
            fast = by_onednn(hidden, len(self._weight))
        columns = hidden.t().contiguous() if fast else hidden.t()
        parts = [part for block in self._blocks for part in block.split(_BLOCK)]
        for part, rows in zip(parts, transposed.split([len(part) for part in parts]), strict=True):
            rows = rows.to(hidden.dtype)
            term = product(rows.contiguous() if fast else rows, columns)
            # copying the first product, instead of adding it to zeros, saves a pass over the whole weight
            part.copy_(term) if first else part.add_(term)

    def _empty_blocks(self, hidden: Tensor) -> list[Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows, columns = self._weight.shape
        size = rows
        if self._weight.dtype.itemsize < wide.itemsize and hidden.device.type == "cpu" and hidden.dtype != wide:
            # `finish` converts block by block and frees each, so float32 and low-precision copies never coexist whole
            size = max(1, _FREED_BYTES // (columns * wide.itemsize))
        return [hidden.new_empty(min(size, rows - i), columns, dtype=wide) for i in range(0, rows, size)]

    def finish(self, factor: Tensor | None, keep: bool) -> Tensor:
        """Return ``factor * sum`` in the weight's dtype (None is 1); with ``keep`` the sum stays for another call."""
        blocks, dtype = self._blocks, self._weight.dtype
        if not blocks:
            return torch.zeros_like(self._weight)
        if not keep:
            self._blocks = []
        if self._whole and blocks[0].dtype == dtype:
            result = blocks[0].clone() if keep else blocks[0]
            if factor is not None:
                for part in result.split(_BLOCK):  # block by block, since `scaled` makes a float32 copy
                    part.copy_(scaled(part, factor, keep=True))
            return result
        if len(blocks) == 1:
            return scaled(blocks[0], factor, keep).to(dtype)
        result = torch.empty_like(self._weight)
        start = 0
        for _ in range(len(blocks)):
            block = blocks.pop(0)
            result[start : start + len(block)] = scaled(block, factor, keep)
            start += len(block)
            if keep:
                blocks.append(block)
        return result


def scaled(tensor: Tensor, factor: Tensor | None, keep: bool) -> Tensor:
    """Return ``factor * tensor`` (None is 1): a new tensor with ``keep``, else the input may be overwritten."""
    if factor is not None and tensor.dtype.itemsize < factor.dtype.itemsize:
        # multiplied directly, a GPU would first round the factor to the tensor's dtype
        return (tensor.to(factor.dtype) * factor).to(tensor.dtype)
    if keep:
        return tensor.clone() if factor is None else tensor * factor
    return tensor if factor is None else tensor.mul_(factor)


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this device can add a low-precision matrix product to a float32 matrix in place."""
    if device.type != "cuda":
        return False
    try:
        total = torch.ones(16, 16, device=device)
        ones = torch.ones(16, 16, device=device, dtype=dtype)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        return bool((total == 17).all())
    except (RuntimeError, TypeError):
        return False
