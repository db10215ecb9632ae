"""Two real processes (gloo): the same numbers as one process, and the same bits as Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import cases
from tests.distributed.processes import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of every case in two processes."""
    return results_of("worker", tmp_path_factory.mktemp("two"), timeout=600)


@pytest.fixture(scope="module")
def one() -> dict[tuple[str, str], dict[str, Any]]:
    """The whole batch at once in this process, for each model and loss."""
    return {(n, loss): cases.one_step(n, loss, 16, 1) for n in cases.EXACT_MODELS for loss in cases.EXACT_LOSSES}


@pytest.mark.parametrize("split", cases.SPLITS, ids=str)
@pytest.mark.parametrize("loss", cases.EXACT_LOSSES)
@pytest.mark.parametrize("name", cases.EXACT_MODELS)
def test_gradient_and_logs_equal_one_process(name: str, loss: str, split: tuple[int, int], two: Any, one: Any) -> None:
    whole, parts = one[name, loss], two[f"exact/{name}/{loss}/{split[0]}x{split[1]}"]
    difference = (parts["gradient"] - whole["gradient"]).norm() / whole["gradient"].norm()
    assert difference <= 1e-5
    for key in ("loss", "nll", "brier", "token_accuracy", "confidence"):
        assert parts["logs"][key] == pytest.approx(whole["logs"][key], rel=2e-6), key


def test_trainer_itself_is_wrong_on_bart(two: Any, one: Any) -> None:
    # BART's forward ignores num_items_in_batch, and Trainer multiplies its mean by the number of processes
    assert two["exact-stock/bart"]["logs"]["loss"] > 1.9 * one["bart", "ce"]["logs"]["loss"]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_lora"])
def test_ce_is_trainer_bit_for_bit(name: str, accumulation: int, two: Any) -> None:
    stock, ours = (two[f"equal/{name}/{accumulation}/{stock}"] for stock in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(stock["parameters"], ours["parameters"], strict=True))
    assert len(stock["logs"]) == len(ours["logs"])
    for theirs, mine in zip(stock["logs"], ours["logs"], strict=True):
        assert theirs == {key: mine[key] for key in theirs}


def test_an_evaluation_before_training_leaves_one_model(two: Any) -> None:
    assert two["trained-after-evaluation"] == {"equal": True, "processes": 2}


@pytest.mark.parametrize("case", ["11/4", "13/2", "8/4"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_uneven_evaluation_equals_one_process(name: str, case: str, two: Any) -> None:
    rows, batch = map(int, case.split("/"))
    single, double = cases.evaluate_uneven(name, rows, batch), two[f"uneven/{name}/{case}"]
    for key in ("count", "correct", "counts"):
        assert torch.equal(single["state"][key], double["state"][key]), key
    for key in ("confidence", "sums"):
        torch.testing.assert_close(double["state"][key], single["state"][key], rtol=1e-9, atol=1e-9)
    for key in ("eval_nll", "eval_brier", "eval_ece_15", "eval_token_accuracy"):
        assert double["metrics"][key] == pytest.approx(single["metrics"][key], rel=1e-9)


def test_generated_samples_are_not_scored_twice(two: Any) -> None:
    # five samples in batches of two fill up to eight on two processes
    assert two["generated"] == 5
