"""Class-wise calibration: the probability of a vocabulary token against how often it is the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.devices import float64_device
from ..runtime.files import strict
from .blocks import BLOCKS, BlockSums, check_seen
from .intervals import Interval, block_figures, error_interval

CLASS_BINS = 15


class ClassCalibration(BlockSums):
    """Accumulate the calibration of some tokens of the vocabulary, each one against the rest, in fixed memory.

    For token k over all N scored positions: ``ece_k = sum_b |sum_i in b (1[y_i = k] - p_ik)| / N`` over 15 bins of
    equal width, closed on the right. The class-wise ECE is the mean over the classes. It is meant for the most
    frequent tokens: most of a vocabulary never occurs in an evaluation set.

    Args:
        classes: ``[K]``, ids of the tokens.

    Raises:
        ValueError: if ``classes`` is empty or holds an id twice.

    Source: Kull et al., "Beyond temperature scaling" (NeurIPS 2019), section 2.
    """

    TENSORS = ("positive", "probability", "tokens_of_block")

    def __init__(self, classes: Sequence[int] | Tensor) -> None:
        super().__init__()
        self.classes = torch.as_tensor(classes, dtype=torch.int64).cpu()
        if self.classes.dim() != 1 or not len(self.classes) or len(self.classes.unique()) != len(self.classes):
            raise ValueError(f"classes={self.classes.tolist()} must be different token ids, at least one.")
        shape = (BLOCKS, len(self.classes), CLASS_BINS)
        self.positive = torch.zeros(shape, dtype=torch.int64)
        self.probability = torch.zeros(shape, dtype=torch.float64)
        self.tokens_of_block = torch.zeros(BLOCKS, dtype=torch.int64)

    @property
    def tokens(self) -> int:
        """Return the number of scored positions seen."""
        return int(self.tokens_of_block.sum())

    def update(self, probability: Tensor, labels: Tensor, document: Tensor) -> None:
        """Add scored positions.

        Args:
            probability: ``[n, K]``, of each of the classes at each position, in [0, 1].
            labels: ``[n]``, the label at each position.
            document: ``[n]``, see `TokenCalibration.update`.

        Raises:
            ValueError: if shapes disagree, a probability lies outside [0, 1] or a document is negative. Nothing is
                added then.
        """
        home = float64_device(probability.device)
        p = probability.detach().to(home, torch.float64)
        kinds = len(self.classes)
        if p.shape != (len(labels), kinds) or document.shape != labels.shape:
            raise ValueError(
                f"probability {tuple(p.shape)}, labels {tuple(labels.shape)} and document {tuple(document.shape)} do "
                f"not fit together; expected [n, {kinds}], [n] and [n]."
            )
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError("a class probability lies outside [0, 1], or is NaN.")
        if not bool((document >= 0).all()):
            raise ValueError("document must hold numbers from 0 on, one for each position.")
        self.to(home)
        labels, block = labels.to(home), self.blocks_of(document, len(labels), home)
        # not `p * 15`: that would round values just above an edge down to it
        edges = torch.arange(1, CLASS_BINS, dtype=torch.float64, device=home) / CLASS_BINS
        bins = torch.bucketize(p.contiguous(), edges)
        cell = (block[:, None] * kinds + torch.arange(kinds, device=home)) * CLASS_BINS + bins
        hit = labels[:, None] == self.classes.to(home)
        self.positive.view(-1).index_add_(0, cell.view(-1), hit.view(-1).long())
        self.probability.view(-1).index_add_(0, cell.view(-1), p.reshape(-1))
        self.tokens_of_block.index_add_(0, block, torch.ones_like(block))

    def compute(self) -> dict[int, float]:
        """Return the calibration error of each class by token id; ValueError if no token was seen."""
        return dict(zip(self.classes.tolist(), self._errors(np.ones((1, BLOCKS)))[0].tolist(), strict=True))

    @property
    def ece(self) -> float:
        """Return the class-wise ECE, the mean over the classes."""
        return float(np.mean(list(self.compute().values())))

    def interval(self, *, level: float = 0.95, samples: int = 300, seed: int = 0) -> Interval:
        """Return a confidence interval of the class-wise ECE by resampling blocks; see `intervals.error_interval`.

        Raises:
            ValueError: if no token was seen, or for a level or a number of samples out of range.
        """
        blocks = self.tokens_of_block.cpu().numpy()
        drawn = block_figures(lambda weights: self._errors(weights).mean(1), blocks, level, samples, seed)
        return error_interval(self.ece, drawn, level, (0.0, 1.0))

    def _errors(self, weights: np.ndarray) -> np.ndarray:
        """Return the error of each class, ``[samples, K]``, where block b counts ``weights[sample, b]`` times."""
        check_seen(self.tokens)
        gaps = (self.positive.double() - self.probability).cpu().numpy()
        tokens = weights @ self.tokens_of_block.cpu().numpy()
        drawn = np.tensordot(weights, gaps, axes=1)
        return np.abs(drawn).sum(-1) / tokens[:, None]

    def as_dict(self) -> dict[str, Any]:
        """Return the mean, its interval and the error of each class, as written to a calibration file."""
        return {
            "ece": self.ece,
            "interval": strict(self.interval()),
            "bins": CLASS_BINS,
            "classes": {str(token): error for token, error in self.compute().items()},
        }
