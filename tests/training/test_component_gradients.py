"""``log_component_grad_norms``: both gradients beside the mix's own, and a training that does not notice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dpsm_hf.data.corruption import TargetFlips, replacement_weights
from dpsm_hf.training.corruption import Corruption
from tests.evaluation_trainers import make_trainer
from tests.tiny import VOCAB


def trained(folder: Path, name: str, **options: Any) -> Any:
    defaults = {"scoring_rule": "dpsm", "logging_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    trainer = make_trainer(folder, name, **{**defaults, **options})
    trainer.train()
    return trainer


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "llama_lora", "bart"])
def test_the_parts_are_what_they_are_alone(name: str, fused_head: str, tmp_path: Path) -> None:
    for alpha, key in ((0.0, "grad_norm_ce"), (1.0, "grad_norm_brier")):
        options = {"alpha_schedule": "constant", "alpha_end": alpha, "fused_head": fused_head}
        found = logged(trained(tmp_path, name, log_component_grad_norms=True, **options))
        assert len(found) == 2
        for entry in found:
            assert entry[key] == pytest.approx(entry["grad_norm"], rel=1e-5)
            assert entry["grad_norm_ce"] > 2 * entry["grad_norm_brier"] > 0


@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_a_z_loss_is_a_part_of_its_own(fused_head: str, tmp_path: Path) -> None:
    options = {"scoring_rule": "dpsm", "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 16}
    trainer = make_trainer(
        tmp_path, "gpt2", z_loss=1e-3, log_component_grad_norms=True, fused_head=fused_head, **options
    )
    model = copy.deepcopy(trainer.model)
    trainer.train()
    (entry,) = logged(trainer)
    data = trainer.train_dataset
    logits = model(torch.tensor(data["input_ids"])).logits[:, :-1]
    scored = torch.tensor(data["labels"])[:, 1:] != -100
    count = sum(y != -100 for row in data["labels"] for y in row)  # Trainer's, of all labels for this model
    (1e-3 * logits.logsumexp(-1).square()[scored].sum() / count).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert entry["grad_norm_z_loss"] == pytest.approx(expected, rel=1e-4)
    without = trained(tmp_path, "gpt2", log_component_grad_norms=True, max_steps=2)
    assert not any("grad_norm_z_loss" in entry for entry in logged(without))


@pytest.mark.parametrize(("fused_head", "there"), [("off", True), ("on", False)])
def test_nll_less_entropy_is_logged_where_the_entropy_is_known(fused_head: str, there: bool, tmp_path: Path) -> None:
    trainer = trained(tmp_path, "gpt2", fused_head=fused_head, max_steps=1, logging_steps=1, learning_rate=0.0,
                      per_device_train_batch_size=8, gradient_accumulation_steps=2)  # fmt: skip
    (entry,) = logged(trainer)  # of all sixteen rows, with weights that stay
    assert ("nll_entropy_gap" in entry) == there
    if there:
        of_all = trainer.evaluate(trainer.train_dataset)
        assert entry["nll_entropy_gap"] == pytest.approx(of_all["eval_nll_entropy_gap"], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_training_does_not_notice(options: dict[str, Any], tmp_path: Path) -> None:
    runs = [
        trained(tmp_path, "gpt2", dropout=0.1, log_component_grad_norms=measured, logging_first_step=True, **options)
        for measured in (True, False)
    ]
    for mine, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(mine, theirs)
    with_norms, without = map(logged, runs)
    assert [entry["step"] for entry in with_norms] == [1, 2, 4]
    for mine, theirs in zip(with_norms, without, strict=True):
        assert {"grad_norm_ce", "grad_norm_brier"} <= set(mine) and "grad_norm_ce" not in theirs
        assert all(mine[key] == theirs[key] for key in ("loss", "nll", "brier", "grad_norm"))


def test_flips_are_counted_once(tmp_path: Path) -> None:
    counts = []
    for measured in (True, False):
        trainer = make_trainer(
            tmp_path, "gpt2", scoring_rule="dpsm", logging_steps=1, log_component_grad_norms=measured,
            corruption=Corruption(flips=TargetFlips(0.3, replacement_weights(VOCAB, (0, 1, 2)), seed=1)),
        )  # fmt: skip
        trainer.train()
        counts.append(trainer.corruption_record())
        assert [e["grad_norm"] for e in logged(trainer)] != [0.0] * 4
    assert counts[0] == counts[1] and counts[0]["flipped_tokens"] > 0


def test_the_clock_of_training_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, "gpt2", scoring_rule="dpsm", logging_steps=1, log_component_grad_norms=True)
    stopped = []
    measure = trainer._measure_components
    monkeypatch.setattr(
        trainer, "_measure_components", lambda inputs: (stopped.append(trainer._clock.stopped), measure(inputs))
    )
    trainer.train()
    assert len(stopped) == 4 and all(stopped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logging_strategy": "epoch"}, "logging_strategy=IntervalStrategy.EPOCH does not say which"),
        ({"logging_strategy": "no"}, "set logging_strategy='steps'"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "does not work with re-entrant activation checkpointing",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, "gpt2", log_component_grad_norms=True, **options)
