"""Trainers of tiny models for tests of what their evaluation reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from dpsm_hf import CalibrationCallback, DPSMConfig, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from tests.tiny import SEQ2SEQ, make_data, make_model

_OF_THE_TRAINER = ("callbacks", "eval_dataset", "calibration_dataset", "corruption")


def make_trainer(folder: Path, name: str = "gpt2", **options: Any) -> Any:
    given = {key: options.pop(key) for key in _OF_THE_TRAINER if key in options}
    seq2seq = name in SEQ2SEQ
    dropout = options.pop("dropout", 0.0)
    defaults: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        per_device_train_batch_size=8, per_device_eval_batch_size=4, learning_rate=1e-2, max_steps=4,
        scoring_rule="ce", calibration_metrics="all",
    )  # fmt: skip
    config = DPSMSeq2SeqConfig if seq2seq else DPSMConfig
    trainer = (DPSMSeq2SeqTrainer if seq2seq else DPSMTrainer)(
        model=make_model(name, dropout), args=config(**{**defaults, **options}), train_dataset=make_data(name, 16),
        **{"eval_dataset": make_data(name, 11), **given},
    )  # fmt: skip
    trainer.remove_callback(CalibrationCallback)
    if options.get("predict_with_generate"):
        trainer.compute_metrics = lambda prediction: {}  # without one a Seq2SeqTrainer generates nothing
    return trainer


def float64_logits(model: Any, data: Dataset, *, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the scored tokens and their labels."""
    batch = {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        logits = model.eval()(**batch).logits.double()
    labels = batch["labels"]
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != -100
    return logits[keep], labels[keep]
