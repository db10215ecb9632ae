"""The accumulator of depths: tokens by layer and by block of documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calibration.blocks import BLOCKS, BlockSums, check_seen
from ...calibration.intervals import Interval, basic_interval, block_figures
from ...runtime.devices import float64_device
from ...runtime.files import strict


class DepthTally(BlockSums):
    """Count tokens by depth and by block of documents, in fixed memory.

    Args:
        layers: L of the decoder, `DepthReader.layers`.

    Raises:
        ValueError: if that is no number of layers.
    """

    TENSORS = ("count",)

    def __init__(self, layers: int) -> None:
        super().__init__()
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"layers={layers} must be a whole number from 1 on; DepthReader.layers tells it.")
        self.layers = layers
        self.count = torch.zeros(BLOCKS, layers + 1, dtype=torch.int64)

    @property
    def tokens(self) -> int:
        """Return the number of tokens seen."""
        return int(self.count.sum())

    def update(self, depths: Tensor, document: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            depths: int ``[n]`` in 0..L.
            document: int ``[n]``, see `TokenCalibration.update`; None takes every token for a document of its own.

        Raises:
            ValueError: if shapes disagree, or a depth or a document is out of range. Nothing is added then.
        """
        shape = None if document is None else tuple(document.shape)
        if depths.dtype.is_floating_point or depths.dim() != 1 or shape not in (None, tuple(depths.shape)):
            raise ValueError(
                f"depths must be whole numbers [n] and document [n] or None, but they are {depths.dtype} "
                f"{tuple(depths.shape)} and {shape}."
            )
        home = float64_device(depths.device)
        depths = depths.detach().to(home, torch.int64)
        if not bool(((depths >= 0) & (depths <= self.layers)).all()):
            raise ValueError(
                f"depths lie between {int(depths.min())} and {int(depths.max())}; they must lie in 0..{self.layers}, "
                "the layers of this tally."
            )
        if document is not None and not bool((document >= 0).all()):
            raise ValueError("document must hold numbers from 0 on, one for each token.")
        block = self.blocks_of(document, len(depths), home)
        self.to(home)
        self.count.view(-1).index_add_(0, block * (self.layers + 1) + depths, torch.ones_like(depths))

    @property
    def mean(self) -> float:
        """Return the expected depth, ``sum_l l * n_l / n`` in layers; ValueError if no token was seen."""
        return float(self._means(np.ones((1, BLOCKS)))[0])

    def interval(self, *, level: float = 0.95, samples: int = 300, seed: int = 0) -> Interval:
        """Return a confidence interval of the mean by resampling blocks of documents; see `intervals.bootstrap`.

        Raises:
            ValueError: if no token was seen, or for a level or a number of samples out of range.
        """
        drawn = block_figures(self._means, self.count.sum(1).cpu().numpy(), level, samples, seed)
        return basic_interval(self.mean, drawn, level, (0.0, float(self.layers)))

    def _means(self, weights: np.ndarray) -> np.ndarray:
        """Return the mean depth ``[samples]`` for so many copies of each block."""
        check_seen(self.tokens)
        # products of float64, exact for counts below 2**53
        drawn = weights @ self.count.cpu().numpy().astype(np.float64)
        return drawn @ np.arange(self.layers + 1) / drawn.sum(1)

    def as_dict(self) -> dict[str, Any]:
        """Return what a record holds; ``share`` is ``mean / layers``, 1 where every token needs all layers.

        Raises:
            ValueError: if no token was seen.
        """
        return {
            "mean": self.mean, "interval": strict(self.interval()), "layers": self.layers, "tokens": self.tokens,
            "counts": self.count.sum(0).tolist(), "share": self.mean / self.layers,
        }  # fmt: skip
