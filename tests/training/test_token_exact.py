"""The same 16 examples give the same gradient and the same logs however they are cut into micro-batches."""

from __future__ import annotations

import pytest
import torch

from tests import cases


@pytest.mark.parametrize("loss", [*cases.EXACT_LOSSES, "spherical", "focal"])
@pytest.mark.parametrize("name", cases.EXACT_MODELS)
def test_accumulation_does_not_change_the_gradient(name: str, loss: str) -> None:
    whole, *parts = (cases.one_step(name, loss, *split) for split in cases.SINGLE_SPLITS)
    for part in parts:
        difference = (part["gradient"] - whole["gradient"]).norm() / whole["gradient"].norm()
        assert difference <= 1e-5
        for key in ("loss", "nll", "brier", "token_accuracy", "confidence"):
            assert part["logs"][key] == pytest.approx(whole["logs"][key], rel=2e-6), key


def test_trainer_itself_multiplies_the_gradient_on_bart() -> None:
    """The upstream behaviour that makes the test above worth having: BART ignores num_items_in_batch."""
    whole, parts = (cases.one_step("bart", "ce", *split, stock=True) for split in ((16, 1), (4, 4)))
    ratio = parts["gradient"].norm() / whole["gradient"].norm()
    assert 3.5 < ratio < 4.5
    assert parts["logs"]["loss"] == pytest.approx(4 * whole["logs"]["loss"], rel=0.1)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_loss_is_the_mean_over_all_scored_tokens(name: str) -> None:
    """One denominator for the step: the logged loss of CE is the logged token mean of the NLL."""
    case = cases.one_step(name, "ce", 4, 4)
    assert case["logs"]["loss"] == pytest.approx(case["logs"]["nll"], rel=1e-6)
    mix = cases.one_step(name, "dpsm", 4, 4)["logs"]
    assert mix["loss"] == pytest.approx(0.5 * mix["nll"] + 0.5 * mix["brier"], rel=1e-6)
    assert mix["alpha"] == 0.5


def test_a_batch_of_ignored_labels_is_zero_with_a_graph() -> None:
    trainer = cases.build("llama", max_steps=1)
    ignored = trainer.train_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    trainer.train_dataset = ignored
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == 0.0 and entry["grad_norm"] == 0.0 and "nll" not in entry
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
