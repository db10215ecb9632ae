"""Scheduled numbers of the objective in real trainings: what they train with, log and say, and what is refused."""

from __future__ import annotations

import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed
from transformers.utils import logging as hf_logging

from dpsm_hf import DPSMConfig, DPSMTrainer, register_alpha_schedule
from dpsm_hf.data.python_text import load_python_docs
from dpsm_hf.tasks import get_task
from tests.reference import reference_loss
from tests.tiny import make_data, make_model


def trainer(folder: Path, name: str = "gpt2", **options: Any) -> DPSMTrainer:
    further = {
        key: options.pop(key) for key in ("calibration_dataset", "eval_dataset", "compute_loss_func") if key in options
    }
    data = make_data(name, 8)
    defaults: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=4,
        per_device_train_batch_size=8, dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    return DPSMTrainer(make_model(name), DPSMConfig(**{**defaults, **options}), train_dataset=data,
                       **{"eval_dataset": make_data(name, 6, seed=3), **further})  # fmt: skip


def entries(made: DPSMTrainer, key: str) -> list[Any]:
    return [entry[key] for entry in made.state.log_history if key in entry]


CASES: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {
    "focal": ({"scoring_rule": "focal", "knob_schedules": {"focal_gamma": "linear 0 -> 2 over 2"}},
              {"focal_gamma": [0, 1, 2, 2]}),
    "gce": ({"scoring_rule": "gce", "knob_schedules": {"gce_q": "linear 1 -> 0.2 over 2"}},
            {"gce_q": [1, 0.6, 0.2, 0.2]}),
    "ce": ({"scoring_rule": "ce", "knob_schedules": {"label_smoothing_factor": "step 0 -> 0.2 after 2",
                                                     "z_loss": "linear 0.2 -> 0 over 4"}},
           {"label_smoothing": [0, 0, 0.2, 0.2], "z_loss": [0.2, 0.15, 0.1, 0.05]}),
    "mix": ({"alpha_warmup_steps": 2, "knob_schedules": {"score_smoothing": "linear 0 -> 0.4 over 4"}},
            {"alpha": [0, 0.5, 1, 1], "score_smoothing": [0, 0.1, 0.2, 0.3]}),
}  # fmt: skip


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("case", CASES)
def test_each_step_trains_with_the_numbers_of_its_step(case: str, fused_head: str, tmp_path: Path) -> None:
    """The loss of a step is that of a reference with the numbers of the step, whatever the weights have become."""
    options, expected = CASES[case]
    made = trainer(tmp_path, "llama", fused_head=fused_head, **options)
    data = torch.tensor(make_data("llama", 8)["labels"])
    ids = torch.tensor(make_data("llama", 8)["input_ids"])
    references: list[float] = []
    step = made.training_step

    def beside(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        i = made.state.global_step
        with torch.no_grad():
            logits = made.model(input_ids=ids).logits[:, :-1].double()
        labels = data[:, 1:]
        kept = labels != -100
        rule = str(options.get("scoring_rule", "dpsm"))
        numbers = {name: values[i] for name, values in expected.items()}
        references.append(float(reference_loss(logits[kept], labels[kept], rule, **numbers).mean()))
        return step(model, inputs, *args, **kwargs)

    made.training_step = beside  # type: ignore[method-assign]
    made.train()
    assert entries(made, "loss") == pytest.approx(references, rel=2e-5)
    for name, values in expected.items():
        logged = "label_smoothing_factor" if name == "label_smoothing" else name
        assert entries(made, logged) == pytest.approx(values)
    assert "label_smoothing_factor" in made.knobs or case != "ce"


def test_evaluations_are_cross_entropy_whatever_is_scheduled(tmp_path: Path) -> None:
    options = {
        "scoring_rule": "ce",
        "knob_schedules": {"label_smoothing_factor": "constant 0.3", "z_loss": "constant 1"},
    }
    metrics = trainer(tmp_path, "llama", **options).evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], rel=1e-5)


def test_a_constant_is_the_plain_argument(tmp_path: Path) -> None:
    one = trainer(tmp_path / "one", knob_schedules={"label_smoothing_factor": "constant 0.1", "alpha": "constant 0.5"})
    two = trainer(tmp_path / "two", label_smoothing_factor=0.1, alpha_schedule="constant", alpha_end=0.5)
    one.train()
    two.train()
    assert entries(one, "loss") == entries(two, "loss") and entries(one, "alpha") == [0.5] * 4


