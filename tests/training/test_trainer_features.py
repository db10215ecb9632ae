"""What users do with a Trainer, done with DPSMTrainer: PEFT, compile, HPO, early stopping, own losses and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    BartForSequenceClassification,
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dpsm_hf import DPSMConfig, DPSMTrainer, register_alpha_schedule
from tests import cases
from tests.short_training import config, train
from tests.tiny import VOCAB, make_data, make_model


def test_lora_trains_only_the_adapters() -> None:
    trainer = cases.build("llama_lora", max_steps=3)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainable = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    train(trainer)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert all(not torch.equal(value, after[name]) for name, value in trainable.items())


def test_prompt_tuning_scores_the_text_and_its_first_token(tmp_path: Path) -> None:
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(make_model("gpt2"), peft)
    data = make_data("gpt2")
    trainer = DPSMTrainer(model=model, args=config(tmp_path), train_dataset=data, eval_dataset=data)
    train(trainer)
    metrics = trainer.evaluate()
    # the last virtual token predicts the first one of the text, so every label counts
    assert metrics["eval_tokens"] == sum(label != -100 for row in data["labels"] for label in row)
    model.eval()
    batch = {k: torch.tensor(data[k]) for k in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        expected = model(**batch).loss
    assert metrics["eval_nll"] == pytest.approx(float(expected), rel=1e-5)


def test_bf16_training_agrees_with_float32() -> None:
    half, full = (train(cases.build("llama", max_steps=3, bf16=bf16)) for bf16 in (True, False))
    for low, high in zip(half, full, strict=True):
        assert low["loss"] == pytest.approx(high["loss"], rel=2e-2)
        assert low["alpha"] == high["alpha"]


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    plain, checkpointed = (cases.build(name, max_steps=3, **{cases.CHECKPOINTING: on}) for on in (False, True))
    train(plain), train(checkpointed)
    for mine, theirs in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_torch_compile_gives_the_same_training() -> None:
    plain = train(cases.build("llama", max_steps=2))
    # aot_eager captures and differentiates the graph as inductor does, without waiting for a C++ compiler
    compiled = train(cases.build("llama", max_steps=2, torch_compile=True, torch_compile_backend="aot_eager"))
    for mine, theirs in zip(plain, compiled, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_hyperparameter_search_varies_dpsm_arguments(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    seen: list[float] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                seen.append(logs["alpha"])

    args = config(tmp_path, alpha_schedule="constant", eval_strategy="steps", eval_steps=3)
    data = make_data("gpt2")
    trainer = DPSMTrainer(model_init=lambda trial=None: make_model("gpt2"), args=args, train_dataset=data,
                          eval_dataset=data, callbacks=[Keep()])  # fmt: skip
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"alpha_end": trial.suggest_categorical("alpha_end", [0.25, 0.75])},
        compute_objective=lambda metrics: metrics["eval_ece_15"], n_trials=3, direction="minimize",
    )  # fmt: skip
    assert best.hyperparameters["alpha_end"] in (0.25, 0.75)
    assert len(seen) == 9 and set(seen) <= {0.25, 0.75}


def test_a_hyperparameter_outside_its_range_is_an_error_of_the_trial(tmp_path: Path) -> None:
    trainer = DPSMTrainer(model=make_model("gpt2"), args=config(tmp_path), train_dataset=make_data("gpt2"))
    trainer.args.alpha_end = 1.5  # what a search space does
    with pytest.raises(ValueError, match=r"alpha_end=1.5 lies outside \[0, 1\]"):
        trainer.train()


def test_calibration_metrics_choose_the_best_model_and_stop_early(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                  load_best_model_at_end=True, metric_for_best_model="eval_brier", greater_is_better=True)  # fmt: skip
    data = make_data("gpt2")
    trainer = DPSMTrainer(model=make_model("gpt2"), args=args, train_dataset=data, eval_dataset=data,
                          callbacks=[EarlyStoppingCallback(early_stopping_patience=2)])  # fmt: skip
    trainer.train()
    evaluated = {e["step"]: e["eval_brier"] for e in trainer.state.log_history if "eval_brier" in e}
    # training lowers the Brier score, so the "best" (greatest) is the first and patience ends the run at step 3
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric == evaluated[1]
    assert trainer.evaluate()["eval_brier"] == pytest.approx(evaluated[1], abs=1e-12)


def test_router_loss_of_a_mixture_of_experts_is_kept_and_exact() -> None:
    def gradient(micro_batch: int, accumulation: int, coefficient: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                          output_router_logits=True, router_aux_loss_coef=coefficient)
        )  # fmt: skip
        trainer = cases.build("llama", max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=micro_batch,
                              gradient_accumulation_steps=accumulation)  # fmt: skip
        keep = cases._KeepGradient()
        trainer.add_callback(keep)
        trainer.model = trainer.model_wrapped = model
        trainer.callback_handler.model = model
        trainer.train()
        return keep.gradient

    without, whole = gradient(16, 1, 0.0), gradient(16, 1, 0.5)
    assert (whole - without).norm() > 1e-3 * without.norm()
    # the balance of a micro-batch is not that of the batch, but four of them must not weigh four times
    parts = gradient(4, 4, 0.5)
    assert (parts - whole).norm() < 0.5 * (whole - without).norm()


def test_an_unknown_model_is_probed_once_and_an_incomprehensible_one_refused(tmp_path: Path) -> None:
    class Bigram(torch.nn.Module):
        def __init__(self, shift: bool, scale: float = 1.0) -> None:
            super().__init__()
            self.table, self.shift, self.scale = torch.nn.Embedding(VOCAB, VOCAB), shift, scale

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            logits = self.table(input_ids)
            if labels is None:
                return {"logits": logits}
            rows, targets = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
            loss = torch.nn.functional.cross_entropy(rows.flatten(0, 1), targets.flatten())
            return {"loss": self.scale * loss, "logits": logits}

    data = make_data("gpt2").remove_columns("attention_mask")
    for shift in (True, False):
        trainer = DPSMTrainer(model=Bigram(shift), args=config(tmp_path), train_dataset=data)
        train(trainer)
        assert trainer._scorer.alignment == ("shifted" if shift else "aligned")
    with pytest.raises(ValueError, match="Bigram is not a language model that DPSM knows"):
        DPSMTrainer(model=Bigram(True, scale=3.0), args=config(tmp_path), train_dataset=data).train()


@pytest.mark.usefixtures("schedule_registry")
def test_a_registered_schedule_is_used_by_name(tmp_path: Path) -> None:
    register_alpha_schedule("test_square", uses_warmup=False)(
        lambda step, span, options, history: options.end * (step / span.total) ** 2
    )
    args = config(tmp_path, alpha_schedule="test_square", max_steps=4)
    entries = train(DPSMTrainer(model=make_model("gpt2"), args=args, train_dataset=make_data("gpt2")))
    assert [entry["alpha"] for entry in entries] == [0.0, 1 / 16, 1 / 4, 9 / 16]


def test_compute_loss_func_is_honoured_with_ce_and_refused_otherwise(tmp_path: Path) -> None:
    calls: list[Any] = []

    def loss_func(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(num_items_in_batch)
        return outputs["logits"].square().mean()

    data = make_data("gpt2")
    args = config(tmp_path, scoring_rule="ce", max_steps=1)
    DPSMTrainer(model=make_model("gpt2"), args=args, train_dataset=data, compute_loss_func=loss_func).train()
    assert calls
    for other in (config(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)):
        with pytest.raises(ValueError, match="compute_loss_func would replace scoring_rule='dpsm'"):
            DPSMTrainer(model=make_model("gpt2"), args=other, train_dataset=data, compute_loss_func=loss_func)


@pytest.mark.parametrize(
    "extra", [{"z_loss": 1e-3}, {"entropy_weight": 0.1}, {"score_smoothing": 0.1}, {"label_smoothing_factor": 0.1}]
)
def test_every_option_reaches_the_gradient(extra: dict[str, float]) -> None:
    def gradient(**options: Any) -> torch.Tensor:
        keep = cases._KeepGradient()
        trainer = cases.build("gpt2", max_steps=1, max_grad_norm=0.0, alpha_schedule="constant", alpha_end=0.5,
                              per_device_train_batch_size=4, **options)  # fmt: skip
        trainer.add_callback(keep)
        trainer.train()
        return keep.gradient

    assert (gradient(**extra) - gradient()).norm() > 1e-5


def test_saved_model_is_the_plain_model(tmp_path: Path) -> None:
    trainer = cases.build("gpt2", max_steps=2)
    train(trainer)
    trainer.save_model(str(tmp_path))
    again = type(trainer.model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.parameters(), strict=True))


def test_default_objective_of_a_search_is_that_of_trainer(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    data = make_data("gpt2")
    args = config(tmp_path, eval_strategy="steps", eval_steps=3, alpha_schedule="constant")
    trainer = DPSMTrainer(model_init=lambda trial=None: make_model("gpt2"), args=args, eval_dataset=data,
                          train_dataset=data)  # fmt: skip
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"alpha_end": trial.suggest_categorical("alpha_end", [0.5])}, n_trials=1
    )
    evaluated = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert best.objective == evaluated[-1]["eval_loss"]


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_parent(tmp_path: Path) -> None:
    class Penalised(GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **rest: Any) -> Any:
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **rest)
            if labels is not None:
                output.loss = output.loss + 10 * output.logits.square().mean()
            return output

    def penalised() -> Penalised:
        model = Penalised(make_model("gpt2").config)
        model.load_state_dict(make_model("gpt2").state_dict())
        return model

    data, logged = make_data("gpt2"), []
    for trainer_class, args in ((Trainer, TrainingArguments), (DPSMTrainer, DPSMConfig)):
        extra = {"scoring_rule": "ce"} if args is DPSMConfig else {}
        arguments = args(output_dir=str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, save_strategy="no",
                         logging_steps=1, **extra)  # fmt: skip
        logged.append([e["loss"] for e in train(trainer_class(model=penalised(), args=arguments, train_dataset=data))])
    assert logged[0] == logged[1]
    # at alpha = 0 the mix is cross-entropy, and the penalty stays added although it is made of the logits
    arguments = config(tmp_path, max_steps=2, alpha_schedule="constant", alpha_end=0.0, learning_rate=5e-5)
    mixed = [e["loss"] for e in train(DPSMTrainer(model=penalised(), args=arguments, train_dataset=data))]
    assert mixed == pytest.approx(logged[0], rel=1e-5)


def test_an_encoder_decoder_that_is_no_language_model_trains_as_in_trainer(tmp_path: Path) -> None:
    bart = make_model("bart").config
    bart.num_labels = 3
    rows = [{"input_ids": [5, 6, 7, 2], "attention_mask": [1] * 4, "labels": i % 3} for i in range(4)]
    args = config(tmp_path, scoring_rule="ce", max_steps=1)
    entries = train(DPSMTrainer(model=BartForSequenceClassification(bart), args=args, train_dataset=rows))
    assert np.isfinite(entries[0]["loss"])
