"""The accumulator of depths: exact counts, the interval of the mean, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsm_hf.evaluation.depth import DepthTally


def test_the_tally_counts_exactly_by_block() -> None:
    generator = torch.Generator().manual_seed(0)
    depths = torch.randint(0, 7, (5000,), generator=generator)
    document = torch.randint(0, 400, (5000,), generator=generator)
    tally = DepthTally(6)
    for part in torch.arange(5000).split(701):
        tally.update(depths[part], document[part])
    assert tally.tokens == 5000
    assert tally.count.dtype == torch.int64
    for block in (0, 17, 127):
        in_block = depths[document % 128 == block]
        assert tally.count[block].tolist() == [int((in_block == n).sum()) for n in range(7)]
    assert tally.mean == pytest.approx(float(depths.double().mean()), rel=1e-15)
    record = tally.as_dict()
    assert record["counts"] == torch.bincount(depths, minlength=7).tolist()
    assert record["layers"] == 6 and record["tokens"] == 5000
    assert record["share"] == pytest.approx(tally.mean / 6)
    low, high = record["interval"]
    assert low < record["mean"] < high


def test_two_processes_count_as_one() -> None:
    depths, document = torch.arange(600) % 5, torch.arange(600) // 3
    one, left, right = DepthTally(4), DepthTally(4), DepthTally(4)
    one.update(depths, document)
    left.update(depths[:250], document[:250])
    right.update(depths[250:], document[250:])
    joined = left.to(torch.device("cpu")).reduce(lambda tensor: tensor + right.count)
    assert torch.equal(joined.count, one.count)
    assert joined.as_dict() == one.as_dict()
    assert left.tokens == 250


def test_the_interval_knows_that_tokens_of_a_document_are_alike() -> None:
    """Depths equal within a document: the standard error is that of 100 documents, not of 10,000 tokens."""
    of_document = torch.randint(0, 9, (100,), generator=torch.Generator().manual_seed(1))
    document = torch.arange(100).repeat_interleave(100)
    tally = DepthTally(8)
    tally.update(of_document[document], document)
    low, high = tally.interval(samples=2000)
    error = float(of_document.double().std()) / math.sqrt(100)
    # 2,000 resamples tell a width to about 3 %, and the normal is near enough for 100 documents
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert tally.interval(samples=2000) == (low, high)
    narrow = tally.interval(level=0.5, samples=2000)
    assert low < narrow.low < narrow.high < high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    hits, trials = 0, 300
    for _ in range(trials):
        share = random.beta(4, 4, size=120)  # of each document, mean 1 / 2
        depths = random.binomial(10, np.repeat(share, 5))
        tally = DepthTally(10)
        tally.update(torch.from_numpy(depths), torch.arange(120).repeat_interleave(5))
        low, high = tally.interval(samples=200)
        hits += low <= 5.0 <= high
    # binomial of 300 at 0.95 (a little less for the bootstrap of 120 blocks): three standard errors
    assert 0.90 <= hits / trials <= 0.99


def test_tokens_without_documents_stand_alone() -> None:
    tally = DepthTally(2)
    tally.update(torch.full((100,), 2))
    tally.update(torch.zeros(156, dtype=torch.int64))
    assert tally.count.sum(1).tolist() == [2] * 128
    assert tally.mean == pytest.approx(200 / 256)


def test_bounds_and_degenerate_tallies() -> None:
    tally = DepthTally(3)
    with pytest.raises(ValueError, match="no scored token"):
        _ = tally.mean
    with pytest.raises(ValueError, match="no scored token"):
        tally.as_dict()
    tally.update(torch.zeros(0, dtype=torch.int64))
    assert tally.tokens == 0
    tally.update(torch.tensor([3, 3]), torch.tensor([5, 5 + 128]))
    assert tally.as_dict()["interval"] == [None, None]  # one block tells nothing of others
    tally.update(torch.tensor([3]), torch.tensor([6]))
    assert tally.interval() == (3.0, 3.0)


@pytest.mark.parametrize(
    ("depths", "document", "message"),
    [
        (torch.tensor([0, 4]), None, r"between 0 and 4; they must lie in 0\.\.3"),
        (torch.tensor([-1, 2]), None, "between -1 and 2"),
        (torch.tensor([1.0]), None, "whole numbers"),
        (torch.tensor([[1]]), None, r"whole numbers \[n\]"),
        (torch.tensor([1, 2]), torch.tensor([0]), r"\(2,\) and \(1,\)"),
        (torch.tensor([1, 2]), torch.tensor([0, -3]), "numbers from 0 on"),
    ],
)
def test_bad_tokens_are_refused_and_nothing_is_counted(depths: Tensor, document: Any, message: str) -> None:
    tally = DepthTally(3)
    with pytest.raises(ValueError, match=message):
        tally.update(depths, document)
    assert tally.tokens == 0


def test_bad_options_are_refused() -> None:
    for layers in (0, -1, 2.5):
        with pytest.raises(ValueError, match="layers="):
            DepthTally(layers)  # type: ignore[arg-type]
    tally = DepthTally(3)
    tally.update(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="level=1"):
        tally.interval(level=1)
    with pytest.raises(ValueError, match="samples=5"):
        tally.interval(samples=5)
