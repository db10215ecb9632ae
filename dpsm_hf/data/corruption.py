"""Corruption of training targets: flipped label tokens and swapped summaries.

Both are pure functions of seed, optimizer step and content, without random generators. So the same content gets the
same corruption in a step, whatever the micro-batches, processes and padding, and also after resuming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import has_length

from .hashing import BITS, MASK, combine, row_hash

IGNORED = -100
REPLACEMENTS = ("uniform", "unigram")

# One independent stream of hashes for each decision.
_WHICH_STEPS, _HOW_MANY, _WHICH_TOKENS, _WHAT_INSTEAD, _WHICH_PAIRS, _SWAP_ORDER, _SWAP_SIZE = range(1, 8)

# Largest sum of weights, so that a 32-bit hash times the sum fits into an int64.
_MOST_WEIGHT = 2**30


def exact_share(name: str, share: float) -> Fraction:
    """Return a share as an exact fraction with a denominator of at most a million: 0.05 is 1/20.

    Raises:
        ValueError: naming the share, if it is above 1, or not above 0 once rounded to such a fraction.
    """
    fraction = Fraction(share).limit_denominator(10**6) if 0 < share <= 1 else Fraction(0)
    if not fraction:
        raise ValueError(f"{name} is {share}; it is a share above 0 and at most 1. Leave it out for none.")
    return fraction


class TargetFlips:
    """Replace a share of the scored labels in a share of the optimizer steps; the inputs stay clean.

    Steps: of every ``1 / steps`` successive steps a hash picks one, so that of the first ``n`` steps ``n * steps`` are
    flipped, to within one. Tokens: a row of ``n`` scored labels gets ``share * n`` flips, rounded up or down by a hash
    so that the mean is exact. A replacement always differs from the label it replaces.

    Args:
        share: of the scored labels of a flipped step, in (0, 1].
        weights: int64 ``[V]``, relative frequency of each token as a replacement, from `replacement_weights`.
        steps: share of the optimizer steps, in (0, 1].
        seed: of the hashes.

    Raises:
        ValueError: if a share is out of range, or fewer than two tokens can be drawn.
    """

    def __init__(self, share: float, weights: Tensor, *, steps: float = 1.0, seed: int = 0) -> None:
        self.share = exact_share("the share of flipped targets", share)
        self.steps = exact_share("the share of flipped steps", steps)
        self.seed = seed
        if int((weights > 0).sum()) < 2:
            raise ValueError(
                "fewer than two tokens could replace a flipped target, so it could not differ from what it replaces; "
                "use more text, a larger vocabulary or uniform replacement."
            )
        total = int(weights.sum())
        if total > _MOST_WEIGHT:
            weights = (weights.double() * (_MOST_WEIGHT / total)).ceil().long()
        self._weights = weights.long().cpu()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def flips_step(self, step: int) -> bool:
        """Return whether labels are flipped in a step, counted from 0."""
        return step == self._flipped_step_of(step * self.steps.numerator // self.steps.denominator)

    def steps_before(self, step: int) -> int:
        """Return in how many of the first ``step`` steps labels are flipped."""
        if step < 1:
            return 0
        stretch = (step - 1) * self.steps.numerator // self.steps.denominator
        return stretch + (self._flipped_step_of(stretch) < step)

    def _flipped_step_of(self, stretch: int) -> int:
        """Return the one step that is flipped in a stretch of ``1 / steps`` successive steps, both from 0 on."""
        first, after = (-(-i * self.steps.denominator // self.steps.numerator) for i in (stretch, stretch + 1))
        return int(first + (combine(self.seed & MASK, _WHICH_STEPS, stretch) * (after - first) >> BITS))

    def __call__(self, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the flipped targets of a step, and a bool tensor of the same shape that marks the flipped ones.

        Args:
            targets: int64 ``[..., T]``, -100 where nothing is scored; not changed.
            step: the optimizer step, from 0 on.

        Nothing in it synchronises with the device.
        """
        if not self.flips_step(step):
            return targets, torch.zeros_like(targets, dtype=torch.bool)
        rows = targets.reshape(-1, targets.shape[-1])
        scored = rows != IGNORED
        content, place, share = row_hash(rows, scored)[:, None], scored.cumsum(-1), self.share

        def hashes(purpose: int, *values: Tensor) -> Tensor:
            found: Tensor = combine(combine(self.seed & MASK, purpose, step), content, *values)
            return found

        rounding = hashes(_HOW_MANY) * share.denominator >> BITS
        number = (scored.sum(-1, keepdim=True) * share.numerator + rounding) // share.denominator
        # hashes within a row are distinct, so exactly `number` of them are at most the number-th smallest
        keys = torch.where(scored, hashes(_WHICH_TOKENS, place), MASK + 1)
        largest = keys.sort(-1).values.gather(-1, (number - 1).clamp_min(0))
        chosen = scored & (keys <= largest) & (number > 0)
        flipped = torch.where(chosen, self._replacements(rows, hashes(_WHAT_INSTEAD, place)), rows)
        return flipped.reshape(targets.shape), chosen.reshape(targets.shape)

    def _replacements(self, targets: Tensor, hashes: Tensor) -> Tensor:
        """Draw a token other than the target by weight: the target's interval of the cumulative sum is skipped."""
        if targets.device not in self._tables:
            weights = self._weights.to(targets.device)
            self._tables[targets.device] = weights, weights.cumsum(0)
        weights, sums = self._tables[targets.device]
        known = targets.clamp(0, len(weights) - 1)
        own, end = weights[known], sums[known]
        drawn = hashes * (sums[-1] - own) >> BITS
        drawn = drawn + torch.where(drawn >= end - own, own, 0)
        return torch.searchsorted(sums, drawn, right=True)


