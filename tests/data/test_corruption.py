"""Flipped targets and swapped summaries: exact rates, nothing else changed, independent of the order of the data."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpsm_hf.data.corruption import (
    SummarySwaps,
    TargetFlips,
    exact_share,
    label_counts,
    pair_keys,
    replacement_weights,
)
from dpsm_hf.data.hashing import combine, mix, row_hash, text_hash

VOCAB, SPECIAL = 50, (0, 1, 2)
UNIFORM = replacement_weights(VOCAB, SPECIAL)


def labels(rows: int, length: int, seed: int = 0, ignored: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, length), generator=generator)
    tokens[torch.rand(rows, length, generator=generator) < ignored] = -100
    return tokens


# ---- hashes ------------------------------------------------------------------------------------------------------


def test_the_hash_is_the_published_function_on_numbers_and_tensors() -> None:
    def lowbias32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1, *range(10**6, 10**9, 10**8)]
    assert [mix(n) for n in numbers] == [lowbias32(n) for n in numbers]
    assert mix(torch.tensor(numbers)).tolist() == [lowbias32(n) for n in numbers]
    assert combine(7, 3, torch.arange(4)).tolist() == [combine(7, 3, n) for n in range(4)]


def test_the_hashes_of_places_are_even() -> None:
    """Chi-square over 64 bins of 64,000 places: 63 expected, 112 is its 99.99 % quantile."""
    found = np.bincount((combine(1, 2, torch.arange(64_000)) >> 26).numpy(), minlength=64)
    assert ((found - 1000) ** 2 / 1000).sum() < 112


def test_a_row_is_known_by_its_tokens_and_their_order_wherever_its_padding_is() -> None:
    def hashed(*rows: list[int]) -> list[int]:
        return row_hash(torch.tensor(rows), torch.tensor(rows) != -100).tolist()

    right, left, wide, swapped, shorter = hashed(
        [5, 6, 7, -100, -100], [-100, -100, 5, 6, 7], [5, -100, 6, -100, 7], [6, 5, 7, -100, -100], [5, 6] + [-100] * 3
    )
    assert right == left == wide and len({right, swapped, shorter}) == 3


def test_text_hashes_are_fixed_for_ever() -> None:
    """Published subsets and folds depend on these numbers."""
    assert text_hash(["a text", "its summary"], "dpsm-hf-fold") == 6522714613046269311
    assert text_hash(["ab", "c"], "s") != text_hash(["a", "bc"], "s")
    assert text_hash([None], "s") == text_hash([""], "s")


# ---- which steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.07, 0.3, 1 / 3, 0.5, 0.61, 0.99, 1.0])
def test_the_share_of_flipped_steps_is_exact_in_every_beginning(share: float) -> None:
    flips = TargetFlips(0.1, UNIFORM, steps=share, seed=3)
    count = 0
    for step in range(1000):
        assert flips.steps_before(step) == count
        count += flips.flips_step(step)
        assert abs(count - exact_share("", share) * (step + 1)) < 1
    if share == 0.05:
        assert count == 50


def test_the_flipped_steps_are_not_regular_and_change_with_the_seed() -> None:
    def steps(seed: int) -> list[int]:
        return [s for s in range(2000) if TargetFlips(0.1, UNIFORM, steps=0.05, seed=seed).flips_step(s)]

    gaps = np.diff(steps(1))
    assert len(set(gaps.tolist())) > 10 and gaps.min() >= 1 and gaps.max() <= 39
    assert steps(1) != steps(2) and steps(1) == steps(1)


# ---- which tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "length", "number"), [(0.1, 1000, 100), (0.25, 12, 3), (1.0, 7, 7), (0.5, 4, 2)])
def test_every_row_has_exactly_its_share_where_it_is_whole(share: float, length: int, number: int) -> None:
    targets = labels(20, length)
    flipped, changed = TargetFlips(share, UNIFORM)(targets, 0)
    assert changed.sum(-1).tolist() == [number] * 20
    assert torch.equal(flipped != targets, changed)


def test_a_share_that_is_not_whole_is_rounded_without_bias() -> None:
    targets = labels(4000, 13)  # 1.3 flips a row
    counts = TargetFlips(0.1, UNIFORM)(targets, 5)[1].sum(-1)
    assert set(counts.tolist()) == {1, 2}
    assert abs(float(counts.double().mean()) - 1.3) < 4 * (0.21 / 4000) ** 0.5


def test_only_scored_targets_change_and_never_to_themselves_or_a_special_token() -> None:
    targets = labels(200, 30, ignored=0.4)
    before = targets.clone()
    flips = TargetFlips(0.5, UNIFORM)
    for step in range(5):
        flipped, changed = flips(targets, step)
        assert torch.equal(targets, before)
        assert not changed[targets == -100].any() and (flipped[targets == -100] == -100).all()
        assert (flipped[changed] != targets[changed]).all() and torch.equal(flipped[~changed], targets[~changed])
        assert not torch.isin(flipped[changed], torch.tensor(SPECIAL)).any()
        assert ((flipped[changed] >= 0) & (flipped[changed] < VOCAB)).all()


def test_a_row_without_targets_and_a_step_without_flips_stay_as_they_are() -> None:
    empty = torch.full((3, 6), -100)
    flipped, changed = TargetFlips(1.0, UNIFORM)(empty, 0)
    assert torch.equal(flipped, empty) and not changed.any()
    flips = TargetFlips(1.0, UNIFORM, steps=0.5)
    quiet = next(step for step in range(9) if not flips.flips_step(step))
    flipped, changed = flips(labels(3, 6), quiet)
    assert torch.equal(flipped, labels(3, 6)) and not changed.any()


def test_places_of_a_row_are_flipped_alike_often() -> None:
    targets = labels(4000, 10)
    counts = TargetFlips(0.3, UNIFORM)(targets, 0)[1].sum(0).double()
    assert ((counts - 1200).abs() < 4 * (4000 * 0.3 * 0.7) ** 0.5).all()


def test_uniform_replacements_are_even_over_the_ordinary_tokens_but_the_own() -> None:
    """Chi-square over 46 tokens: 45 degrees of freedom, 93 is the 99.99 % quantile."""
    targets = torch.full((1, 46_000), 7)
    targets[0, 0] = 8  # not all alike, or the row would be a single token
    flipped, _ = TargetFlips(1.0, UNIFORM)(targets, 0)
    counts = np.bincount(flipped[0, 1:].numpy(), minlength=VOCAB)
    assert counts[[0, 1, 2, 7]].sum() == 0
    ordinary = np.delete(counts, [0, 1, 2, 7])
    assert ((ordinary - 1000) ** 2 / 1000).sum() < 93


def test_unigram_replacements_come_as_often_as_the_labels_do() -> None:
    counts = torch.arange(VOCAB)
    flips = TargetFlips(1.0, replacement_weights(VOCAB, SPECIAL, counts))
    targets = torch.full((1, 50_000), 49)
    targets[0, 0] = 8
    drawn = np.bincount(flips(targets, 0)[0][0, 1:].numpy(), minlength=VOCAB)
    expected = counts.double().numpy().copy()
    expected[[0, 1, 2, 49]] = 0
    expected *= 49_999 / expected.sum()
    kept = expected > 0
    assert drawn[~kept].sum() == 0
    # 46 tokens: 93 is the 99.99 % quantile of chi-square with 45 degrees of freedom
    assert ((drawn[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 93


def test_counts_beyond_30_bits_keep_their_proportions_and_rare_tokens() -> None:
    weights = torch.zeros(VOCAB, dtype=torch.int64)
    weights[[10, 20, 30]] = torch.tensor([3 * 10**12, 10**12, 1])
    flips = TargetFlips(1.0, weights)
    targets = torch.full((1, 40_000), 5)
    targets[0, 0] = 6
    drawn = torch.bincount(flips(targets, 0)[0][0], minlength=VOCAB)
    assert drawn.sum() == drawn[10] + drawn[20] + drawn[30]
    assert abs(float(drawn[10]) / 40_000 - 0.75) < 4 * (0.75 * 0.25 / 40_000) ** 0.5


@pytest.mark.parametrize("target", [10, 20])
def test_of_two_tokens_each_becomes_the_other(target: int) -> None:
    weights = torch.zeros(VOCAB, dtype=torch.int64)
    weights[10], weights[20] = 5, 1
    flipped, _ = TargetFlips(1.0, weights)(torch.full((2, 9), target), 0)
    assert (flipped == 30 - target).all()


def test_rows_are_flipped_alike_in_any_batch_and_with_any_padding() -> None:
    flips, targets = TargetFlips(0.3, UNIFORM, seed=9), labels(8, 20, ignored=0.2)
    whole = flips(targets, 4)[0]
    alone = torch.cat([flips(row[None], 4)[0] for row in targets])
    assert torch.equal(whole, alone)
    assert torch.equal(flips(targets.flip(0), 4)[0].flip(0), whole)
    padded = torch.nn.functional.pad(targets, (5, 3), value=-100)
    assert torch.equal(flips(padded, 4)[0], torch.nn.functional.pad(whole, (5, 3), value=-100))
    assert torch.equal(flips(targets.reshape(2, 4, 20), 4)[0].reshape(8, 20), whole)


def test_step_seed_and_content_each_change_what_is_flipped() -> None:
    targets = labels(1, 400)
    flips = TargetFlips(0.2, UNIFORM, seed=1)
    base = flips(targets, 0)[1]
    other = targets.clone()
    other[0, 200] = (other[0, 200] + 1) % VOCAB
    for changed in (flips(targets, 1)[1], TargetFlips(0.2, UNIFORM, seed=2)(targets, 0)[1], flips(other, 0)[1]):
        # independent choices of 80 tokens share a fifth: 16, standard deviation 3.6
        assert int((changed & base).sum()) < 35


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), 1e-9])
def test_a_share_out_of_range_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=r"--x is .*above 0 and at most 1.*Leave it out"):
        exact_share("--x", share)
    with pytest.raises(ValueError, match="flipped targets is"):
        TargetFlips(share, UNIFORM)
    with pytest.raises(ValueError, match="flipped steps is"):
        TargetFlips(0.1, UNIFORM, steps=share)
    with pytest.raises(ValueError, match="swapped summaries is"):
        SummarySwaps(share)


def test_shares_are_taken_as_they_were_written() -> None:
    assert exact_share("", 0.05) == Fraction(1, 20) and exact_share("", 1 / 3) == Fraction(1, 3)


def test_one_token_cannot_replace_anything() -> None:
    with pytest.raises(ValueError, match="fewer than two tokens"):
        TargetFlips(0.1, replacement_weights(4, [0, 1, 2]))


# ---- counting labels ----------------------------------------------------------------------------------------------


def test_labels_are_counted_in_data_sets_of_either_kind() -> None:
    rows = [{"labels": [3, 3, 5, -100]}, {"labels": [5, -100]}, {"labels": [9]}]
    expected = [0, 0, 0, 2, 0, 2, 0, 0]
    assert label_counts(rows, 8).tolist() == expected
    dataset = Dataset.from_list([{**row, "input_ids": [1]} for row in rows])
    assert label_counts(dataset, 8).tolist() == expected
    assert label_counts(dataset.select([2, 0]), 8).tolist() == [0, 0, 0, 2, 0, 1, 0, 0]


def test_streams_and_rows_without_labels_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match=r"stream.*--flip_replacement uniform"):
        label_counts(Dataset.from_list([{"labels": [1]}]).to_iterable_dataset(), 8)
    with pytest.raises(ValueError, match="no such column"):
        label_counts(Dataset.from_list([{"x": [1]}]), 8)


# ---- swapped summaries --------------------------------------------------------------------------------------------


def keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**62, n)


@pytest.mark.parametrize(
    ("n", "share", "number"), [(20, 0.15, 3), (16, 0.5, 8), (7, 1.0, 7), (2, 1.0, 2), (1, 1.0, 0)]
)
def test_the_number_of_swaps_is_exact_and_nobody_keeps_its_summary(n: int, share: float, number: int) -> None:
    for step in range(50):
        plan = SummarySwaps(share).plan(keys(n), keys(n, 1), step)
        assert sorted(plan) == list(range(n)), "every summary is used once"
        assert int((plan != np.arange(n)).sum()) == number


@pytest.mark.parametrize(("n", "share"), [(8, 0.15), (8, 0.2), (10, 0.05), (9, 0.3), (3, 0.5)])
def test_the_share_of_swaps_is_right_on_average(n: int, share: float) -> None:
    found = [int((SummarySwaps(share).plan(keys(n), keys(n, 1), s) != np.arange(n)).sum()) for s in range(1000)]
    assert 1 not in found
    assert abs(np.mean(found) - n * share) < 4 * np.std(found) / 1000**0.5


def test_equal_summaries_are_no_swap() -> None:
    for step in range(200):
        summaries = np.array([1, 1, 1, 2, 2, 3, 4, 4])
        plan = SummarySwaps(1.0).plan(keys(8), summaries, step)
        assert (summaries[plan] != summaries).all() and sorted(plan) == list(range(8))


def test_a_summary_of_most_pairs_is_swapped_as_often_as_it_can_be() -> None:
    for step in range(20):
        summaries = np.array([1] * 7 + [2, 3])
        plan = SummarySwaps(1.0).plan(keys(9), summaries, step)
        swapped = plan != np.arange(9)
        assert int(swapped.sum()) == 4 and (summaries[plan] != summaries)[swapped].all()
        assert (SummarySwaps(1.0).plan(keys(5), np.ones(5, dtype=np.int64), step) == np.arange(5)).all()


def test_the_order_of_the_pairs_does_not_matter() -> None:
    pairs, summaries = keys(30), keys(30, 1)
    for step in range(20):
        plan = SummarySwaps(0.4, seed=2).plan(pairs, summaries, step)
        shuffle = np.random.default_rng(step).permutation(30)
        other = SummarySwaps(0.4, seed=2).plan(pairs[shuffle], summaries[shuffle], step)
        assert (summaries[shuffle][other] == summaries[plan][shuffle]).all()


def test_partners_and_pairs_change_with_step_and_seed() -> None:
    plans = {tuple(SummarySwaps(0.4, seed).plan(keys(30), keys(30, 1), step)) for seed in (1, 2) for step in range(5)}
    assert len(plans) == 10
    chosen = Counter(
        i for s in range(500) for i, j in enumerate(SummarySwaps(0.4).plan(keys(30), keys(30, 1), s)) if i != j
    )
    assert min(chosen.values()) > 200 - 4 * (500 * 0.24) ** 0.5 and len(chosen) == 30


def test_pairs_are_known_by_their_tokens_not_their_padding() -> None:
    short = {
        "input_ids": torch.tensor([[5, 6]]),
        "attention_mask": torch.tensor([[1, 1]]),
        "labels": torch.tensor([[7]]),
    }
    padded = {
        "input_ids": torch.tensor([[9, 5, 6, 9], [5, 6, 9, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]]),
        "labels": torch.tensor([[7, -100], [7, -100]]),
    }
    (pair,), (summary,) = (keys.tolist() for keys in pair_keys(short))
    pairs, summaries = (keys.tolist() for keys in pair_keys(padded))
    assert pairs[0] == pair != pairs[1] and summaries == [summary, summary]
    unmasked = pair_keys({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7]])})
    assert unmasked[0].tolist() == [pair]
