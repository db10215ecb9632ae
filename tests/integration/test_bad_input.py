"""Wrong data and wrong options end in an error that names the value, the place and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from dpsm_hf import DPSMConfig, DPSMTrainer
from tests import cases
from tests.tiny import VOCAB, make_data, make_model


def args(tmp_path: Path, **arguments: Any) -> DPSMConfig:
    defaults = dict(output_dir=str(tmp_path), max_steps=4, use_cpu=True, disable_tqdm=True, save_strategy="no",
                    logging_steps=1)  # fmt: skip
    return DPSMConfig(**{**defaults, **arguments})


@pytest.mark.parametrize("loss_type", ["ce", "dpsm"])
def test_a_label_beyond_the_vocabulary_is_found_before_training(loss_type: str, tmp_path: Path) -> None:
    rows = make_data("gpt2").to_list()
    rows[11]["labels"][2] = VOCAB + 3
    data = make_data("gpt2").from_list(rows)
    model = make_model("gpt2")
    trainer = DPSMTrainer(model=model, args=args(tmp_path, loss_type=loss_type), train_dataset=data)
    with pytest.raises(ValueError, match=rf"train_dataset row 11 has label {VOCAB + 3}, outside \[0, {VOCAB}\)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("loss_type", ["ce", "dpsm"])
def test_a_wrong_label_that_only_a_batch_shows_is_named(loss_type: str, tmp_path: Path) -> None:
    rows = make_data("gpt2").to_list()
    for row in rows:
        row["labels"][2] = -1  # a list is no datasets.Dataset: its rows are looked at as they come
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path, loss_type=loss_type), train_dataset=rows)
    with pytest.raises(ValueError, match=r"label -1 at position \(0, 1\) lies outside"):
        trainer.train()


class _PoisonAt(nn.Module):
    """Turns one logit into NaN at a given call."""

    def __init__(self, head: nn.Module, call: int, value: float) -> None:
        super().__init__()
        self.head, self.call, self.value, self.calls = head, call, value, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        self.calls += 1
        if self.calls == self.call:
            logits = logits.clone()
            logits[1, 2, 5] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss_type", ["ce", "brier", "dpsm"])
def test_non_finite_logits_stop_training_at_their_step(loss_type: str, value: float) -> None:
    trainer = cases.build("gpt2", loss_type=loss_type, max_steps=4, per_device_train_batch_size=2,
                          gradient_accumulation_steps=2)  # fmt: skip
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]})
    trainer.model.lm_head = _PoisonAt(trainer.model.lm_head, call=6, value=value)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "optimizer step 3, micro-batch 2" in message and "sample 1" in message and "position 2" in message
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())  # the optimizer never saw it


def test_non_finite_logits_are_found_at_the_next_log_without_the_filter() -> None:
    trainer = cases.build("gpt2", max_steps=4, per_device_train_batch_size=2, logging_nan_inf_filter=False)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]})
    trainer.model.lm_head = _PoisonAt(trainer.model.lm_head, call=2, value=float("nan"))
    with pytest.raises(FloatingPointError, match="is nan"):
        trainer.train()


def test_an_empty_set_is_named(tmp_path: Path) -> None:
    empty = make_data("gpt2").select([])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path), train_dataset=empty).train()
    with pytest.raises(ValueError, match="is empty"):
        DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path), eval_dataset=empty).evaluate()


def test_logits_shorter_than_the_labels_are_named(tmp_path: Path) -> None:
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path))
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="logits for 2 positions but the labels have 4"):
        trainer.compute_loss(trainer.model, {**batch, "logits_to_keep": 2})


def test_plain_arguments_are_checked_too(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing=1.5 lies outside \[0, 1\)"):
        DPSMTrainer(model=make_model("gpt2"), args=plain)