@dataclass(frozen=True)
class SummarySwaps:
    """Exchange the summaries of a share of a step's pairs, so that none of these pairs keeps its own summary.

    Args:
        share: of the pairs, in (0, 1].
        seed: of the hashes.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        exact_share("the share of swapped summaries", self.share)

    def plan(self, pairs: np.ndarray, summaries: np.ndarray, step: int) -> np.ndarray:
        """Return the index of the pair whose summary each pair of a step is trained with.

        The number of swapped pairs is ``share * n``, rounded up or down by a hash so that the mean is exact; since one
        pair alone cannot swap, 1 becomes 2 or 0. It is smaller only if too many pairs have the same summary.

        Args:
            pairs: int64 ``[n]``, hashes of source and summary together.
            summaries: int64 ``[n]``, hashes of the summaries.
            step: the optimizer step, from 0 on.

        Returns:
            int64 ``[n]``; a pair's own index where it keeps its summary.
        """
        sources = np.arange(len(pairs))
        base = combine(self.seed & MASK, _WHICH_PAIRS, step)
        order = np.argsort(self._shuffled(pairs, base), kind="stable")
        number = self._number(len(pairs), pairs, step)
        chosen = order[:0]
        while number > 1:
            chosen = _limit_repeats(number // 2, order, summaries)[:number]
            if len(chosen) == number:
                break
            number = len(chosen)  # more than half of the pairs share a summary, so fewer can be swapped
        if number < 2:
            return sources
        # equal summaries adjacent, then rotated by the count of the most frequent one: no pair gets its own summary
        keys = self._shuffled(summaries[chosen], combine(self.seed & MASK, _SWAP_ORDER, step))
        chosen = chosen[np.argsort(keys, kind="stable")]
        turn = max(Counter(summaries[chosen].tolist()).values())
        sources[chosen] = np.roll(chosen, -turn)
        return sources

    def _number(self, n: int, pairs: np.ndarray, step: int) -> int:
        share = exact_share("share", self.share)
        content = int(pairs.astype(np.uint64).sum()) & MASK
        rounding = combine(self.seed & MASK, _SWAP_SIZE, step, content)
        if n * share < 2:
            # 2 with the probability that makes the mean n * share
            return 2 * (rounding * 2 * share.denominator < (n * share.numerator << BITS)) if n > 1 else 0
        return (n * share.numerator + (rounding * share.denominator >> BITS)) // share.denominator

    @staticmethod
    def _shuffled(keys: np.ndarray, base: int) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(keys))
        high, low = (combine(b, values >> 31 & MASK, values & 2**31 - 1) for b in (base, combine(base, 1)))
        return _one_key(high, low).numpy()


def pair_keys(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the hashes of a batch's pairs and of its summaries for `SummarySwaps.plan`, int64 ``[B]`` each."""
    tokens, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    seen = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    lanes = [(row_hash(tokens, seen, salt), row_hash(labels, labels != IGNORED, salt)) for salt in (1, 2)]
    both = [combine(source, summary) for source, summary in lanes]
    return _one_key(*both), _one_key(lanes[0][1], lanes[1][1])


def _one_key(high: Tensor, low: Tensor) -> Tensor:
    """Join two 32-bit hashes into one of 63 bits, a non-negative int64; its collisions by chance are negligible."""
    return high << 31 | low >> 1


def _limit_repeats(limit: int, order: np.ndarray, summaries: np.ndarray) -> np.ndarray:
    """Return the pairs in order, at most ``limit`` with the same summary."""
    seen: Counter[int] = Counter()
    kept = []
    for index, summary in zip(order.tolist(), summaries[order].tolist(), strict=True):
        seen[summary] += 1
        if seen[summary] <= limit:
            kept.append(index)
    return np.asarray(kept, dtype=np.int64)


def replacement_weights(vocabulary: int, special: Iterable[int], counts: Tensor | None = None) -> Tensor:
    """Return the weight of each token as a replacement, int64 ``[V]``: equal for all ordinary tokens, or by count.

    Args:
        vocabulary: number of logits ``V``.
        special: ids that are never drawn: those of special tokens, and ids without a token.
        counts: ``[V]`` label counts for unigram replacement; None for uniform.
    """
    weights = torch.ones(vocabulary, dtype=torch.int64) if counts is None else counts.long().clone()
    weights[[token for token in special if 0 <= token < vocabulary]] = 0
    return weights


def label_counts(dataset: Any, vocabulary: int) -> Tensor:
    """Count how often each token is a label of a data set, int64 ``[V]``.

    Args:
        dataset: map-style, with ``labels``.
        vocabulary: number of logits ``V``; labels outside it are not counted.

    Raises:
        ValueError: if the data set is a stream, or its samples have no labels.
    """
    if not has_length(dataset):
        raise ValueError(
            "unigram replacement counts the labels of the training set before training, and a stream cannot be "
            "counted: use --flip_replacement uniform, or leave out --streaming."
        )
    samples: Any = dataset
    parts: Iterable[np.ndarray] = (np.asarray(samples[i]["labels"]).reshape(-1) for i in range(len(samples)))
    if isinstance(dataset, Dataset):
        if "labels" not in dataset.column_names:
            raise ValueError("unigram replacement counts the training set's 'labels', and it has no such column.")
        batches = dataset.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000)
        parts = (pc.list_flatten(batch["labels"]).to_numpy() for batch in batches)
    counts = np.zeros(vocabulary, dtype=np.int64)
    for values in parts:
        counts += np.bincount(values[(values >= 0) & (values < vocabulary)], minlength=vocabulary)
    return torch.from_numpy(counts)