# ---- what is said --------------------------------------------------------------------------------------------------


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(hf_logging.get_logger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def test_the_schedules_are_announced_and_logged(tmp_path: Path, capsys: Any, warned: Any) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    made = trainer(tmp_path, scoring_rule="focal", knob_schedules={"focal_gamma": "linear 0 -> 2 over 2"}, **saving)
    made.train()
    said = "linear: focal_gamma 0 -> 2 over 2 steps (of 4)"
    assert f"DPSM | scoring_rule focal: the alpha schedule is not used; {said}\n" in capsys.readouterr().out
    assert entries(made, "knob_schedules") == [said] and "never reaches" not in warned.text
    made.create_model_card()
    assert f"Schedules: {said}." in (tmp_path / "README.md").read_text(encoding="utf-8")
    mixed = trainer(tmp_path / "mix", alpha_warmup_steps=2, knob_schedules={"z_loss": "linear 0 -> 1 over 9"})
    mixed.train()
    printed = capsys.readouterr().out
    assert (
        "linear: alpha 0 -> 1 over 2 steps (of 4); from step 2 on" in printed and "; linear: z_loss 0 -> 1" in printed
    )
    assert "z_loss never reaches its end=1 in 4 steps (linear: z_loss 0 -> 1 over 9 steps (of 4))" in warned.text
    other = trainer(tmp_path / "other", scoring_rule="focal", knob_schedules={"focal_gamma": "linear 0 -> 2 over 3"})
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert f"another knob schedules: it was '{said}' and goes on as" in warned.text


# ---- feedback ------------------------------------------------------------------------------------------------------


def feedback(**options: Any) -> dict[str, Any]:
    return {"schedule": "feedback", "low": 0.0, "high": 0.3, **options}


def text_rows(split: str, rows: int, length: int = 64) -> Dataset:
    """Real text, a token a byte."""
    text = "\n".join(load_python_docs()[split]["text"]).encode()
    pieces = [list(text[i * length : (i + 1) * length]) for i in range(rows)]
    return Dataset.from_dict({"input_ids": pieces, "labels": pieces})


@pytest.mark.slow
def test_a_feedback_settles_in_a_real_training(tmp_path: Path) -> None:
    """A few rows of text are learned by heart, and label smoothing is to take the over-confidence away."""
    set_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0,
                                       embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0))  # fmt: skip
    args = DPSMConfig(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=6, max_steps=120,
        per_device_train_batch_size=8, per_device_eval_batch_size=16, learning_rate=8e-3, lr_scheduler_type="constant",
        eval_strategy="steps", eval_steps=6, reliability_diagrams="none", dataloader_pin_memory=False,
        scoring_rule="ce", knob_schedules={"label_smoothing_factor": feedback(high=0.6, gain=3.0, limit=0.2)},
    )  # fmt: skip
    made = DPSMTrainer(model, args, train_dataset=text_rows("train", 16), eval_dataset=text_rows("validation", 16))
    made.train()
    gaps, knobs = entries(made, "eval_signed_gap"), entries(made, "label_smoothing_factor")
    assert len(gaps) == 20 and all(0 <= value <= 0.6 for value in knobs)
    moves = [move for one, two in pairwise(knobs) if (move := two - one)]
    turns = [i for i in range(1, len(moves)) if moves[i] * moves[i - 1] < 0]
    assert turns, "nothing to settle: the signal never came back"
    for i, move in enumerate(moves):
        assert abs(move) <= 0.2 / 2 ** sum(turn <= i for turn in turns) + 1e-12
    assert not [i for i in range(12, 20) if gaps[i] * gaps[i - 1] < 0], "it still swings"


def test_a_feedback_is_moved_by_the_calibration_set(tmp_path: Path) -> None:
    """Which is then evaluated in training, before the evaluation set, whose figures choose the best model."""
    signal = {"signal": "eval_calibration_confidence", "gain": 0.5, "limit": 1}
    made = trainer(tmp_path, eval_strategy="steps", eval_steps=1, calibration_dataset=make_data("gpt2", 4, seed=7),
                   scoring_rule="ce", knob_schedules={"z_loss": feedback(**signal)}, calibration_metrics="core",
                   )  # fmt: skip
    made.train()
    seen = entries(made, "eval_calibration_confidence")
    assert len(seen) == 4 and seen != entries(made, "eval_confidence")
    expected = [min(0.3, 0.5 * sum(seen[:i])) for i in range(4)]
    assert entries(made, "z_loss") == pytest.approx(expected)
    assert made.state.log_history[-2]["eval_loss"] and made.panel is not None
    assert made.panel.tokens.tokens == trainer(tmp_path / "x", calibration_metrics="all").evaluate()["eval_tokens"]
    without = trainer(
        tmp_path / "without", eval_strategy="steps", eval_steps=1, calibration_dataset=make_data("gpt2", 4)
    )
    without.train()
    assert not entries(without, "eval_calibration_nll"), "evaluated though nothing reads it"


