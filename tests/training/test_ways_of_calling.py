"""The trainers called in every way that Transformers' own allow: what comes out is theirs, or a clear refusal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as hf_logging

from dpsm_hf import DPSMConfig, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from dpsm_hf.evaluation.panel import better_direction, reported_names
from tests.tiny import SEQ2SEQ, VOCAB, make_data, make_model


def build(kind: Any, name: str, folder: Path, plain: bool = False, data: Any = None, **options: Any) -> Any:
    stock = not issubclass(kind, (DPSMTrainer, DPSMSeq2SeqTrainer)) or plain
    seq2seq = name in SEQ2SEQ
    config: Any = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments) if stock else (
        DPSMSeq2SeqConfig if seq2seq else DPSMConfig
    )  # fmt: skip
    given: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=1,
        report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    data = make_data(name, 16) if data is None else data
    return kind(model=make_model(name), args=config(**{**given, **options}), train_dataset=data, eval_dataset=data)


# ---- a loss of a subclass ------------------------------------------------------------------------------------------


def with_own_loss(base: Any, says: bool | None) -> Any:
    class Mine(base):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**inputs)  # the mean of this micro-batch
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    if says is not None:
        Mine.loss_is_scaled_for_ga = says
    return Mine


@pytest.mark.parametrize(
    "name", ["llama", "bart"]
)  # the forward of one takes num_items_in_batch, the other's does not
@pytest.mark.parametrize("says", [None, False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_of_ones_own_is_trained_as_in_trainer(
    name: str, says: bool | None, accumulation: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, stock = (DPSMSeq2SeqTrainer, Seq2SeqTrainer) if name in SEQ2SEQ else (DPSMTrainer, Trainer)
    found = []
    for base, plain in ((stock, True), (ours, True), (ours, False)):
        options: dict[str, Any] = dict(
            gradient_accumulation_steps=accumulation, per_device_train_batch_size=4, optim="sgd", learning_rate=1.0,
            max_grad_norm=0.0,
        )  # fmt: skip
        trainer = build(with_own_loss(base, says), name, tmp_path, plain, **options)
        trainer.train()
        entry = trainer.state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"], [p.detach().clone() for p in trainer.model.parameters()]))
    for other in found[1:]:
        assert other[:2] == found[0][:2]
        torch.testing.assert_close(other[2], found[0][2], rtol=0, atol=0)
    printed = capsys.readouterr().out
    assert (
        printed.count("DPSM | the loss is that of Mine.compute_loss: scoring_rule and the alpha schedule have no") == 2
    )
    assert "alpha 0 ->" not in printed


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_subclass_that_calls_on_gets_the_exact_loss(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = DPSMSeq2SeqTrainer if name in SEQ2SEQ else DPSMTrainer

    class Doubles(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):  # type: ignore[no-untyped-def]
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return (2 * loss[0], loss[1]) if return_outputs else 2 * loss

    whole, parts = (
        build(kind, name, tmp_path, gradient_accumulation_steps=16 // size, per_device_train_batch_size=size)
        for kind, size in ((base, 16), (Doubles, 4))
    )
    whole.train()
    parts.train()
    assert parts.state.log_history[0]["loss"] == pytest.approx(2 * whole.state.log_history[0]["loss"], rel=1e-5)
    assert "the loss is that of" not in capsys.readouterr().out


def test_a_subclass_that_calls_on_without_the_count_has_a_mean_that_is_divided(tmp_path: Path) -> None:
    class Forgets(DPSMTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return super().compute_loss(model, inputs, return_outputs)

    whole = build(DPSMTrainer, "llama", tmp_path, per_device_train_batch_size=16)
    parts = build(Forgets, "llama", tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=4)
    whole.train()
    parts.train()
    one, other = (trainer.state.log_history[0]["loss"] for trainer in (whole, parts))
    assert other == pytest.approx(one, rel=0.05), "the mean of means is near; four times as much is not"


# ---- outside of train(), and attempts that fail ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"max_steps": 100, "alpha_schedule": "cosine"}, {"max_steps": -1, "num_train_epochs": 2}]
)
def test_alpha_and_losses_before_training(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = build(DPSMTrainer, "llama", tmp_path, **options)
    assert trainer.alpha == 0.0
    batch = {key: torch.tensor(value) for key, value in make_data("llama", 4)[:4].items()}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert float(loss) == pytest.approx(float(trainer.model(**batch).loss), rel=1e-5)
    assert float(trainer.training_step(trainer.model, dict(batch))) == pytest.approx(float(loss), rel=1e-5)
    loaders = len(trainer.accelerator._dataloaders)
    assert trainer.alpha == 0.0 and len(trainer.accelerator._dataloaders) == loaders, (
        "a loop that asks makes no loader"
    )
    without_data = DPSMTrainer(model=make_model("llama"), args=DPSMConfig(output_dir=str(tmp_path), use_cpu=True))
    assert without_data.alpha == 0.0


def test_a_step_of_hand_made_micro_batches_is_divided_as_in_trainer(tmp_path: Path) -> None:
    """Called without a count, a loss is a mean, and `Trainer` divides it by the micro-batches of the step."""
    batch = {key: torch.tensor(value) for key, value in make_data("llama", 4)[:4].items()}
    gradients = []
    for kind in (Trainer, DPSMTrainer):
        trainer = build(kind, "llama", tmp_path, gradient_accumulation_steps=4)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 4
        trainer.training_step(trainer.model, dict(batch))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fused_head", ["off", "auto"])
def test_an_attempt_that_ran_out_of_memory_is_forgotten(fused_head: str, tmp_path: Path) -> None:
    trainer = build(
        DPSMTrainer, "llama", tmp_path, scoring_rule="ce", auto_find_batch_size=True, per_device_train_batch_size=8,
        max_steps=4, logging_steps=4, remove_unused_columns=False, fused_head=fused_head, data=make_data("llama", 64),
    )  # fmt: skip
    forward, calls = trainer.model.forward, []

    def runs_out(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 4 and trainer.model.training:
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("CUDA out of memory.")
        return forward(*args, **kwargs)

    trainer.model.forward = runs_out
    trainer.train()
    entry = trainer.state.log_history[0]
    assert len(calls) > 2 and trainer._train_batch_size <= 4
    assert entry["nll"] == pytest.approx(entry["loss"], rel=2e-3)  # means over tokens and over steps


# ---- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("fused_head", ["off", "on"])
def test_labels_of_any_integers_are_the_same_labels(dtype: torch.dtype, fused_head: str, tmp_path: Path) -> None:
    trainer = build(DPSMTrainer, "llama", tmp_path, fused_head=fused_head, alpha_schedule="constant")
    batch = {key: torch.tensor(value) for key, value in make_data("llama", 4)[:4].items()}
    batch["labels"] = batch["input_ids"].clone()
    small = {**batch, "labels": batch["labels"].to(dtype)}
    trainer.model.train()
    assert float(trainer.compute_loss(trainer.model, small)) == float(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize(("dtype", "word"), [(torch.bool, "bool"), (torch.float32, "float32")])
def test_labels_that_are_no_token_ids_are_refused(dtype: torch.dtype, word: str, tmp_path: Path) -> None:
    trainer = build(DPSMTrainer, "llama", tmp_path)
    ids = torch.arange(12).reshape(2, 6) % VOCAB
    with pytest.raises(ValueError, match=rf"labels of the batch are {word}, .* token ids.*LlamaForCausalLM.*Trainer"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids.to(dtype)})


def test_a_model_that_is_no_language_model_is_told_apart_before_torch_complains(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, num_labels=1)  # fmt: skip
    rows = [{"input_ids": [i, 2, 3], "attention_mask": [1, 1, 1], "labels": float(i)} for i in range(8)]
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=1)
    trainer = DPSMTrainer(model=BertForSequenceClassification(config), args=args, train_dataset=rows)
    with pytest.raises(ValueError, match="BertForSequenceClassification is trained on something else"):
        trainer.train()


def test_data_without_labels_are_predicted_through_a_collator_that_adds_none(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor | None]:
        kept = ("input_ids", "attention_mask")
        return {**{key: torch.tensor([row[key] for row in rows]) for key in kept}, "labels": None}

    data = make_data("bart", 5).remove_columns("labels")
    options = {"predict_with_generate": True, "generation_max_length": 5, "remove_unused_columns": False}
    trainer = build(DPSMSeq2SeqTrainer, "bart", tmp_path, data=data, **options)
    trainer.data_collator = collate
    result = trainer.predict(data)
    assert len(result.predictions) == 5 and result.label_ids is None


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_config", [False, True])
def test_several_sequences_a_sample_are_all_kept(by_config: bool, tmp_path: Path) -> None:
    """Seven samples in batches of five: the last two have three rows each."""
    seen: list[int] = []
    trainer = build(
        DPSMSeq2SeqTrainer, "t5", tmp_path, data=make_data("t5", 7), predict_with_generate=True,
        per_device_eval_batch_size=5,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: seen.append(len(prediction.predictions)) or {}
    given = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 3}
    if by_config:
        trainer.model.generation_config.update(**given)
        given = {}
    trainer.evaluate(**given)
    predicted = trainer.predict(make_data("t5", 7), **given)
    assert seen == [21, 21] and len(predicted.predictions) == 21 and len(predicted.label_ids) == 7


@pytest.mark.parametrize("rows", [9, 10, 12])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_smaller_last_batch_weighs_as_in_trainer(name: str, rows: int, tmp_path: Path) -> None:
    """A last batch of 1, 2 or 4 of 8 rows: Trainer repeats its loss 8 times, and drops what fills it up."""
    ours = DPSMSeq2SeqTrainer if name in SEQ2SEQ else DPSMTrainer
    data = make_data(name, rows)
    losses = [
        # Seq2SeqTrainer keeps what fills up the last batch, which weighs as much as the others then
        kind(model=make_model(name), args=args, eval_dataset=data).evaluate()["eval_loss"]
        for kind, args in (
            (ours, build(ours, name, tmp_path, data=data).args),
            (Trainer, build(Trainer, name, tmp_path, data=data).args),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_the_best_checkpoint_is_that_of_the_best_metric(plain: bool, tmp_path: Path) -> None:
    trainer = build(
        DPSMTrainer, "llama", tmp_path, plain, data=make_data("llama", 32), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=3, load_best_model_at_end=True, learning_rate=1e-2,
        metric_for_best_model="eval_ece_15", per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    found = {e["step"]: e["eval_ece_15"] for e in trainer.state.log_history if "eval_ece_15" in e}
    best = min(found, key=found.__getitem__)
    assert (
        trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and trainer.state.best_metric == found[best]
    )


DIRECTIONS = {
    "nll": "lower", "ece_15_low": "lower", "brier_high": "lower", "eos_brier": "lower", "perplexity_scaled": "lower",
    "generated_ece_15": "lower", "token_accuracy": "higher", "confidence_auroc": "higher", "resolution": "higher",
    "summary_rank_correlation_low": "higher", "generated_supported": "higher", "label_probability_scaled": "higher",
    "signed_gap": None, "confidence": None, "ece_15_null": None, "tokens": None, "temperature": None, "entropy": None,
    "nll_entropy_gap": None, "first_order_log_temperature": None, "temperature_conflict": None,
    "temperature_brier": None, "nll_scaled_by_gap": "lower", "brier_scaled_by_brier": "lower",
}  # fmt: skip


def test_every_reported_metric_has_a_direction_or_is_refused(tmp_path: Path) -> None:
    assert {name: better_direction(name) for name in DIRECTIONS} == DIRECTIONS
    without = {name for name in reported_names() if better_direction(name) is None}
    words = ("confidence", "signed_gap", "null", "tokens", "temperature", "entropy", "uncertainty", "bytes", "depth",
             "summaries", "summaries_empty", "length", "log_probability")  # fmt: skip
    assert all(any(word in name for word in words) for name in without)
    for name in ("signed_gap", "tokens"):
        with pytest.raises(ValueError, match=f"metric_for_best_model='eval_{name}' cannot choose"):
            build(DPSMTrainer, "llama", tmp_path, plain=True, metric_for_best_model=f"eval_{name}")
    args = DPSMConfig(output_dir=str(tmp_path), metric_for_best_model="eval_brier_high")
    assert args.greater_is_better is False
    sets = {"dev": make_data("llama", 4)}
    of_a_set = DPSMTrainer(
        model=make_model("llama"), eval_dataset=sets, args=TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="eval_dev_ece_15"),
    )  # fmt: skip
    assert of_a_set.args.greater_is_better is False


def test_a_metric_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="eval_my_ece_15")
    assert DPSMTrainer(model=make_model("llama"), args=args).args.greater_is_better is True


def test_a_loss_that_is_not_the_mean_over_tokens_is_explained_where_it_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers counts the first token of a row of GPT-2, which nothing predicts."""
    monkeypatch.setattr(hf_logging.get_logger("transformers"), "propagate", True)
    for name, explained in (("llama", False), ("gpt2", True)):
        caplog.clear()
        trainer = build(DPSMTrainer, name, tmp_path)
        metrics = trainer.evaluate()
        trainer.evaluate()
        words = f"eval_nll ({metrics['eval_nll']:.4g}) is the mean over tokens; eval_loss ("
        said = [record for record in caplog.records if words in record.getMessage()]
        assert len(said) == explained, "once where they differ"
        assert all(record.levelno == logging.WARNING for record in said), "seen where the figures are printed"


