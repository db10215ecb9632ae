"""`BlockSums`, the base of the accumulators: tensors of sums by block of documents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..runtime.devices import float64_device

#: Documents are assigned to this many blocks by their number; the bootstrap resamples blocks.
BLOCKS = 128

_Sums = TypeVar("_Sums", bound="BlockSums")


class BlockSums:
    """An accumulator in fixed memory: the tensors named in `TENSORS` hold sums by block of documents, ``[BLOCKS, …]``.

    A token without a document counts as a document of its own; such tokens go to the blocks in turn.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._undocumented = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors of the accumulator by name."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def reduce(self: _Sums, function: Callable[[Tensor], Tensor]) -> _Sums:
        """Return a new accumulator with ``function`` applied to each tensor, such as a sum over processes."""
        result = copy.copy(self)
        result._undocumented = 0
        for name, tensor in self.state_dict().items():
            setattr(result, name, function(tensor))
        return result

    def to(self: _Sums, device: torch.device) -> _Sums:
        """Move the accumulator to a device with float64 and return it; on MPS it stays on the host."""
        home = float64_device(device)
        for name, tensor in self.state_dict().items():
            setattr(self, name, tensor.to(home))
        return self

    def blocks_of(self, document: Tensor | None, tokens: int, device: torch.device) -> Tensor:
        """Return the block of each of ``tokens`` tokens, int64 ``[tokens]``, by its document's number if given."""
        if document is not None:
            return document.to(device, torch.int64) % BLOCKS
        first = self._undocumented
        self._undocumented = (first + tokens) % BLOCKS
        return torch.arange(first, first + tokens, device=device) % BLOCKS


def check_seen(tokens: int) -> None:
    """Raise ValueError if no token was counted."""
    if not tokens:
        raise ValueError("no scored token was seen: every label is ignored, or nothing was evaluated.")