def test_the_gain_follows_the_gradient_where_asked(tmp_path: Path) -> None:
    signal = {"signal": "eval_confidence", "gain": 0.1, "limit": 1, "relative_to": "grad_norm/grad_norm_ce"}
    made = trainer(tmp_path, eval_strategy="steps", eval_steps=1, log_component_grad_norms=True,
                   scoring_rule="brier", knob_schedules={"z_loss": feedback(**signal)}, max_grad_norm=math.inf,
                   )  # fmt: skip
    made.train()
    ratio = [a / b for a, b in zip(entries(made, "grad_norm"), entries(made, "grad_norm_ce"), strict=True)]
    moves = [0.1 * r * c for r, c in zip(ratio, entries(made, "eval_confidence"), strict=True)]
    assert entries(made, "z_loss") == pytest.approx([sum(moves[:i]) for i in range(4)])


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "scoring_rule": "ce"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knob_schedules": {"z_loss": feedback(signal="test_signed_gap")}},
         r"z_loss: signal='test_signed_gap' is reported by no evaluation, so z_loss would never move; use eval_s"),
        ({"knob_schedules": {"z_loss": feedback(signal="eval_calibration_signed_gap")}},
         r"reported by no evaluation, for which calibration_dataset= is missing"),
        ({"knob_schedules": {"z_loss": feedback(relative_to="tokens_per_second")}},
         r"relative_to='tokens_per_second': 'tokens_per_second' is not logged of a single step; use one of grad_norm"),
        ({"knob_schedules": {"z_loss": feedback(relative_to="loss")}},
         r"relative_to='loss': 'loss' is not logged of a single step; use one of grad_norm"),
        ({"knob_schedules": {"z_loss": feedback(relative_to="grad_norm_ce")}},
         r"grad_norm_ce is logged with log_component_grad_norms=True only"),
        ({"knob_schedules": {"z_loss": feedback(relative_to="grad_norm")}, "logging_strategy": "no"},
         r"needs a training log, but logging_strategy='no'"),
        ({"scoring_rule": "brier", "knob_schedules": {"score_smoothing": "linear 0 -> 0.1 over 4",
                                                      "label_smoothing_factor": "linear 0.1 -> 0 over 4"}},
         r"the schedules do not go together at step 1 \(score_smoothing=0.025, label_smoothing_factor=0.075\): .*bot"),
        ({"scoring_rule": "brier", "label_smoothing_factor": 0.1, "knob_schedules": {"score_smoothing": feedback()}},
         r"the schedules do not go together at step 0 \(score_smoothing=0.3\): .*both smooth"),
    ],
)  # fmt: skip
def test_refused_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, **{**EVALUATED, **options})
    with pytest.raises(ValueError, match=message):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.usefixtures("schedule_registry")
def test_a_value_out_of_range_late_in_training_is_refused_before_it(tmp_path: Path) -> None:
    register_alpha_schedule("wild")(lambda step, span, options, history: 2.0 if step == 3 else 0.5)
    made = trainer(
        tmp_path, scoring_rule="gce", knob_schedules={"gce_q": {"schedule": "wild", "start": 0.5, "end": 1}}
    )
    with pytest.raises(ValueError, match=r"'wild' schedule gave gce_q=2.0 at step 3"):
        made.train()
    assert made.state.global_step == 0


def test_a_loss_function_of_ones_own_would_take_its_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compute_loss_func would replace scoring_rule='ce' with z_loss"):
        trainer(tmp_path, scoring_rule="ce", knob_schedules={"z_loss": "constant 1"}, compute_loss_func=print)


def test_foreign_arguments_with_the_field_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.knob_schedules = {"z_loss": "constant 1"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has knob_schedules="):
        DPSMTrainer(make_model("gpt2"), args)


# ---- from files ----------------------------------------------------------------------------------------------------


def test_scripts_take_it_from_words_and_files(tmp_path: Path) -> None:
    base = ["--dataset_name", "python-docs", "--model_type", "gpt2", "--tokenizer_name", "train-bpe"]
    base += ["--output_dir", str(tmp_path), "--scoring_rule", "focal"]
    task = get_task("language-modelling")
    by_word = task.parse([*base, "--knob_schedules", '{"focal_gamma": "linear 0 -> 2 over 0.1"}'])
    (tmp_path / "run.yaml").write_text("knob_schedules:\n  focal_gamma: {start: 0, end: 2}\n", encoding="utf-8")
    by_file = task.parse([*base, "--config", str(tmp_path / "run.yaml")])
    (tmp_path / "run.json").write_text(
        '{"knob_schedules": {"focal_gamma": "linear 0 -> 2 over 0.1"}}', encoding="utf-8"
    )
    by_json = task.parse([*base, "--config", str(tmp_path / "run.json")])
    found = [made.training_args.schedules()["focal_gamma"] for made in (by_word, by_file, by_json)]
    assert [schedule(50, 1000) for schedule in found] == [1.0] * 3
    with pytest.raises(ValueError, match=r"--knob_schedules \[1\]: this should be keys with values"):
        task.parse([*base, "--knob_schedules", "[1]"])
    with pytest.raises(ValueError, match=r"knob_schedules: focal_gamma: end=-2.0 must be a finite number"):
        task.parse([*base, "--knob_schedules", '{"focal_gamma": "linear 0 -> -2"}'])
