"""Class-wise calibration against a plain loop, scikit-learn and torchmetrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve as sklearn_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from dpsm_hf.calibration import ClassCalibration
from dpsm_hf.calibration.accumulator import BLOCKS

VOCAB = 12
CLASSES = (7, 0, 3, 11)
STATE = ("positive", "probability", "tokens_of_block")


def places(number: int = 4000, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities ``[n, V]`` of an over-confident model, labels ``[n]`` and documents ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, VOCAB, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator).squeeze(-1)
    document = torch.randint(0, 300, (number,), generator=generator)
    return logits.softmax(-1).to(dtype), labels, document


def filled(p: Tensor, labels: Tensor, document: Tensor, classes: tuple[int, ...] = CLASSES) -> ClassCalibration:
    calibration = ClassCalibration(classes)
    calibration.update(p[:, list(classes)], labels, document)
    return calibration


def same(left: ClassCalibration, right: ClassCalibration) -> None:
    assert torch.equal(left.positive, right.positive) and torch.equal(left.tokens_of_block, right.tokens_of_block)
    torch.testing.assert_close(left.probability, right.probability, rtol=1e-12, atol=1e-12)


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_class_equals_a_plain_loop(dtype: torch.dtype) -> None:
    p, labels, document = places(dtype=dtype)
    calibration = filled(p, labels, document)
    errors = calibration.compute()
    assert tuple(errors) == CLASSES and calibration.tokens == len(labels)
    for k in CLASSES:
        expected = 0.0
        for low, high in pairwise(i / 15 for i in range(16)):
            total, hits = 0.0, 0
            for probability, label in zip(p[:, k].tolist(), labels.tolist(), strict=True):
                if low < probability <= high:
                    total, hits = total + probability, hits + (label == k)
            expected += abs(hits - total) / len(labels)
        assert errors[k] == pytest.approx(expected, abs=1e-12), k
    assert calibration.ece == pytest.approx(sum(errors.values()) / len(CLASSES), abs=1e-15)


def test_each_class_is_torchmetrics_and_scikit_learns_one_against_the_rest() -> None:
    p, labels, document = places()
    errors = filled(p, labels, document).compute()
    for k in CLASSES:
        hit, probability = (labels == k).long(), p[:, k].contiguous()
        assert errors[k] == pytest.approx(float(binary_calibration_error(probability, hit, n_bins=15)), abs=1e-9)
        share, mean = sklearn_curve(hit.numpy(), probability.numpy(), n_bins=15)
        count = np.bincount(np.ceil(probability.numpy() * 15).astype(int) - 1, minlength=15)
        assert errors[k] == pytest.approx((count[count > 0] * np.abs(share - mean)).sum() / len(labels), abs=1e-9)


def test_edges_belong_to_the_bin_below() -> None:
    edges = torch.arange(16, dtype=torch.float64) / 15
    calibration = ClassCalibration([5])
    calibration.update(edges[:, None], torch.full((16,), 5), torch.zeros(16, dtype=torch.int64))
    assert calibration.positive.sum((0, 1)).tolist() == [2] + [1] * 14


def test_just_above_an_edge_the_next_bin_begins() -> None:
    edges = torch.arange(16, dtype=torch.float64) / 15
    above = torch.from_numpy(np.nextafter(edges[:-1].numpy(), 1))
    calibration = ClassCalibration([5])
    calibration.update(above[:, None], torch.full((15,), 5), torch.zeros(15, dtype=torch.int64))
    assert calibration.positive.sum((0, 1)).tolist() == [1] * 15


def test_known_errors() -> None:
    never = ClassCalibration([2])
    never.update(torch.full((10, 1), 0.25), torch.zeros(10, dtype=torch.int64), torch.arange(10))
    assert never.compute() == {2: 0.25}, "a token that is predicted and never comes"
    right = ClassCalibration([2])
    right.update(torch.full((8, 1), 0.25), torch.tensor([2, 2, 0, 0, 0, 0, 0, 0]), torch.arange(8))
    assert right.ece == 0.0


# ---- streaming -----------------------------------------------------------------------------------------------------


def test_pieces_in_any_order_and_the_sum_over_processes() -> None:
    p, labels, document = places()
    whole = filled(p, labels, document)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    pieces = ClassCalibration(CLASSES)
    for rows in order.split(999):
        pieces.update(p[rows][:, list(CLASSES)], labels[rows], document[rows])
    same(pieces, whole)
    # two processes: `reduce` sums each tensor over both
    halves = [filled(p[rows], labels[rows], document[rows]) for rows in order.chunk(2)]
    theirs = iter([getattr(halves[1], name) for name in STATE])
    summed = halves[0].reduce(lambda tensor: tensor + next(theirs))
    same(summed, whole)
    assert summed.compute() == pytest.approx(whole.compute(), abs=1e-12)


def test_documents_are_dealt_out_to_blocks() -> None:
    p, labels, document = places(number=50)
    calibration = filled(p, labels, document)
    assert calibration.tokens_of_block.tolist() == torch.bincount(document % BLOCKS, minlength=BLOCKS).tolist()


# ---- intervals and the record --------------------------------------------------------------------------------------


def test_the_interval_covers_the_truth() -> None:
    # the true probability of each label is known: the error for ever more places
    generator = torch.Generator().manual_seed(9)
    logits = 2 * torch.randn(400_000, VOCAB, generator=generator)
    p, q = logits.softmax(-1)[:, list(CLASSES)].double(), (logits / 2).softmax(-1)[:, list(CLASSES)].double()
    bins = (p * 15).ceil().long() - 1
    truth = np.mean([torch.zeros(15, dtype=p.dtype).index_add(0, b, g).abs().sum() / len(p)
                     for b, g in zip(bins.T, (q - p).T, strict=True)])  # fmt: skip
    hits = sum(low <= truth <= high for low, high in (filled(*places(3000, seed)).interval() for seed in range(60)))
    # of 60 intervals at 95 %, 51 or more hold it but for one time in a thousand
    assert hits >= 51, hits / 60


def test_documents_of_different_lengths_that_are_alike_have_no_width() -> None:
    calibration = ClassCalibration([2])
    document = torch.repeat_interleave(torch.arange(20), torch.arange(1, 21))
    calibration.update(torch.full((210, 1), 0.25), torch.zeros(210, dtype=torch.int64), document)
    assert calibration.interval() == pytest.approx((0.25, 0.25), abs=1e-12)


def test_one_document_has_no_interval() -> None:
    p, labels, _ = places(number=40)
    low, high = filled(p, labels, torch.full((40,), 3)).interval()
    assert math.isnan(low) and math.isnan(high)


def test_the_record() -> None:
    calibration = filled(*places())
    record = json.loads(json.dumps(calibration.as_dict(), allow_nan=False))
    assert record["bins"] == 15 and record["ece"] == pytest.approx(calibration.ece)
    assert record["interval"][0] < record["ece"] < record["interval"][1]
    assert record["classes"] == {str(k): pytest.approx(v) for k, v in calibration.compute().items()}
    p, labels, _ = places(number=40)
    assert filled(p, labels, torch.zeros(40, dtype=torch.int64)).as_dict()["interval"] == [None, None]


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [[], [4, 4], [[1, 2]]])
def test_classes_that_are_none(classes: list[int]) -> None:
    with pytest.raises(ValueError, match="must be different token ids, at least one"):
        ClassCalibration(classes)


@pytest.mark.parametrize(
    ("probability", "labels", "document", "message"),
    [
        (torch.full((3, 1), 0.5), torch.zeros(3), torch.zeros(3), r"expected \[n, 2\], \[n\] and \[n\]"),
        (torch.full((3, 2), 0.5), torch.zeros(2), torch.zeros(2), "do not fit together"),
        (torch.full((3, 2), 0.5), torch.zeros(3), torch.zeros(2), "do not fit together"),
        (torch.tensor([[0.5, 1.1]]), torch.zeros(1), torch.zeros(1), r"lies outside \[0, 1\]"),
        (torch.tensor([[-0.1, 0.5]]), torch.zeros(1), torch.zeros(1), r"lies outside \[0, 1\]"),
        (torch.tensor([[math.nan, 0.5]]), torch.zeros(1), torch.zeros(1), "or is NaN"),
    ],
)
def test_refused_places(probability: Tensor, labels: Tensor, document: Tensor, message: str) -> None:
    calibration = ClassCalibration([0, 1])
    with pytest.raises(ValueError, match=message):
        calibration.update(probability, labels.long(), document.long())
    assert not calibration.tokens and not calibration.positive.any()


def test_a_negative_document() -> None:
    calibration = ClassCalibration([0, 1])
    with pytest.raises(ValueError, match="document must hold numbers from 0 on"):
        calibration.update(torch.full((1, 2), 0.5), torch.tensor([0]), torch.tensor([-1]))
    assert not calibration.tokens


@pytest.mark.parametrize("bad", [{"level": 1.5}, {"level": 0.0}, {"samples": 0}, {"samples": 5}])
def test_levels_and_samples_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"(level|samples)=.* must"):
        filled(*places(number=200)).interval(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("question", [ClassCalibration.compute, ClassCalibration.interval])
def test_nothing_seen(question: Callable[[ClassCalibration], Any]) -> None:
    with pytest.raises(ValueError, match="no scored token was seen"):
        question(ClassCalibration([1]))
