"""With scoring_rule="ce" and fused_head="off" DPSMTrainer is Trainer, bit for bit: losses, logs, parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from dpsm_hf import DPSMConfig, DPSMTrainer
from tests import cases
from tests.tiny import make_data, make_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "label_smoothing_accumulation": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "bf16_accumulation": {"bf16": True, "gradient_accumulation_steps": 3},
    "prediction_loss_only": {"prediction_loss_only": True},
    "activation_checkpointing": {cases.CHECKPOINTING: True},
    "activation_checkpointing_accumulation": {cases.CHECKPOINTING: True, "gradient_accumulation_steps": 3},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_lora"])
def test_bit_equal(name: str, variant: str) -> None:
    common = dict(
        scoring_rule="ce",
        fused_head="off",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        **VARIANTS[variant],
    )
    theirs = cases.parameters_and_logs(name, stock=True, **common)
    ours = cases.parameters_and_logs(name, stock=False, **common)
    assert all(torch.equal(a, b) for a, b in zip(theirs["parameters"], ours["parameters"], strict=True))
    assert len(theirs["logs"]) == len(ours["logs"])
    for stock, mine in zip(theirs["logs"], ours["logs"], strict=True):
        assert stock == {key: mine[key] for key in stock}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_lora"])
def test_the_fused_head_is_trainer_up_to_rounding(name: str, smoothing: float) -> None:
    arguments = dict(label_smoothing_factor=smoothing, prediction_loss_only=True, learning_rate=1e-3)
    theirs = cases.parameters_and_logs(name, stock=True, **arguments)
    ours = cases.parameters_and_logs(name, stock=False, scoring_rule="ce", fused_head="on", **arguments)
    for a, b in zip(theirs["parameters"], ours["parameters"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # three steps of Adam, whose sign may turn on a zero
    assert len(theirs["logs"]) == len(ours["logs"])
    for stock, mine in zip(theirs["logs"], ours["logs"], strict=True):
        for key in stock:
            assert mine[key] == pytest.approx(stock[key], rel=2e-6), key


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_lora"])
def test_gradients_are_equal_bit_for_bit(name: str) -> None:
    theirs, ours = (cases.one_step(name, "ce", 4, 4, stock=stock, fused_head="off") for stock in (True, False))
    assert torch.equal(theirs["gradient"], ours["gradient"])


def test_another_loss_is_not_equal() -> None:
    """The comparison can fail: it does for every other loss."""
    ce, brier = (cases.one_step("gpt2", loss, 4, 4) for loss in ("ce", "brier"))
    assert not torch.equal(ce["gradient"], brier["gradient"])


def test_a_model_that_is_no_language_model_trains_with_ce_as_in_trainer(tmp_path: Any) -> None:
    class Regressor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            prediction = self.layer(x).squeeze(-1)
            return {"loss": (prediction - labels).square().mean(), "logits": prediction}

    data = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(8)]
    finals = []
    for trainer_class, config in ((Trainer, TrainingArguments), (DPSMTrainer, DPSMConfig)):
        torch.manual_seed(0)
        model = Regressor()
        extra = {"scoring_rule": "ce"} if config is DPSMConfig else {}
        args = config(output_dir=str(tmp_path), max_steps=4, use_cpu=True, disable_tqdm=True, save_strategy="no",
                      gradient_accumulation_steps=2, per_device_train_batch_size=2, **extra)  # fmt: skip
        trainer_class(model=model, args=args, train_dataset=data).train()
        finals.append(model.layer.weight.detach().clone())
    assert torch.equal(*finals)


def test_plain_training_arguments_train_with_dpsm(tmp_path: Any) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, logging_steps=1, use_cpu=True, disable_tqdm=True,
                             save_strategy="no", eval_strategy="steps", eval_steps=2)  # fmt: skip
    data = make_data("gpt2")
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["alpha"] for entry in logged] == [0.0, 1.0, 1.0, 1.0]  # 10 % of 4 steps is one step
    assert {"eval_brier", "eval_ece_15", "eval_loss"} <= set(trainer.evaluate())
