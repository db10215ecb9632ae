"""`TokenCalibration`, the streaming accumulator: counts of tokens by cell of confidence and block of documents."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.devices import float64_device
from .blocks import BLOCKS, BlockSums, check_seen
from .curve import CalibrationCurve
from .grid import CELLS, EDGES, GRID_BINS, UNIFORM_BIN, check_bins
from .intervals import Interval, bootstrap, wilson
from .metrics import RANGES, SCORES, SUMMED, Totals, adaptive_bins, all_metrics, in_bins

# A score may lie this far outside its range by rounding in the head.
_ROUNDING = 1e-3

# With tokens in fewer blocks than this, the variance over blocks is not estimated.
_FEW_BLOCKS = 10


class TokenCalibration(BlockSums):
    """Accumulate the calibration of tokens in fixed memory: int64 counts and float64 sums on a grid of confidence.

    Every metric is over the scored tokens and about the predicted (top) label. Counts are exact; the accumulator takes
    ten megabytes for any number of tokens.

    Example::

        calibration = TokenCalibration()
        calibration.update(confidence=[0.9, 0.6], correct=[1, 0], nll=[0.1, 2.3])
        calibration.compute()["ece_15"]
        calibration.intervals()["ece_15"]
    """

    TENSORS = ("count", "correct", "confidence", "sums", "counts")

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(BLOCKS, CELLS, dtype=torch.int64)
        self.correct = torch.zeros(BLOCKS, CELLS, dtype=torch.int64)
        self.confidence = torch.zeros(BLOCKS, CELLS, dtype=torch.float64)
        self.sums = torch.zeros(BLOCKS, len(SUMMED), dtype=torch.float64)
        # tokens for which each score was given: the denominator of its mean
        self.counts = torch.zeros(BLOCKS, len(SUMMED), dtype=torch.int64)
        self._edges: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Return the number of tokens seen."""
        return int(self.count.sum())

    def update(self, *, confidence: Any, correct: Any, mask: Any = None, document: Any = None, **scores: Any) -> None:
        """Add a batch of tokens.

        Args:
            confidence: ``max_j p_j`` of each token, in [0, 1]; ``[N]`` or any other shape.
            correct: same shape, 1 or True if the predicted token is the label.
            mask: same shape, False for tokens to leave out (padding).
            document: same shape, the number (int, from 0 on) of each token's document; tokens of a document are
                resampled together. None makes every token a document of its own.
            scores: any of ``nll`` (nats), ``brier``, ``spherical``, ``entropy`` (nats), ``varentropy`` (the variance
                of ``log p_j`` under p), ``label_probability``, ``label_bytes`` (length of the label's text, needs
                ``nll``), same shape. A missing ``label_probability`` is computed from ``nll``.

        Raises:
            ValueError: if shapes disagree, a confidence lies outside [0, 1] or is NaN, ``correct`` is neither 0 nor
                1, a score is NaN, unknown or outside its range, or a document is negative. Nothing is added then.
        """
        if unknown := sorted(set(scores) - set(SCORES)):
            close = get_close_matches(unknown[0], (*SCORES, "mask", "document"), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown scores {unknown}; TokenCalibration knows {', '.join(SCORES)}.{hint}")
        if "label_bytes" in scores and "nll" not in scores:
            raise ValueError("label_bytes needs the nll of the same tokens: the two make bits per byte.")
        columns = {"confidence": confidence, "correct": correct, **scores}
        if document is not None:
            columns["document"] = document
        tensors = {name: _as_tensor(value) for name, value in columns.items()}
        shape = tensors["confidence"].shape
        keep = None if mask is None else torch.as_tensor(mask).bool()
        for name, tensor in (tensors if keep is None else {**tensors, "mask": keep}).items():
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but confidence has {tuple(shape)}.")
        device = tensors["confidence"].device
        values = {name: tensor.to(device).reshape(-1) for name, tensor in tensors.items()}
        if keep is not None:
            kept = keep.to(device).reshape(-1).nonzero().squeeze(-1)
            values = {name: value.index_select(0, kept) for name, value in values.items()}
        home = float64_device(device)
        values = {name: value.to(home) for name, value in values.items()}
        conf = values["confidence"].to(torch.float64).contiguous()  # bucketize would copy a column with a warning
        right = values["correct"].to(torch.int64)
        for name in scores:
            values[name] = values[name].to(torch.float64)
        _check(values, conf, right, scores)
        self.to(home)
        block = self.blocks_of(values.get("document"), conf.numel(), home)
        if self._edges is None or self._edges.device != home:
            self._edges = torch.from_numpy(EDGES[1:-1]).to(home)
        cell = block * CELLS + torch.bucketize(conf, self._edges)
        one = torch.ones((), dtype=torch.int64, device=home).expand(conf.shape)
        self.count.view(-1).index_add_(0, cell, one)
        self.correct.view(-1).index_add_(0, cell, right)
        self.confidence.view(-1).index_add_(0, cell, conf)
        summed = {name: values[name] for name in SCORES if name in values}
        if "nll" in summed and "label_probability" not in summed:
            summed["label_probability"] = (-summed["nll"]).exp()
        summed["top_label_brier"] = (conf - right).square()
        for i, name in enumerate(SUMMED):
            if name in summed:
                self.sums[:, i].index_add_(0, block, summed[name])
                self.counts[:, i].index_add_(0, block, one)

    def merge(self, other: TokenCalibration) -> TokenCalibration:
        """Add the tokens of another accumulator to this one, and return this one."""
        for name, mine in self.state_dict().items():
            mine += other.state_dict()[name].to(mine.device)
        return self

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the content by that of another accumulator's `state_dict`.

        Raises:
            ValueError: if a tensor is missing or has another shape or dtype.
        """
        for name, mine in self.state_dict().items():
            if name not in state or state[name].shape != mine.shape or state[name].dtype != mine.dtype:
                found = "missing" if name not in state else f"{state[name].dtype} {tuple(state[name].shape)}"
                raise ValueError(f"{name} of the state is {found}; expected {mine.dtype} {tuple(mine.shape)}.")
        for name in self.TENSORS:
            setattr(self, name, state[name].clone())

    # ---- results -------------------------------------------------------------------------------------------------

    def totals(self) -> Totals:
        """Return the sums over all blocks, as numpy arrays."""
        return Totals(*(tensor.sum(0).cpu().numpy() for tensor in self.state_dict().values()))

    def block_totals(self) -> Totals:
        """Return the sums of each block, as numpy arrays with the blocks as first axis."""
        return Totals(*(tensor.cpu().numpy() for tensor in self.state_dict().values()))

    def compute(self) -> dict[str, float]:
        """Return every metric by name, without prefix; those of scores that were never given are left out.

        docs/calibration.md has the formula, the bins and the known bias of each. ``nll``, ``brier``, ``spherical``,
        ``entropy`` are token means, ``perplexity`` is ``exp(nll)``, ``signed_gap`` is mean confidence minus accuracy
        (positive: over-confident), ``ece_N`` the expected calibration error over N equal-width bins, ``ece_N_null``
        the ECE expected of a perfectly calibrated model with the same confidences.

        Raises:
            ValueError: if no token was seen.
        """
        metrics = {name: float(value) for name, value in all_metrics(self._some_totals()).items()}
        metrics["tokens"] = int(metrics["tokens"])
        return metrics

    def intervals(self, *, level: float = 0.95, samples: int = 300, seed: int = 0) -> dict[str, Interval]:
        """Return a confidence interval of each metric by resampling blocks of documents; see `intervals.bootstrap`.

        Documents are assigned to 128 blocks by their number. With fewer than ten documents the intervals are too
        narrow.

        Raises:
            ValueError: if no token was seen, or for a level or a number of samples out of range.
        """
        self._some_totals()
        return bootstrap(self.block_totals(), level=level, samples=samples, seed=seed)

    def _some_totals(self) -> Totals:
        check_seen(self.tokens)
        return self.totals()

    def curve(self, bins: int = 15) -> CalibrationCurve:
        """Return the reliability diagram with that many equal-width bins.

        Raises:
            ValueError: if the grid of 3,000 cannot be cut into that many bins.
        """
        check_bins(bins)
        return self._curve(UNIFORM_BIN // (GRID_BINS // bins), np.arange(bins + 1) / bins)

    def adaptive_curve(self, bins: int = 15) -> CalibrationCurve:
        """Return the reliability diagram with bins of about equal numbers of tokens, each of whole cells of the grid.

        Raises:
            ValueError: for less than one bin.
        """
        if not isinstance(bins, (int, np.integer)) or bins < 1:
            raise ValueError(f"bins={bins} must be a whole number from 1 on.")
        index = adaptive_bins(self.totals().count, bins)
        return self._curve(index, EDGES[np.searchsorted(index, np.arange(bins + 1))])

    def _curve(self, index: np.ndarray, edges: np.ndarray) -> CalibrationCurve:
        bins = len(edges) - 1
        member = np.zeros((CELLS, bins))
        member[np.arange(CELLS), index] = 1
        blocks = self.block_totals()
        # a float64 matmul is exact for counts below 2**53
        count, correct, confidence = (part @ member for part in (blocks.count, blocks.correct, blocks.confidence))
        total, right = count.sum(0), correct.sum(0)
        occupied = np.where(total > 0, total, np.nan)
        low, high = wilson(right, total)
        if int((count.sum(1) > 0).sum()) >= _FEW_BLOCKS:
            # tokens of a document are correlated: the design effect widens the interval; it is never let narrow it
            effect = np.sqrt(np.maximum(1.0, _design_effect(count, correct)))
            share = right / occupied
            low, high = np.clip(share - (share - low) * effect, 0, 1), np.clip(share + (high - share) * effect, 0, 1)
        return CalibrationCurve(
            edges=edges,
            confidence=confidence.sum(0) / occupied,
            accuracy=right / occupied,
            count=total.astype(np.int64),
            low=low,
            high=high,
            histogram=in_bins(self.totals().count, 100),
        )


def calibration_curve(confidence: Any, correct: Any, *, bins: int = 15, document: Any = None) -> CalibrationCurve:
    """Return the reliability diagram of tokens from their confidences and whether they are correct.

    Args:
        confidence, correct, document: ``[N]``, see `TokenCalibration.update`.
        bins: equal-width bins, a divisor of 3,000.

    Raises:
        ValueError: as `TokenCalibration.update` and `TokenCalibration.curve`.
    """
    calibration = TokenCalibration()
    calibration.update(confidence=confidence, correct=correct, document=document)
    return calibration.curve(bins)


def _design_effect(count: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return the design effect of each bin, ``[bins]``: the variance of its accuracy relative to independent tokens.

    By the ratio estimator of survey sampling, ``B / (B - 1) * sum_k (r_k - a n_k)**2 / (n a (1 - a))``, for B blocks
    with n_k tokens, of which r_k are correct; n is their sum and a the accuracy.
    """
    blocks = int((count.sum(1) > 0).sum())
    total = count.sum(0)
    share = correct.sum(0) / np.maximum(total, 1)
    spread = ((correct - share * count) ** 2).sum(0) * blocks / (blocks - 1)
    independent = total * share * (1 - share)
    return np.where(independent > 0, spread / np.where(independent > 0, independent, 1), 1.0)


def _check(values: dict[str, Tensor], conf: Tensor, right: Tensor, scores: dict[str, Any]) -> None:
    """Raise ValueError for values out of range; synchronises with the device once if there are none."""
    wrong = {"confidence": ~((conf >= 0) & (conf <= 1))}  # True for NaN too
    wrong["correct"] = (values["correct"] != right) | ((right != 0) & (right != 1))
    for name in scores:
        low, high = RANGES[name]
        wrong[name] = ~((values[name] >= low - _ROUNDING) & (values[name] <= high + _ROUNDING))
    if (document := values.get("document")) is not None:
        wrong["document"] = (document < 0) | (document != document.to(torch.int64))
    if not bool(torch.stack([mask.any() for mask in wrong.values()]).any()):
        return
    name = next(name for name, mask in wrong.items() if bool(mask.any()))
    first = float(values[name][wrong[name]][0])
    if name == "confidence":
        raise ValueError(f"confidence {first} lies outside [0, 1]; it must be the largest probability.")
    if name == "correct":
        raise ValueError("correct must hold 0 or 1 (False or True) for each token.")
    if name == "document":
        raise ValueError("document must hold whole numbers from 0 on, one for each token.")
    if bool((broken := torch.isnan(values[name])).any()):
        raise ValueError(f"{name} is NaN for {int(broken.sum())} tokens, first token {int(broken.nonzero()[0])}.")
    low, high = RANGES[name]
    raise ValueError(f"{name} {first} lies outside [{low:g}, {high:g}], where its values are.")


def _as_tensor(value: Any) -> Tensor:
    # numpy makes a list float64; torch would round 0.1 to float32, which lies on the other side of a bin edge
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
