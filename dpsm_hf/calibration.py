"""Token-level, top-label calibration from sufficient statistics: fixed memory, exact counts, no stored logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Divisible by 10, 15, 20, 25, 30, 50, 100, ...: any of these numbers of equal bins follows exactly from the grid.
GRID_BINS = 3000
SCORES = ("nll", "brier", "spherical", "entropy")
METRICS = (
    *SCORES, "perplexity", "token_accuracy", "confidence", "signed_gap", "ece_10", "ece_15", "ece_100", "adaptive_ece",
    "mce", "tokens",
)  # fmt: skip


@dataclass(frozen=True)
class CalibrationCurve:
    """The data of a reliability diagram; bins are closed on the right, ``(edge, next edge]``, the first also at 0.

    Args:
        edges: ``[bins + 1]`` from 0 to 1.
        confidence: ``[bins]`` mean confidence of the tokens in each bin, NaN where there is none.
        accuracy: ``[bins]`` share of them that is right, NaN where there is none.
        count: ``[bins]`` int64.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def ece(self) -> float:
        """Return the expected calibration error, ``sum_b n_b / n * |accuracy_b - confidence_b|`` (Naeini 2015)."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.count * gaps) / max(1, self.count.sum()))

    @property
    def mce(self) -> float:
        """Return the maximum calibration error, ``max_b |accuracy_b - confidence_b|`` over the bins with tokens."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nanmax(gaps)) if np.isfinite(gaps).any() else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, with None for the mean of an empty bin: what JSON can hold."""

        def plain(values: np.ndarray) -> list[float | None]:
            return [None if math.isnan(v) else float(v) for v in values]

        return {
            "bins": len(self.count),
            "edges": [float(e) for e in self.edges],
            "confidence": plain(self.confidence),
            "accuracy": plain(self.accuracy),
            "count": [int(c) for c in self.count],
        }