# ---- found by attack -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_term_that_a_subclass_adds_without_the_count_weighs_as_in_trainer(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that takes no count `Trainer` divides what `compute_loss` returns by the accumulation steps."""
    monkeypatch.setattr(BartForConditionalGeneration, "accepts_loss_kwargs", False, raising=False)

    class Adds(DPSMSeq2SeqTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return super().compute_loss(model, inputs, return_outputs) + 1.0

    size = 16 // accumulation
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": size}
    plain, adds = (build(kind, "bart", tmp_path, **options) for kind in (DPSMSeq2SeqTrainer, Adds))
    plain.train()
    adds.train()
    one, other = (trainer.state.log_history[0]["loss"] for trainer in (plain, adds))
    assert other == pytest.approx(one + 1.0, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_model_that_takes_no_count_is_divided_by_its_scored_tokens(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Trainer` does not know by the name of GPT-2's loss that it leaves out the first label of every row."""
    monkeypatch.setattr(GPT2LMHeadModel, "accepts_loss_kwargs", False, raising=False)
    found = []
    for kind, options in (
        (Trainer, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}),
        (DPSMTrainer, {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation,
                       "scoring_rule": "ce"}),
    ):  # fmt: skip
        trainer = build(kind, "gpt2", tmp_path, **options)
        trainer.train()
        entry = trainer.state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"], trainer.evaluate()["eval_loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_a_wrapper_adds_to_the_loss_is_no_part_of_the_tokens_loss(accumulation: int, tmp_path: Path) -> None:
    """AdaLoRA's model adds a regularisation to the outputs' loss, after the head has scored."""
    found = []
    for fused_head in ("off", "on"):
        torch.manual_seed(0)
        config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], r=4, total_step=10, task_type="CAUSAL_LM")
        trainer = build(
            DPSMTrainer, "llama", tmp_path, fused_head=fused_head, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=16 // accumulation, per_device_eval_batch_size=16, learning_rate=0.0,
        )  # fmt: skip
        trainer.model = trainer.model_wrapped = get_peft_model(make_model("llama"), config)
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], rel=1e-5), "the loss is cross-entropy alone"
        found.append(trainer.state.log_history[0]["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_weights_that_the_last_step_broke_are_not_saved(tmp_path: Path) -> None:
    trainer = build(DPSMTrainer, "llama", tmp_path)
    trainer.train()
    with torch.no_grad():
        next(trainer.model.parameters())[0] = float("inf")
    with pytest.raises(FloatingPointError, match="is NaN or infinite after optimizer step 1. Nothing was saved"):
        trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_nobody_waited_for_is_told_at_the_end_at_the_latest(tmp_path: Path) -> None:
    trainer = build(
        DPSMTrainer, "llama", tmp_path, logging_nan_inf_filter=False, logging_steps=100, max_steps=3,
        per_device_train_batch_size=4,
    )  # fmt: skip
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="norm of a gradient was nan"):
        trainer.train()


def test_asking_a_model_leaves_its_counts_as_they_were(tmp_path: Path) -> None:
    """A router of NLLB-MoE widens its capacity in evaluation mode."""
    trainer = build(DPSMTrainer, "llama", tmp_path)
    trainer.model.config.of_this_test = True  # a model of a configuration that was asked before is not asked again
    core = trainer.model.model
    core.capacity, forward = 16, core.forward

    def widens(*args: Any, **kwargs: Any) -> Any:
        if not core.training:
            core.capacity = 48
        return forward(*args, **kwargs)

    core.forward = widens
    trainer.train()
    assert core.capacity == 16


def test_a_metric_that_is_no_goal_is_refused_but_not_one_of_the_users(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'eval_train_seconds' cannot choose a checkpoint"):
        build(DPSMTrainer, "llama", tmp_path, plain=True, metric_for_best_model="eval_train_seconds")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="eval_signed_gap")
    DPSMTrainer(model=make_model("llama"), args=args, compute_metrics=lambda prediction: {"signed_gap": 0.0})
