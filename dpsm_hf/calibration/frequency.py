"""Predicted mass against labels by frequency of the tokens: whether the rare ones get too much or too little."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.devices import float64_device
from ..runtime.files import strict
from .blocks import BLOCKS, BlockSums, check_seen
from .intervals import Interval, basic_interval, block_figures


class FrequencyCalibration(BlockSums):
    """Accumulate the probability that a model gives to buckets of tokens, in fixed memory.

    For bucket g over all N scored positions: ``share_g = sum_i [y_i in g] / N``,
    ``mass_g = sum_i sum_{j in g} p_ij / N``, and ``gap_g = mass_g - share_g``: above 0 the model predicts the tokens
    of the bucket more often than they occur. The gaps of all buckets add up to 0.

    Args:
        buckets: how many there are.
    """

    TENSORS = ("labels", "mass", "label_probability")

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.labels = torch.zeros(BLOCKS, buckets, dtype=torch.int64)
        self.mass = torch.zeros(BLOCKS, buckets, dtype=torch.float64)
        self.label_probability = torch.zeros(BLOCKS, buckets, dtype=torch.float64)

    @property
    def tokens(self) -> int:
        """Return the number of scored positions seen."""
        return int(self.labels.sum())

    def update(self, mass: Tensor, bucket: Tensor, label_probability: Tensor, document: Tensor) -> None:
        """Add scored positions.

        Args:
            mass: ``[n, G]``, the probability of each bucket at each position.
            bucket: ``[n]`` int64, that of the label.
            label_probability: ``[n]``, of the label.
            document: ``[n]``, see `TokenCalibration.update`.

        Raises:
            ValueError: if shapes disagree, or a probability is NaN or outside [0, 1]. Nothing is added then.
        """
        number = self.labels.shape[1]
        if mass.shape != (len(bucket), number) or not bucket.shape == label_probability.shape == document.shape:
            raise ValueError(
                f"mass {tuple(mass.shape)}, bucket {tuple(bucket.shape)}, label_probability "
                f"{tuple(label_probability.shape)} and document {tuple(document.shape)} do not fit together; expected "
                f"[n, {number}] and three times [n]."
            )
        home = float64_device(mass.device)
        wide = mass.detach().to(home).double()
        if not bool(((wide >= 0) & (wide <= 1 + 1e-3)).all()):  # by rounding a little above 1
            raise ValueError("the probability of a bucket lies outside [0, 1], or is NaN.")
        self.to(home)
        block, bucket = self.blocks_of(document, len(bucket), home), bucket.to(home)
        cell = block * number + bucket
        self.labels.view(-1).index_add_(0, cell, torch.ones_like(cell))
        self.label_probability.view(-1).index_add_(0, cell, label_probability.detach().to(home).double())
        self.mass.index_add_(0, block, wide)

    def gap_intervals(self, *, level: float = 0.95, samples: int = 300, seed: int = 0) -> list[Interval]:
        """Return a confidence interval of the gap of each bucket by resampling blocks; see `intervals.bootstrap`.

        Raises:
            ValueError: if no token was seen, or for a level or a number of samples out of range.
        """
        check_seen(self.tokens)
        tokens = self.labels.sum(1).cpu().numpy()
        over = (self.mass - self.labels.double()).cpu().numpy()
        gaps = over.sum(0) / tokens.sum()

        def drawn(weights: np.ndarray) -> np.ndarray:
            resampled: np.ndarray = (weights @ over) / (weights @ tokens)[:, None]
            return resampled

        resamples = block_figures(drawn, tokens, level, samples, seed).reshape(-1, len(gaps))
        return [
            basic_interval(float(gap), column, level, (-1.0, 1.0))
            for gap, column in zip(gaps, resamples.T, strict=True)
        ]

    def as_list(self) -> list[dict[str, Any]]:
        """Return the figures of each bucket, as written to a calibration file.

        ``tokens`` (labels in it), ``share``, ``mass``, ``gap`` with its ``interval``, and ``label_probability``, the
        mean probability of those labels (None where there are none).
        """
        intervals = self.gap_intervals()
        labels, mass, own = (part.sum(0).cpu().numpy() for part in (self.labels, self.mass, self.label_probability))
        found = []
        for count, predicted, probability, interval in zip(labels, mass / labels.sum(), own, intervals, strict=True):
            share = float(count / labels.sum())
            figures = {"share": share, "mass": float(predicted), "gap": float(predicted) - share, "interval": interval}
            mean = float(probability / count) if count else np.nan
            found.append({"tokens": int(count), **strict({**figures, "label_probability": mean})})
        return found
