"""What a subclass of the trainers overrides, and what a trainer class behind the mixin does: all of it is called."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from dpsm_hf import CalibrationCallback, DPSMConfig, DPSMMixin, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from dpsm_hf.data.corruption import TargetFlips
from dpsm_hf.training.corruption import Corruption
from tests.tiny import LENGTH, SEQ2SEQ, VOCAB, make_data, make_model

METHODS = ("compute_loss", "prediction_step", "evaluation_loop", "training_step", "log", "get_batch_samples",
           "evaluate", "predict", "train")  # fmt: skip
#: model, whether it generates in evaluation
CASES = [("gpt2", False), ("bart", False), ("bart", True), ("t5", True)]
VOLATILE = ("runtime", "per_second", "preparation", "seconds")


def counting(base: type) -> Any:
    """Return a class that counts the calls of every method that may be overridden, and calls on."""

    def method(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return getattr(super(made, self), name)(*args, **kwargs)

        return call

    made: Any = type("Counting", (base,), {"calls": Counter(), **{name: method(name) for name in METHODS}})
    return made


def build(kind: Any, name: str, generates: bool, folder: Path, **options: Any) -> Any:
    config = DPSMSeq2SeqConfig if name in SEQ2SEQ else DPSMConfig
    if generates:
        options |= {"predict_with_generate": True, "generation_max_length": 6}
    args = config(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=2,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=1, calibration_metrics="all", **options,
    )  # fmt: skip
    data = {"train_dataset": make_data(name, 16), "eval_dataset": make_data(name, 7, seed=1)}
    trainer = kind(model=make_model(name, 0.1), args=args, **data)
    trainer.remove_callback(CalibrationCallback)
    if generates:
        trainer.compute_metrics = lambda prediction: {}  # without one a Seq2SeqTrainer generates nothing
    return trainer


def everything(trainer: Any) -> list[Any]:
    """Train, evaluate and predict; return all numbers that are no durations."""
    trainer.train()
    metrics = [*trainer.state.log_history, trainer.evaluate()]
    predicted = trainer.predict(make_data("bart" if trainer.model.config.is_encoder_decoder else "gpt2", 5, seed=2))
    numbers = [
        {key: value for key, value in entry.items() if not any(part in key for part in VOLATILE)}
        for entry in [*metrics, predicted.metrics]
    ]
    return [*numbers, predicted.predictions, [p.detach().clone() for p in trainer.model.parameters()]]


def assert_same(mine: list[Any], theirs: list[Any]) -> None:
    assert mine[:-2] == theirs[:-2]
    torch.testing.assert_close(mine[-2:], theirs[-2:], rtol=0, atol=0)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("name", "generates"), CASES)
def test_every_override_is_called_and_calls_on(name: str, generates: bool, mixed: bool, tmp_path: Path) -> None:
    """In front of the mixin (a subclass of ours) and behind it (the trainer class that it is mixed into)."""
    plain, stock = (DPSMSeq2SeqTrainer, Seq2SeqTrainer) if name in SEQ2SEQ else (DPSMTrainer, Trainer)
    kind = type("Mine", (DPSMMixin, counting(stock)), {}) if mixed else counting(plain)
    options = {"fused_head": "off"}  # in front of ours, compute_loss makes logits for whoever overrides it
    trainer = build(kind, name, generates, tmp_path, **options)
    found = everything(trainer)
    batches = 2 * 2 + 2 + 2  # of two evaluations while training, one after it, and a prediction
    expected = {
        "training_step": 4, "get_batch_samples": 2, "prediction_step": batches, "evaluation_loop": 4, "evaluate": 3,
        "predict": 1, "train": 1,
    }  # fmt: skip
    if not mixed:  # the loss of a batch is never that of the class behind
        expected["compute_loss"] = 4 + batches + (batches if generates else 0)
    calls = dict(trainer.calls)
    assert calls.pop("log") == 2 + 3 + 1
    assert calls == expected
    assert_same(found, everything(build(plain, name, generates, tmp_path, **options)))


def watched(base: type, shapes: list[Any]) -> Any:
    class Watches(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            result = super().compute_loss(model, inputs, return_outputs, **kwargs)
            if return_outputs:
                shapes.append(tuple(result[1]["logits"].shape))
            return result

    return Watches


@pytest.mark.parametrize(("name", "generates"), CASES)
def test_who_overrides_compute_loss_gets_logits_wherever_outputs_are_asked_for(
    name: str, generates: bool, tmp_path: Path
) -> None:
    shapes: list[Any] = []
    base = DPSMSeq2SeqTrainer if name in SEQ2SEQ else DPSMTrainer

    class Derived(watched(base, shapes)):  # type: ignore[misc]
        """Overrides nothing itself."""

    trainer = build(Derived, name, generates, tmp_path, fused_head="on", prediction_loss_only=not generates)
    trainer.train()
    assert len(shapes) == 2 * 2 * (2 if generates else 1)
    assert all(len(shape) == 3 and shape[-1] == VOCAB for shape in shapes)
    assert (4, LENGTH, VOCAB) in shapes


def test_the_last_loss_of_a_batch_counts(tmp_path: Path) -> None:
    """A subclass may compute the loss twice, as R-Drop does; the tokens are counted once."""

    class Twice(DPSMTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            super().compute_loss(model, {**inputs, "labels": inputs["labels"].clone().fill_(5)}, *args, **kwargs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    twice, once = (build(kind, "gpt2", False, tmp_path, fused_head="off") for kind in (Twice, DPSMTrainer))
    mine, theirs = twice.evaluate(), once.evaluate()
    assert {key: mine[key] for key in ("eval_tokens", "eval_nll", "eval_ece_15")} == {
        key: theirs[key] for key in ("eval_tokens", "eval_nll", "eval_ece_15")
    }


@pytest.mark.parametrize(("name", "generates"), [("gpt2", False), ("bart", True)])
def test_an_evaluation_inside_another_leaves_it_as_it_was(name: str, generates: bool, tmp_path: Path) -> None:
    """So does a temperature that is fitted between two of its batches."""

    class Nested(TrainerCallback):
        trainer: Any
        busy = False
        inner: list[Any]

        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            with self.once() as first:
                if first:
                    gather = self.trainer.gather_function
                    self.trainer.fit_temperature(make_data(name, 16).select(range(9)))
                    self.inner.append(self.trainer.evaluate(make_data(name, 6, seed=3)))
                    self.trainer.gather_function = gather

        @contextmanager
        def once(self) -> Iterator[bool]:
            first, self.busy = not self.busy, True
            yield first
            self.busy = not first

    kind = DPSMSeq2SeqTrainer if name in SEQ2SEQ else DPSMTrainer
    alone = build(kind, name, generates, tmp_path, learning_rate=3e-2)
    alone.train()
    expected = alone.evaluate()
    nested = Nested()
    nested.trainer, nested.inner = alone, []
    alone.add_callback(nested)
    found = alone.evaluate()
    assert len(nested.inner) == 2 and nested.inner[0]["eval_tokens"] < found["eval_tokens"]
    same = {key for key in expected if not any(part in key for part in VOLATILE)}
    assert {"eval_tokens", "eval_nll", "eval_ece_15"} <= same and (not generates or "eval_summaries" in same)
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert alone.panel.samples > 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_class_behind_the_mixin_sees_and_changes_what_is_generated(
    name: str, smoothing: float, tmp_path: Path
) -> None:
    class Behind(Seq2SeqTrainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            scored = int((inputs["labels"] != -100).sum())
            loss, generated, labels = super().prediction_step(model, inputs, *args, **kwargs)
            return loss * 3, generated, torch.where(labels == -100, scored, labels)

    class Mine(DPSMMixin, Behind):
        pass

    seen: list[Any] = []
    options: dict[str, Any] = {"label_smoothing_factor": smoothing}
    plain = build(DPSMSeq2SeqTrainer, name, True, tmp_path, **options)
    mine = build(Mine, name, True, tmp_path, **options)
    mine.compute_metrics = lambda prediction: seen.append(prediction.label_ids) or {}
    expected, found = plain.evaluate(), mine.evaluate()
    assert found["eval_loss"] == pytest.approx(3 * expected["eval_loss"], rel=1e-6)
    assert found["eval_nll"] == expected["eval_nll"]
    assert seen and (seen[0] != -100).any()
    if not smoothing:
        assert expected["eval_loss"] == pytest.approx(expected["eval_nll"], rel=0.2)
    else:  # smoothed once, as the labels themselves are not
        unsmoothed = build(DPSMSeq2SeqTrainer, name, True, tmp_path).evaluate()
        assert expected["eval_nll"] == unsmoothed["eval_nll"] and expected["eval_loss"] != unsmoothed["eval_loss"]


def test_a_batch_of_an_evaluation_is_prepared_once(tmp_path: Path) -> None:
    class Mine(DPSMTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared.append(inputs.pop("idx"))
            return super()._prepare_inputs(inputs)

    prepared: list[int] = []
    trainer = build(Mine, "gpt2", False, tmp_path)
    collate, count = trainer.data_collator, iter(range(100))
    trainer.data_collator = lambda rows: {**collate(rows), "idx": next(count)}
    assert trainer.evaluate()["eval_tokens"] and prepared == [0, 1]


def test_arguments_and_corruption_may_be_replaced(tmp_path: Path) -> None:
    trainer = build(DPSMTrainer, "gpt2", False, tmp_path)
    replaced = copy.copy(trainer.args)
    replaced.fused_head = "off"
    trainer.args = replaced
    found = everything(trainer)
    assert_same(found, everything(build(DPSMTrainer, "gpt2", False, tmp_path, fused_head="off")))
    flipped = build(DPSMTrainer, "gpt2", False, tmp_path)
    flipped.corruption = Corruption(flips=TargetFlips(0.5, torch.ones(VOCAB, dtype=torch.int64), seed=1))
    assert flipped.train().metrics["train_flipped_tokens"] > 0


def test_a_subclass_may_have_attributes_of_any_name_that_is_no_part_of_the_trainer(tmp_path: Path) -> None:
    class Mine(DPSMTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.scorer = self.clock = self.evaluation = self.panels = "rouge"

    trainer = build(Mine, "gpt2", False, tmp_path)
    trainer.train()
    assert trainer.evaluate()["eval_tokens"] and trainer.scorer == "rouge"
