"""Evaluation with DPSMTrainer: generation, prediction, several sets, streaming, memory, and what is scored."""

from __future__ import annotations

import gc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from transformers import BertConfig, BertForMaskedLM, TrainerCallback

from dpsm_hf import DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from tests.short_training import config, train
from tests.tiny import LENGTH, VOCAB, make_data, make_model


def test_generation_and_calibration_in_one_evaluation(tmp_path: Path) -> None:
    args = DPSMSeq2SeqConfig(output_dir=str(tmp_path), calibration_metrics="all", use_cpu=True, disable_tqdm=True,
                             predict_with_generate=True,
                             generation_max_length=6, per_device_eval_batch_size=3)  # fmt: skip
    shapes: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape[0], prediction.label_ids.shape[0]))
        return {"length": float(np.mean((prediction.predictions != 1).sum(-1))), "brier": 7.0}

    model, data = make_model("bart"), make_data("bart", rows=7)
    trainer = DPSMSeq2SeqTrainer(model=model, args=args, eval_dataset=data, compute_metrics=compute_metrics,
                                 processing_class=None)  # fmt: skip
    generated = trainer.evaluate()
    assert shapes == [(7, 7)] and "eval_length" in generated
    assert generated["eval_brier"] == 7.0  # the user's own metric keeps its name
    args.predict_with_generate = False
    forced = DPSMSeq2SeqTrainer(model=model, args=args, eval_dataset=data).evaluate()
    for key in ("eval_nll", "eval_ece_15", "eval_tokens", "eval_spherical"):
        assert generated[key] == pytest.approx(forced[key], rel=1e-9), key
    args.predict_with_generate = True
    predicted = trainer.predict(data)
    assert predicted.metrics["test_nll"] == pytest.approx(forced["eval_nll"], rel=1e-9)


def test_predict_returns_logits_and_metrics(tmp_path: Path) -> None:
    data = make_data("gpt2", rows=5)
    output = DPSMTrainer(model=make_model("gpt2"), args=config(tmp_path)).predict(data)
    assert output.predictions.shape == (5, LENGTH, VOCAB)
    assert {"test_loss", "test_nll", "test_ece_15"} <= set(output.metrics)


def test_several_eval_sets_get_names_of_their_own(tmp_path: Path) -> None:
    sets = {"short": make_data("gpt2", rows=3), "long": make_data("gpt2", rows=9, seed=5)}
    trainer = DPSMTrainer(model=make_model("gpt2"), args=config(tmp_path), eval_dataset=sets)
    metrics = trainer.evaluate()
    assert metrics["eval_short_nll"] != metrics["eval_long_nll"]
    assert {p.name for p in (tmp_path / "calibration").glob("*.json")} == {
        "eval_short-step-000000.json",
        "eval_long-step-000000.json",
    }


def test_streaming_sets_train_and_evaluate(tmp_path: Path) -> None:
    rows = make_data("gpt2", rows=7)
    stream = IterableDataset.from_generator(lambda: iter(rows.to_list()))
    trainer = DPSMTrainer(model=make_model("gpt2"), args=config(tmp_path), train_dataset=stream, eval_dataset=stream)
    assert len(train(trainer)) == 3
    streamed = trainer.evaluate()
    listed = trainer.evaluate(rows)
    assert streamed["eval_tokens"] == listed["eval_tokens"]
    assert streamed["eval_brier"] == pytest.approx(listed["eval_brier"], rel=1e-9)


def test_evaluation_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    peaks: list[int] = []

    class Measure(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            alive = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
            peaks[-1] = max(peaks[-1], sum(t.numel() * t.element_size() for t in alive))

    args = config(tmp_path, per_device_eval_batch_size=4)
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args, callbacks=[Measure()])
    for rows in (8, 128):
        peaks.append(0)
        trainer.evaluate(make_data("gpt2", rows=rows))
    # Trainer keeps one float32 loss a sample; the logits of the 30 further batches would be 560 KiB
    assert peaks[1] - peaks[0] <= 4 * 128
    assert 30 * 4 * LENGTH * VOCAB * 4 > 500 * 1024


def test_perplexity_is_that_of_scored_tokens_on_gpt2(tmp_path: Path) -> None:
    """GPT-2's eval_loss divides by one token too many a row upstream; eval_nll does not."""
    data = make_data("gpt2", rows=4).map(lambda row: {"labels": row["input_ids"]})
    trainer = DPSMTrainer(model=make_model("gpt2"), args=config(tmp_path), eval_dataset=data)
    metrics = trainer.evaluate()
    assert metrics["eval_tokens"] == 4 * (LENGTH - 1)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"] * (LENGTH - 1) / LENGTH, rel=1e-6)
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(torch.tensor(data["input_ids"])).logits[:, :-1].double()
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(data["labels"])[:, 1:].flatten())
    assert metrics["eval_perplexity"] == pytest.approx(float(truth.exp()), rel=1e-6)


def test_shift_labels_of_a_collator_are_used_as_they_are(tmp_path: Path) -> None:
    data = make_data("llama", rows=4)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        batch["shift_labels"][:, 0] = -100  # a first token that only this collator leaves out
        return batch

    trainer = DPSMTrainer(model=make_model("llama"), args=config(tmp_path), eval_dataset=data, data_collator=collate)
    plain = DPSMTrainer(model=make_model("llama"), args=config(tmp_path), eval_dataset=data)
    assert trainer.evaluate()["eval_tokens"] == plain.evaluate()["eval_tokens"] - 4


def test_masked_language_model_is_scored_unshifted(tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                       intermediate_size=48, max_position_embeddings=32))  # fmt: skip
    data = make_data("gpt2", rows=4)
    metrics = DPSMTrainer(model=model, args=config(tmp_path), eval_dataset=data).evaluate()
    model.eval()
    batch = {k: torch.tensor(data[k]) for k in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert metrics["eval_nll"] == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_more_rows_than_samples_are_all_evaluated(tmp_path: Path) -> None:
    data = make_data("gpt2", rows=10)

    def twice(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in rows] * 2) for key in rows[0]}

    arguments = config(tmp_path, per_device_eval_batch_size=4)
    once = DPSMTrainer(model=make_model("gpt2"), args=arguments, eval_dataset=data).evaluate()
    doubled = DPSMTrainer(model=make_model("gpt2"), args=arguments, eval_dataset=data, data_collator=twice).evaluate()
    assert doubled["eval_tokens"] == 2 * once["eval_tokens"]
    assert doubled["eval_nll"] == pytest.approx(once["eval_nll"], rel=1e-6)


def test_names_of_evaluation_sets_become_file_names(tmp_path: Path) -> None:
    sets = {"org/v1.5": make_data("gpt2", rows=3), "org/v1.6": make_data("gpt2", rows=3)}
    DPSMTrainer(model=make_model("gpt2"), args=config(tmp_path), eval_dataset=sets).evaluate()
    names = [
        f"eval_org_v1.{n}-{zlib.crc32(f'eval_org/v1.{n}'.encode()):08x}-step-000000.{kind}"
        for n in (5, 6)
        for kind in ("json", "png")
    ]
    assert sorted(p.name for p in (tmp_path / "calibration").iterdir()) == names


def test_generation_arguments_in_a_plain_dpsm_trainer_do_no_harm(tmp_path: Path) -> None:
    args = DPSMSeq2SeqConfig(
        output_dir=str(tmp_path),
        calibration_metrics="all",
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
    )
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args, eval_dataset=make_data("gpt2", rows=3),
                          compute_metrics=lambda prediction: {"rows": len(prediction.predictions)})  # fmt: skip
    assert trainer.evaluate()["eval_rows"] == 3
