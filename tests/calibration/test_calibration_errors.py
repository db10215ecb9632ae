"""Impossible values and impossible bins: a clear error, and nothing is added."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dpsm_hf import TokenCalibration, calibration_curve
from dpsm_hf.calibration import SCORES
from dpsm_hf.calibration.accumulator import BLOCKS


def filled(number: int = 1000) -> TokenCalibration:
    rng = np.random.default_rng(0)
    result = TokenCalibration()
    result.update(confidence=rng.random(number), correct=rng.random(number) < 0.5, nll=rng.random(number))
    return result


@pytest.mark.parametrize(
    ("tokens_given", "message"),
    [
        ({"confidence": [0.5, 1.2], "correct": [1, 1]}, r"confidence 1.2 lies outside \[0, 1\]"),
        ({"confidence": [-0.01], "correct": [1]}, r"confidence -0.01 lies outside"),
        ({"confidence": [0.5, math.nan], "correct": [1, 1]}, r"confidence nan lies outside"),
        ({"confidence": [0.5], "correct": [2]}, r"correct must hold 0 or 1"),
        ({"confidence": [0.5], "correct": [0.5]}, r"correct must hold 0 or 1"),
        ({"confidence": [0.5], "correct": [-1]}, r"correct must hold 0 or 1"),
        ({"confidence": [0.5, 0.5], "correct": [1]}, r"correct has shape \(1,\), but confidence has \(2,\)"),
        ({"confidence": [0.5], "correct": [1], "mask": [True, False]}, r"mask has shape \(2,\)"),
        ({"confidence": [0.5], "correct": [1], "nll": [1.0, 2.0]}, r"nll has shape \(2,\)"),
        ({"confidence": [0.5], "correct": [1], "crps": [1.0]}, r"unknown scores \['crps'\]; .*nll, brier"),
        ({"confidence": [0.5], "correct": [1], "documents": [1]}, r"unknown scores .* Did you mean document\?"),
        ({"confidence": [0.5], "correct": [1], "nll": [-0.5]}, r"nll -0.5 lies outside \[0, inf\]"),
        ({"confidence": [0.5], "correct": [1], "brier": [2.1]}, r"brier 2.1 lies outside \[0, 2\]"),
        ({"confidence": [0.5], "correct": [1], "spherical": [-0.6]}, r"spherical -0.6 lies outside \[0, 1\]"),
        ({"confidence": [0.5], "correct": [math.nan]}, r"correct must hold 0 or 1"),
        (
            {"confidence": [0.5] * 3, "correct": [1] * 3, "nll": [1, math.nan, math.nan]},
            r"nll is NaN for 2 tokens, first token 1",
        ),
        ({"confidence": [0.5], "correct": [1], "document": [-1]}, r"document must hold whole numbers from 0 on"),
        ({"confidence": [0.5], "correct": [1], "document": [math.nan]}, r"document must hold whole numbers from 0 on"),
        ({"confidence": [0.5], "correct": [1], "document": [0, 1]}, r"document has shape \(2,\)"),
    ],
)
def test_refused_tokens(tokens_given: dict[str, Any], message: str) -> None:
    calibration = filled()
    before = {name: tensor.clone() for name, tensor in calibration.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        calibration.update(**tokens_given)
    assert all(torch.equal(before[name], tensor) for name, tensor in calibration.state_dict().items())


@pytest.mark.parametrize("bins", [7, 0, -5, 3001])
def test_bins_that_the_grid_does_not_give(bins: int) -> None:
    with pytest.raises(ValueError, match=f"bins={bins} does not divide the grid of 3000"):
        TokenCalibration().curve(bins)


def test_nothing_seen() -> None:
    with pytest.raises(ValueError, match="no scored token was seen"):
        TokenCalibration().compute()
    empty = TokenCalibration()
    empty.update(confidence=[], correct=[])
    empty.update(confidence=[0.3], correct=[1], mask=[False])
    for ask in (empty.compute, empty.intervals):
        with pytest.raises(ValueError, match="no scored token was seen"):
            ask()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("count", None, "count of the state is missing"),
        ("correct", torch.zeros(3000, dtype=torch.int64), r"correct of the state is torch.int64 \(3000,\); expected"),
        ("sums", torch.zeros(BLOCKS, len(SCORES) + 1), r"sums of the state is torch.float32 .*expected torch.float64"),
    ],
)
def test_a_state_of_something_else(name: str, tensor: torch.Tensor | None, message: str) -> None:
    calibration, state = TokenCalibration(), filled().state_dict()
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    with pytest.raises(ValueError, match=message):
        calibration.load_state_dict(state)
    assert not calibration.tokens


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_a_level_out_of_range(level: float) -> None:
    with pytest.raises(ValueError, match=r"level=.* must lie between 0 and 1"):
        filled().intervals(level=level)


@pytest.mark.parametrize("samples", [0, -5, 19, 100.5])
def test_a_number_of_samples_out_of_range(samples: Any) -> None:
    with pytest.raises(ValueError, match=r"samples=.* must be a whole number from 20 on"):
        filled().intervals(samples=samples)


def test_what_is_refused_says_nothing_of_the_masked() -> None:
    calibration = TokenCalibration()
    calibration.update(
        confidence=[0.5, 7.0], correct=[1, 9], nll=[1.0, math.nan], document=[0, -1], mask=[True, False]
    )
    assert calibration.tokens == 1
    with pytest.raises(ValueError, match="nll is NaN for 1 tokens, first token 0"):
        calibration.update(confidence=[2.0, 0.5], correct=[1, 1], nll=[1.0, math.nan], mask=[False, True])
    assert calibration.tokens == 1


@pytest.mark.parametrize("value", [1.0 + 1e-7, -1e-12, math.inf])
def test_the_curve_refuses_what_the_accumulator_refuses(value: float) -> None:
    with pytest.raises(ValueError, match=r"lies outside \[0, 1\]"):
        calibration_curve(np.array([0.5, value]), [1, 0])
    with pytest.raises(ValueError, match="bins=16 does not divide"):
        calibration_curve([0.5], [1], bins=16)
