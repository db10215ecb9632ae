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


@pytest.mark.parametrize("scoring_rule", ["ce", "dpsm"])
def test_a_label_beyond_the_vocabulary_is_found_before_training(scoring_rule: str, tmp_path: Path) -> None:
    rows = make_data("gpt2").to_list()
    rows[11]["labels"][2] = VOCAB + 3
    data = make_data("gpt2").from_list(rows)
    model = make_model("gpt2")
    trainer = DPSMTrainer(model=model, args=args(tmp_path, scoring_rule=scoring_rule), train_dataset=data)
    with pytest.raises(ValueError, match=rf"train_dataset row 11 has label {VOCAB + 3}, outside \[0, {VOCAB}\)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("scoring_rule", ["ce", "dpsm"])
def test_a_wrong_label_that_only_a_batch_shows_is_named(scoring_rule: str, tmp_path: Path) -> None:
    rows = make_data("gpt2").to_list()
    for row in rows:
        row["labels"][2] = -1  # a list is no datasets.Dataset: its rows are looked at as they come
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path, scoring_rule=scoring_rule), train_dataset=rows)
    with pytest.raises(ValueError, match=r"label -1 at position \(0, 1\) lies outside"):
        trainer.train()


class _PoisonAt(nn.Module):
    """Turns one hidden state, and so a row of logits, into NaN or infinities at a given call."""

    def __init__(self, layer: nn.Module, call: int, value: float) -> None:
        super().__init__()
        self.layer, self.call, self.value, self.calls = layer, call, value, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(hidden)
        self.calls += 1
        if self.calls == self.call:
            hidden = hidden.clone()
            hidden[1, 2, 5] = self.value
        return hidden


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("scoring_rule", ["ce", "brier", "dpsm"])
def test_non_finite_logits_stop_training_at_their_step(scoring_rule: str, fused_head: str, value: float) -> None:
    trainer = cases.build("gpt2", scoring_rule=scoring_rule, max_steps=4, per_device_train_batch_size=2,
                          gradient_accumulation_steps=2, fused_head=fused_head)  # fmt: skip
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]})
    trainer.model.transformer.ln_f = _PoisonAt(trainer.model.transformer.ln_f, call=6, value=value)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "optimizer step 3, micro-batch 2" in message and "sample 1" in message and "position 2" in message
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())  # the optimizer never saw it


def test_non_finite_logits_are_found_at_the_next_log_without_the_filter() -> None:
    trainer = cases.build("gpt2", max_steps=4, per_device_train_batch_size=2, logging_nan_inf_filter=False)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]})
    trainer.model.transformer.ln_f = _PoisonAt(trainer.model.transformer.ln_f, call=2, value=float("nan"))
    with pytest.raises(FloatingPointError, match="is nan"):
        trainer.train()


def test_an_empty_set_is_named(tmp_path: Path) -> None:
    empty = make_data("gpt2").select([])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path), train_dataset=empty).train()
    with pytest.raises(ValueError, match="is empty"):
        DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path), eval_dataset=empty).evaluate()


def test_logits_shorter_than_the_labels_are_named(tmp_path: Path) -> None:
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path, scoring_rule="ce"))
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="logits for 2 positions but the labels have 4"):
        trainer.compute_loss(trainer.model, {**batch, "logits_to_keep": 2})


def test_plain_arguments_are_checked_too(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing=1.5 lies outside \[0, 1\)"):
        DPSMTrainer(model=make_model("gpt2"), args=plain)


def test_a_batch_without_labels_is_refused(tmp_path: Path) -> None:
    data = make_data("gpt2").rename_column("labels", "label_ids")
    with pytest.raises(
        ValueError, match=r"the batch has no 'labels', only .*so scoring_rule='brier' cannot be computed"
    ):
        DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path, scoring_rule="brier", remove_unused_columns=False),
                    train_dataset=data.remove_columns("label_ids")).train()  # fmt: skip


def test_a_feedback_metric_that_nothing_reports_is_refused(tmp_path: Path) -> None:
    data = make_data("gpt2")
    feedback = args(tmp_path, alpha_schedule="feedback", eval_strategy="steps", eval_steps=1)
    trainer = DPSMTrainer(model=make_model("gpt2"), args=feedback, train_dataset=data, eval_dataset={"a": data})
    with pytest.raises(ValueError, match="use eval_a_signed_gap"):
        trainer.train()


def test_nan_logits_in_evaluation_are_named(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.lm_head.weight.data[5] = float("nan")
    trainer = DPSMTrainer(model=model, args=args(tmp_path), eval_dataset=make_data("gpt2", rows=3))
    with pytest.raises(FloatingPointError, match=r"at optimizer step 0: the logits of .* first in sample 0"):
        trainer.evaluate()


def test_an_unknown_model_whose_first_batch_is_ignored_is_probed_on_the_next(tmp_path: Path) -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCAB, VOCAB)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            logits = self.table(input_ids)
            if labels is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    rows = make_data("gpt2", rows=4).remove_columns("attention_mask").to_list()
    rows[0]["labels"] = [-100] * len(rows[0]["labels"])
    arguments = args(tmp_path, per_device_train_batch_size=1, train_sampling_strategy="sequential")
    trainer = DPSMTrainer(model=Bigram(), args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == 0.0 and losses[1] > 0 and trainer._scorer.alignment == "aligned"


@pytest.mark.parametrize("kind", ["list", "ndarray"])
@pytest.mark.parametrize("scoring_rule", ["ce", "dpsm"])
def test_labels_that_are_no_tensor_are_refused_in_words(scoring_rule: str, kind: str, tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.tolist() if kind == "list" else ids.numpy()}

    rows = [{"input_ids": [1, 2, 3, 4]} for _ in range(8)]
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args(tmp_path, scoring_rule=scoring_rule), train_dataset=rows,
                          data_collator=collate)  # fmt: skip
    with pytest.raises(ValueError, match=rf"labels of the batch are a {kind}.*torch.as_tensor"):
        trainer.train()
