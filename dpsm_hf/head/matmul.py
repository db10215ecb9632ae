"""Matrix products of the fused head, by the faster of the two libraries that PyTorch's CPU build carries.

PyTorch hands float32 products to MKL, which on AMD processors does not use all of AVX-512: oneDNN's are up to twice as
fast there. It is reached by the operator that `torch.compile` emits for linear layers of frozen weights.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..runtime.processor import processor_fact

# Multiplications from which on oneDNN is the faster one.
_WORTH_IT = 2**22


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return ``left @ right.T + bias``; ``F.linear`` for any strides.

    Args:
        left: ``[n, k]``.
        right: ``[m, k]``.
        bias: ``[m]``.
        out: ``[n, m]``; what is returned may lie there, or in memory of its own.
    """
    if by_onednn(left, len(right)):
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    if bias is None:
        return torch.mm(left, right.t(), out=out)
    return torch.addmm(bias, left, right.t(), out=out)


def by_onednn(left: Tensor, columns: int) -> bool:
    """Return whether the product of ``left`` ``[n, k]`` with a matrix of so many columns goes to oneDNN."""
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
