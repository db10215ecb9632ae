"""The training clock: it stands still during evaluation, files and pictures included, and goes on after a resume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from dpsm_hf.training.clock import seconds_trained
from tests import cases


class Slow(TrainerCallback):
    """Take a while after every evaluation, as drawing does, and with every training step."""

    def __init__(self, evaluation: float = 0.0, step: float = 0.0) -> None:
        self.evaluation, self.step = evaluation, step

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.evaluation)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.step)


def test_what_callbacks_do_with_an_evaluation_is_not_training() -> None:
    trainer = cases.build("gpt2", max_steps=3, eval_strategy="steps", eval_steps=1, per_device_train_batch_size=2)
    trainer.add_callback(Slow(evaluation=0.5))
    started = time.perf_counter()
    result = trainer.train()
    assert time.perf_counter() - started > 1.5
    history = trainer.state.log_history
    clocks = [value for entry in history for key, value in entry.items() if key.endswith("train_seconds")]
    assert clocks == sorted(clocks) and 0 < clocks[0] < clocks[-1]
    assert result.metrics["train_seconds"] == clocks[-1] < result.metrics["train_runtime"] - 1.5
    # several sets in one evaluation are taken off once
    trainer = cases.build("gpt2", max_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.add_callback(Slow(evaluation=0.2))
    metrics = trainer.train().metrics
    assert 0 < metrics["train_seconds"] < metrics["train_runtime"] - 6 * 0.2
    assert trainer.state.log_history[0]["eval_a_train_seconds"] == 0.0


def test_the_clock_goes_on_after_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        output_dir=str(tmp_path), max_steps=6, save_strategy="steps", save_steps=3, logging_steps=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    first = cases.build("gpt2", **options)
    first.add_callback(Slow(step=0.2))
    first.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    # step 3 is not logged, but its second is not lost
    assert [entry["step"] for entry in saved["log_history"]] == [2], "there are as many entries as of Trainer"
    before = saved["stateful_callbacks"]["TrainingClock"]["attributes"]["train_seconds"]
    assert before > max(0.6, seconds_trained(saved["log_history"]))
    assert all("epoch" in entry for entry in first.state.log_history)

    second = cases.build("gpt2", **options)
    second.add_callback(Slow(step=0.2))
    started = time.perf_counter()
    metrics = second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).metrics
    took = time.perf_counter() - started
    assert before + 0.6 < metrics["train_seconds"] < before + took
    entry = next(entry for entry in second.state.log_history if entry["step"] == 4 and "tokens_per_second" in entry)
    assert before + 0.2 < entry["train_seconds"] < metrics["train_seconds"]
    # one step of 2 rows since the resume, not two steps, and not since the beginning
    tokens = entry["tokens_per_second"] * (entry["train_seconds"] - before)
    assert tokens == pytest.approx(round(tokens), abs=1e-6) and 0 < tokens <= 2 * 11


def test_a_finished_run_that_is_resumed_trains_no_step_more(tmp_path: Path) -> None:
    """Transformers 5.23 looks for the end after a step, so that its Trainer would train step 4 of 3."""
    options: dict[str, Any] = dict(
        output_dir=str(tmp_path), max_steps=3, save_strategy="steps", save_steps=3, per_device_train_batch_size=2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    first = cases.build("gpt2", **options)
    metrics = first.train().metrics
    again = cases.build("gpt2", **options)
    resumed = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).metrics
    assert again.state.global_step == 3
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert one.equal(other)
    assert 0 < resumed["train_seconds"] <= metrics["train_seconds"]


def test_a_log_without_a_clock_says_nothing() -> None:
    assert seconds_trained([{"loss": 1.0, "step": 1}]) is None
    assert seconds_trained([{"eval_x_train_seconds": 2.0}, {"train_seconds": 1}]) == 2.0


def test_evaluation_keeps_the_order_of_the_set(tmp_path: Path) -> None:
    """A row's place says which block of documents it is in, whatever order is trained in."""
    blocks = []
    for strategy, batch in (("random", 3), ("group_by_length", 2)):
        trainer = cases.build("gpt2", rows=20, per_device_eval_batch_size=batch, train_sampling_strategy=strategy)
        trainer.evaluate()
        blocks.append(trainer.calibration.count.sum(1))
    assert blocks[0].equal(blocks[1])