class TokenCalibration:
    """Accumulate the calibration of tokens in fixed memory: int64 counts and float64 sums on a grid of confidence.

    Every figure is over scored tokens, of the predicted (top) label. Counts are exact at any number of tokens.

    Example::

        calibration = TokenCalibration()
        calibration.update(confidence=[0.9, 0.6], correct=[1, 0], nll=[0.1, 2.3])
        calibration.compute()["ece_15"]
    """

    def __init__(self) -> None:
        self.count = torch.zeros(GRID_BINS, dtype=torch.int64)
        self.correct = torch.zeros(GRID_BINS, dtype=torch.int64)
        self.confidence = torch.zeros(GRID_BINS, dtype=torch.float64)
        self.sums = torch.zeros(len(SCORES), dtype=torch.float64)
        # tokens for which each score was given: a mean is over these alone
        self.counts = torch.zeros(len(SCORES), dtype=torch.int64)

    @property
    def tokens(self) -> int:
        """Return the number of tokens seen."""
        return int(self.count.sum())

    def update(self, *, confidence: Any, correct: Any, mask: Any = None, **scores: Any) -> None:
        """Add tokens.

        Args:
            confidence: ``[N]`` (or any shape), ``max_j p_j`` of each token, in [0, 1].
            correct: same shape, 1 or True where the predicted token is the label.
            mask: same shape, False for tokens that do not count (padding).
            scores: any of ``nll`` (nats), ``brier``, ``spherical``, ``entropy`` (nats), same shape.

        Raises:
            ValueError: if shapes disagree, a confidence lies outside [0, 1] or is NaN, ``correct`` is neither 0 nor
                1, or a score is unknown.
        """
        if unknown := set(scores) - set(SCORES):
            raise ValueError(f"unknown scores {sorted(unknown)}; TokenCalibration knows {', '.join(SCORES)}.")
        columns = {"confidence": confidence, "correct": correct, **scores}
        tensors = {name: _as_tensor(value) for name, value in columns.items()}
        shape = tensors["confidence"].shape
        keep = torch.ones(shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
        for name, tensor in (*tensors.items(), ("mask", keep)):
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but confidence has {tuple(shape)}.")
        keep = keep.to(tensors["confidence"].device)
        # MPS has no float64: there the (few) numbers per token travel to the host
        home = torch.device("cpu") if keep.device.type == "mps" else keep.device
        values = {name: tensor[keep].to(home) for name, tensor in tensors.items()}
        conf = values["confidence"].to(torch.float64)
        if not bool(((conf >= 0) & (conf <= 1)).all()):  # False for NaN too
            wrong = conf[~((conf >= 0) & (conf <= 1))][0]
            raise ValueError(f"confidence {float(wrong)} lies outside [0, 1]; it must be the largest probability.")
        right = values["correct"].to(torch.int64)
        if not bool((values["correct"] == right).all() & ((right == 0) | (right == 1)).all()):
            raise ValueError("correct must hold 0 or 1 (False or True) for each token.")
        self.to(home)
        inner_edges = torch.arange(1, GRID_BINS, dtype=torch.float64, device=home) / GRID_BINS
        bins = torch.bucketize(conf, inner_edges)
        self.count += torch.bincount(bins, minlength=GRID_BINS)
        self.correct.index_add_(0, bins, right)
        self.confidence.index_add_(0, bins, conf)
        for i, name in enumerate(SCORES):
            if name in values:
                self.sums[i] += values[name].to(torch.float64).sum()
                self.counts[i] += conf.numel()

    def merge(self, other: TokenCalibration) -> TokenCalibration:
        """Add the tokens of another accumulator to this one and return it."""
        for name, mine in self.state_dict().items():
            mine += other.state_dict()[name].to(mine.device)
        return self

    def reduce(self, function: Callable[[Tensor], Tensor]) -> TokenCalibration:
        """Return a new accumulator whose tensors are ``function`` of these: a sum over processes, say."""
        result = TokenCalibration()
        result.load_state_dict({name: function(tensor) for name, tensor in self.state_dict().items()})
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that hold everything this accumulator knows."""
        names = ("count", "correct", "confidence", "sums", "counts")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` of another accumulator returned."""
        for name in self.state_dict():
            setattr(self, name, state[name].clone())

    def to(self, device: torch.device) -> TokenCalibration:
        """Move the accumulator to a device with float64 and return it; on MPS it stays on the host."""
        home = torch.device("cpu") if device.type == "mps" else device
        if self.count.device != home:
            self.load_state_dict({name: tensor.to(home) for name, tensor in self.state_dict().items()})
        return self

    def curve(self, bins: int = 15) -> CalibrationCurve:
        """Return the reliability diagram with that many equal-width bins.

        Raises:
            ValueError: if the grid of 3,000 cannot be cut into that many bins.
        """
        if bins < 1 or GRID_BINS % bins:
            raise ValueError(f"bins={bins} does not divide the grid of {GRID_BINS}; use 10, 15, 20, 50 or 100, say.")
        return self._curve(np.repeat(np.arange(bins), GRID_BINS // bins), np.arange(bins + 1) / bins)

    def adaptive_curve(self, bins: int = 15) -> CalibrationCurve:
        """Return the diagram with bins of equal mass, as far as cells of 1/3000 of confidence can be divided."""
        count = self.count.cpu().numpy()
        middle = np.cumsum(count) - count / 2
        index = np.minimum((middle * bins / max(1, count.sum())).astype(np.int64), bins - 1)
        edges = np.searchsorted(index, np.arange(bins + 1)) / GRID_BINS
        return self._curve(index, edges)

    def _curve(self, index: np.ndarray, edges: np.ndarray) -> CalibrationCurve:
        bins = len(edges) - 1
        count, correct, confidence = np.zeros(bins, np.int64), np.zeros(bins, np.int64), np.zeros(bins)
        np.add.at(count, index, self.count.cpu().numpy())
        np.add.at(correct, index, self.correct.cpu().numpy())
        np.add.at(confidence, index, self.confidence.cpu().numpy())
        occupied = np.where(count > 0, count, np.nan)
        return CalibrationCurve(edges, confidence / occupied, correct / occupied, count)

    def compute(self) -> dict[str, float]:
        """Return every metric, without prefix; scores that were never given are left out.

        ``nll``, ``brier``, ``spherical``, ``entropy`` are token means, ``perplexity`` is ``exp(nll)``,
        ``signed_gap`` is mean confidence minus accuracy (positive: over-confident), ``ece_N`` the expected calibration
        error over N equal-width bins, ``adaptive_ece`` over 15 bins of equal mass, ``mce`` the largest gap of 15.

        Raises:
            ValueError: if no token was seen.
        """
        tokens = self.tokens
        if tokens == 0:
            raise ValueError("no scored token was seen: every label is ignored, or nothing was evaluated.")
        metrics: dict[str, float] = {}
        for name, total, count in zip(SCORES, self.sums.tolist(), self.counts.tolist(), strict=True):
            if count:
                metrics[name] = total / count
        if "nll" in metrics:
            metrics["perplexity"] = math.inf if metrics["nll"] > 700 else math.exp(metrics["nll"])
        metrics["token_accuracy"] = int(self.correct.sum()) / tokens
        metrics["confidence"] = float(self.confidence.sum()) / tokens
        metrics["signed_gap"] = metrics["confidence"] - metrics["token_accuracy"]
        for bins in (10, 15, 100):
            metrics[f"ece_{bins}"] = self.curve(bins).ece
        metrics["adaptive_ece"] = self.adaptive_curve().ece
        metrics["mce"] = self.curve().mce
        metrics["tokens"] = tokens
        return metrics


def _as_tensor(value: Any) -> Tensor:
    # numpy keeps a list's numbers in float64; torch would round 0.1 to float32, over the edge of its bin
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def calibration_curve(confidence: Any, correct: Any, *, bins: int = 15) -> CalibrationCurve:
    """Return the reliability diagram of tokens from their confidences and whether they are right.

    Args:
        confidence, correct: ``[N]``, see `TokenCalibration.update`.
        bins: equal-width bins, a divisor of 3,000.

    Raises:
        ValueError: as `TokenCalibration.update` and `TokenCalibration.curve`.
    """
    calibration = TokenCalibration()
    calibration.update(confidence=confidence, correct=correct)
    return calibration.curve(bins)
