"""The two callbacks, driven through real (tiny) trainings and evaluations, in DPSMTrainer and in a plain Trainer."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as hf_logging

from dpsm_hf import (
    AlphaScheduleCallback,
    CalibrationCallback,
    DPSMConfig,
    DPSMTrainer,
    ReliabilityDisplay,
    calibration_curve,
)
from dpsm_hf.calibration import METRICS as ALL_METRICS
from dpsm_hf.evaluation.panel import EvaluationPanel
from dpsm_hf.runtime.files import write_json
from tests.tiny import VOCAB, make_data, make_model

# without a tokenizer the bytes of a token are not known
METRICS = tuple(name for name in ALL_METRICS if name not in ("label_bytes", "bits_per_byte"))


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Transformers' root logger does not propagate by default, so that pytest would see nothing."""
    monkeypatch.setattr(hf_logging.get_logger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def arguments(cls: type, folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=3,
        per_device_train_batch_size=4, per_device_eval_batch_size=3, dataloader_pin_memory=False,
    )  # fmt: skip
    return cls(**{**defaults, **options})


def dpsm_trainer(folder: Path, callbacks: list[Any] | None = None, name: str = "gpt2", **options: Any) -> DPSMTrainer:
    data = make_data(name, 8)
    options.setdefault("calibration_metrics", "all")
    return DPSMTrainer(make_model(name), arguments(DPSMConfig, folder, **options), train_dataset=data,
                       eval_dataset=data, callbacks=callbacks)  # fmt: skip


def plain_trainer(folder: Path, callback: Any = None, name: str = "gpt2", **options: Any) -> Trainer:
    extra = {key: options.pop(key) for key in ("compute_metrics", "model_init") if key in options}
    data = make_data(name, 8)
    model, args = None if "model_init" in extra else make_model(name), arguments(TrainingArguments, folder, **options)
    callbacks = [callback] if callback else None
    return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks, **extra)


def record(folder: Path, name: str) -> dict[str, Any]:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    return json.loads((folder / "calibration" / name).read_text(encoding="utf-8"), parse_constant=refuse)


# ---- AlphaScheduleCallback -----------------------------------------------------------------------------------------


def test_the_schedule_is_printed_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = dpsm_trainer(tmp_path, alpha_schedule="cosine", alpha_warmup_steps=2)
    trainer.train()
    sentence = "cosine: alpha 0 -> 1 over 2 steps (of 3)"
    printed = capsys.readouterr().out
    assert f"DPSM | {sentence}; from step 2 on the Brier score alone (33% of training)\n" in printed
    # in the first entry that Trainer writes anyway
    assert [e.get("alpha_schedule") for e in trainer.state.log_history] == [sentence, None, None, None]
    assert all("epoch" in entry for entry in trainer.state.log_history)
    trainer.train()
    assert sentence in capsys.readouterr().out, "a second training is announced too"
    assert [e["alpha"] for e in trainer.state.log_history if "loss" in e] == pytest.approx([0, 0.5, 1])


def test_a_fixed_rule_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], warned: Any) -> None:
    dpsm_trainer(tmp_path, scoring_rule="brier", alpha_warmup_steps=1000).train()
    assert "DPSM | scoring_rule brier: a fixed rule, the alpha schedule is not used" in capsys.readouterr().out
    assert "never reaches" not in warned.text


def test_it_warns_when_alpha_never_arrives(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    dpsm_trainer(tmp_path, alpha_warmup_steps=1000).train()
    assert "alpha never reaches alpha_end=1 in 3 steps (linear: alpha 0 -> 1 over 1000 steps (of 3))" in warned.text
    warned.clear()
    dpsm_trainer(tmp_path, alpha_warmup_steps=2).train()
    assert "never reaches" not in warned.text


def test_it_warns_when_a_resumed_run_has_another_schedule(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    dpsm_trainer(tmp_path, alpha_warmup_steps=2, **saving).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    assert "another alpha schedule" not in warned.text

    same = dpsm_trainer(tmp_path / "same", alpha_warmup_steps=2)
    same.train(resume_from_checkpoint=checkpoint)
    assert "another alpha schedule" not in warned.text
    assert sum("alpha_schedule" in e for e in same.state.log_history) == 1, "the entry is repeated at each resume"

    other = dpsm_trainer(tmp_path / "other", alpha_warmup_steps=1)
    other.train(resume_from_checkpoint=checkpoint)
    assert (
        "it was 'linear: alpha 0 -> 1 over 2 steps (of 3)' and goes on as 'linear: alpha 0 -> 1 over 1 steps (of 3)'"
        in warned.text
    )
    entries = [e for e in other.state.log_history if "alpha_schedule" in e]
    assert [e["step"] for e in entries] == [1, 3]

    warned.clear()
    longer = dpsm_trainer(tmp_path / "longer", alpha_warmup_steps=2, max_steps=4)
    longer.train(resume_from_checkpoint=checkpoint)
    assert "(of 3)' and goes on as 'linear: alpha 0 -> 1 over 2 steps (of 4)'" in warned.text


# ---- CalibrationCallback in a DPSMTrainer --------------------------------------------------------------------------


def test_files_of_every_evaluation(tmp_path: Path) -> None:
    trainer = dpsm_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, calibration_bins=20, reliability_diagrams="all"
    )
    trainer.train()
    names = sorted(p.name for p in (tmp_path / "calibration").iterdir())
    assert names == [f"eval-step-{i:06d}.{kind}" for i in (1, 2, 3) for kind in ("json", "png")]
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    for i, logged in enumerate(evaluations, start=1):
        saved = record(tmp_path, f"eval-step-{i:06d}.json")
        assert saved["schema"] == 2 and saved["step"] == i == logged["step"] and saved["split"] == "eval"
        assert set(saved["metrics"]) == set(METRICS)
        # no token was right, so nothing can be ranked: null in the file, and no NaN in the log
        assert saved["metrics"]["confidence_auroc"] is None and "eval_confidence_auroc" not in logged
        known = [name for name in METRICS if name != "confidence_auroc"]
        assert {name: saved["metrics"][name] for name in known} == {name: logged[f"eval_{name}"] for name in known}
        assert saved["intervals"]["nll"] == [logged["eval_nll_low"], logged["eval_nll_high"]]
        curve = saved["curve"]
        assert curve["bins"] == 20 and len(curve["edges"]) == 21 and len(curve["count"]) == 20
        assert sum(curve["count"]) == saved["tokens"] == saved["metrics"]["tokens"]
        assert all((c is None) == (n == 0) for c, n in zip(curve["confidence"], curve["count"], strict=True))
    path = tmp_path / "calibration" / "eval-step-000003.json"
    assert ReliabilityDisplay.from_json(path).split == "eval"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask(), "others may not read it"
    with Image.open(path.with_suffix(".png")) as image:
        image.verify()
        assert image.format == "PNG" and min(image.size) > 300


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_numbers_are_those_of_the_model(tmp_path: Path) -> None:
    trainer = dpsm_trainer(tmp_path)
    trainer.evaluate()
    saved = record(tmp_path, "eval-step-000000.json")
    data = make_data("gpt2", 8)
    with torch.no_grad():
        logits = trainer.model(torch.tensor(data["input_ids"])).logits[:, :-1].double()
    labels = torch.tensor(data["labels"])[:, 1:]
    keep = labels != -100
    p, y = logits.softmax(-1)[keep], labels[keep]
    p_y = p.gather(1, y[:, None])[:, 0]
    brier = (p - torch.nn.functional.one_hot(y, VOCAB)).square().sum(-1)
    curve = calibration_curve(p.amax(-1), p.argmax(-1) == y)
    expected = {
        "tokens": len(y),
        "nll": -p_y.log().mean().item(),
        "perplexity": math.exp(-p_y.log().mean().item()),
        "brier": brier.mean().item(),
        "spherical": (1 - p_y / p.square().sum(-1).sqrt()).mean().item(),
        "entropy": torch.special.entr(p).sum(-1).mean().item(),
        "token_accuracy": (p.argmax(-1) == y).double().mean().item(),
        "confidence": p.amax(-1).mean().item(),
        "ece_15": curve.ece,
        "mce": curve.mce,
    }
    assert {name: saved["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(saved["curve"]["count"], curve.count)


def test_a_callback_given_by_hand_is_not_doubled(tmp_path: Path) -> None:
    mine, schedule = CalibrationCallback(bins=10), AlphaScheduleCallback()
    trainer = dpsm_trainer(tmp_path, callbacks=[mine, schedule])
    found = trainer.callback_handler.callbacks
    assert [c for c in found if isinstance(c, CalibrationCallback)] == [mine]
    assert [c for c in found if isinstance(c, AlphaScheduleCallback)] == [schedule]
    trainer.evaluate()
    assert record(tmp_path, "eval-step-000000.json")["curve"]["bins"] == 10
    by_class = dpsm_trainer(tmp_path, callbacks=[CalibrationCallback, AlphaScheduleCallback])
    kinds = [type(c) for c in by_class.callback_handler.callbacks]
    assert kinds.count(CalibrationCallback) == kinds.count(AlphaScheduleCallback) == 1


def test_plain_arguments_have_the_callbacks_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The swap of one word is announced, with where to change it; who does not want the callbacks removes them."""
    data = make_data("gpt2", 8)
    trainer = DPSMTrainer(
        make_model("gpt2"), arguments(TrainingArguments, tmp_path), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    assert (
        "DPSM | linear: alpha 0 -> 1 over 1 steps (of 3); from step 1 on the Brier score alone (67% of training). "
        "To change it: args=DPSMConfig(scoring_rule=..., alpha_schedule=...)\n"
    ) in capsys.readouterr().out
    metrics = trainer.with_all_metrics(trainer.evaluate())
    saved = record(tmp_path, "eval-step-000003.json")
    assert metrics["eval_tokens"] == saved["tokens"] and saved["metrics"]["nll"] == metrics["eval_nll"]
    assert (tmp_path / "calibration" / "eval-step-000003.png").exists()

    without = DPSMTrainer(
        make_model("gpt2"), arguments(TrainingArguments, tmp_path / "no"), train_dataset=data, eval_dataset=data
    )
    without.remove_callback(CalibrationCallback)
    without.remove_callback(AlphaScheduleCallback)
    without.train()
    assert without.evaluate() and not (tmp_path / "no" / "calibration").exists()
    assert "DPSM |" not in capsys.readouterr().out


def test_a_callback_that_comes_late_does_not_listen(tmp_path: Path) -> None:
    trainer = dpsm_trainer(tmp_path)
    trainer.remove_callback(CalibrationCallback)
    late = CalibrationCallback()
    trainer.add_callback(late)  # after the trainer was made
    trainer.train()
    metrics = trainer.evaluate()
    saved = record(tmp_path, "eval-step-000003.json")
    assert saved["tokens"] == metrics["eval_tokens"] and saved["metrics"]["nll"] == metrics["eval_nll"]
    trainer.evaluate()
    assert late._hook is None, "it listens to the model although the trainer tells it everything"


def test_other_prefixes_and_prediction(tmp_path: Path) -> None:
    trainer = dpsm_trainer(tmp_path)
    data = make_data("gpt2", 8)
    trainer.predict(data)
    assert not (tmp_path / "calibration").exists(), "predict() is no evaluation"
    trainer.evaluate(eval_dataset={"dev": data, "held_out": data.select(range(3))})
    dev, held = record(tmp_path, "eval_dev-step-000000.json"), record(tmp_path, "eval_held_out-step-000000.json")
    assert dev["split"] == "eval_dev" and held["tokens"] < dev["tokens"]
    trainer.evaluate(metric_key_prefix="test")
    assert record(tmp_path, "test-step-000000.json")["tokens"] == dev["tokens"]


def test_every_set_has_a_file_of_its_own(tmp_path: Path) -> None:
    data = make_data("gpt2", 8)
    names = ["a/b", "a_b", "a b", "x" * 260]
    dpsm_trainer(tmp_path).evaluate(eval_dataset={name: data.select(range(i + 1)) for i, name in enumerate(names)})
    files = {
        r["split"]: r["tokens"] for p in (tmp_path / "calibration").glob("*.json") if (r := json.loads(p.read_text()))
    }
    assert len(set(files.values())) == len(names) and set(files) == {f"eval_{name}" for name in names}


# ---- CalibrationCallback in a plain Trainer ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama_lora", "bart"])
def test_in_a_plain_trainer_as_in_ours(name: str, tmp_path: Path) -> None:
    ours = dpsm_trainer(tmp_path / "ours", name=name).evaluate()
    plain = plain_trainer(tmp_path / "plain", CalibrationCallback(metrics="all"), name)
    found = plain.evaluate()
    differences = ("nll_entropy_gap", "first_order_log_temperature")
    keys = [f"eval_{key}" for key in METRICS if key not in ("confidence_auroc", *differences)]
    assert {key: found[key] for key in keys} == pytest.approx({key: ours[key] for key in keys}, rel=1e-6, abs=1e-9)
    # NLL less entropy, of two that are nearly equal here: the rounding is that of the NLL
    rounding = 1e-6 * ours["eval_nll"]
    for key, scale in zip(differences, (1.0, ours["eval_varentropy"]), strict=True):
        assert found[f"eval_{key}"] == pytest.approx(ours[f"eval_{key}"], abs=rounding / scale)
    left = record(tmp_path / "ours", "eval-step-000000.json")
    right = record(tmp_path / "plain", "eval-step-000000.json")
    assert right["curve"]["count"] == left["curve"]["count"] and right["tokens"] == left["tokens"]
    with Image.open(tmp_path / "plain" / "calibration" / "eval-step-000000.png") as image:
        image.verify()


def test_in_a_plain_trainer_while_training(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, CalibrationCallback(bins=10), eval_strategy="steps", eval_steps=1)
    trainer.train()
    found = [record(tmp_path, f"eval-step-{i:06d}.json") for i in (1, 2, 3)]
    assert len({r["tokens"] for r in found}) == 1, "one evaluation leaks into the next, or training is counted"
    assert found[0]["metrics"]["nll"] > found[2]["metrics"]["nll"]
    assert found[0]["curve"]["bins"] == 10


def test_prediction_does_not_leak_into_the_next_evaluation(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, CalibrationCallback(metrics="all"))
    expected = trainer.evaluate()["eval_tokens"]
    trainer.predict(make_data("gpt2", 5))
    assert trainer.evaluate()["eval_tokens"] == expected


def test_an_interrupted_evaluation_and_own_calls_do_not_leak(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, CalibrationCallback(metrics="all"))
    expected = trainer.evaluate()["eval_tokens"]
    step = trainer.prediction_step
    calls = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args, **options)

    trainer.prediction_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.prediction_step = step
    batch = trainer.data_collator([make_data("gpt2", 2)[i] for i in range(2)])
    with torch.no_grad():
        trainer.model(**batch)
    assert trainer.evaluate()["eval_tokens"] == expected


def test_metrics_of_the_user_keep_their_names(tmp_path: Path) -> None:
    trainer = plain_trainer(
        tmp_path, CalibrationCallback(), compute_metrics=lambda prediction: {"nll": -1.0, "a_loss": -2.0}
    )
    found = trainer.evaluate()
    assert found["eval_nll"] == -1.0 and found["eval_a_loss"] == -2.0 and "eval_ece_15" in found
    assert record(tmp_path, "eval-step-000000.json")["split"] == "eval"


def test_the_model_of_model_init_is_heard(tmp_path: Path) -> None:
    trainer = plain_trainer(
        tmp_path, CalibrationCallback(), model_init=lambda: make_model("gpt2"), eval_strategy="steps", eval_steps=3
    )
    trainer.train()
    assert record(tmp_path, "eval-step-000003.json")["tokens"] > 0


def test_it_says_when_it_sees_nothing(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    trainer = plain_trainer(tmp_path, CalibrationCallback(), label_smoothing_factor=0.1)
    metrics = trainer.evaluate()
    assert "eval_ece_15" not in metrics and not (tmp_path / "calibration").exists()
    assert "saw no scored token in this evaluation: the model was called without labels" in warned.text


# ---- what is logged, and what is drawn -----------------------------------------------------------------------------

CORE = ("nll", "perplexity", "brier", "ece_15", "signed_gap", "token_accuracy")
#: What an evaluation returns besides: Trainer's own.
OF_TRAINER = ("loss", "runtime", "samples_per_second", "steps_per_second", "train_seconds")
FIRST = "model_preparation_time"


def test_the_log_has_six_figures_and_the_file_has_all(tmp_path: Path) -> None:
    trainer = dpsm_trainer(tmp_path, eval_strategy="steps", eval_steps=3, calibration_metrics="core")
    trainer.train()
    logged = next(e for e in trainer.state.log_history if "eval_loss" in e)
    assert {key for key in logged if key.startswith("eval_")} == {f"eval_{name}" for name in (*CORE, *OF_TRAINER)}
    trainer.use_temperature(2.0)
    returned = trainer.evaluate()
    shown = [*CORE, *(f"{name}_scaled" for name in CORE if name != "token_accuracy"), "temperature", *OF_TRAINER[:-1]]
    assert {key for key in returned if key.startswith("eval_")} == {f"eval_{name}" for name in shown}
    reported = record(tmp_path, "eval-step-000003.json")["reported"]
    everything = dpsm_trainer(tmp_path / "all")
    everything.model.load_state_dict(trainer.model.state_dict())
    everything.use_temperature(2.0)
    all_of_them = everything.evaluate()
    figures = {
        k.removeprefix("eval_"): v
        for k, v in all_of_them.items()
        if k[5:] not in (*OF_TRAINER, FIRST) and k != "epoch"
    }
    assert reported == figures and len(figures) > 50
    full = trainer.with_all_metrics(returned)
    assert (
        set(full) - {"epoch"} == set(all_of_them) - {"epoch", f"eval_{FIRST}"}
        and {key: full[key] for key in returned} == returned
    )


@pytest.mark.parametrize("metric", ["debiased_ece", "eval_ece_15_low"])
def test_the_metric_that_chooses_the_best_is_logged_too(metric: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "calibration_metrics": "core"}
    trainer = dpsm_trainer(tmp_path, metric_for_best_model=metric, **options)
    trainer.train()
    logged = [e for e in trainer.state.log_history if "eval_loss" in e]
    key = f"eval_{metric.removeprefix('eval_')}"
    assert trainer.state.best_metric == min(e[key] for e in logged)
    assert {k for e in logged for k in e if k.startswith("eval_")} == {f"eval_{n}" for n in (*CORE, *OF_TRAINER)} | {
        key
    }


def test_the_metric_of_a_feedback_schedule_is_logged_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "calibration_metrics": "core"}
    options |= {"alpha_schedule": "feedback", "alpha_feedback_metric": "eval_confidence", "alpha_end": 0.5}
    trainer = dpsm_trainer(tmp_path, **options)
    trainer.train()
    alphas = [e["alpha"] for e in trainer.state.log_history if "alpha" in e]
    assert len(set(alphas)) > 1, "alpha does not move"


def test_a_plain_trainer_is_calm_too(tmp_path: Path) -> None:
    found = plain_trainer(tmp_path, CalibrationCallback()).evaluate()
    assert {key for key in found if key.startswith("eval_")} >= {f"eval_{name}" for name in CORE}
    assert "eval_ece_100" not in found
    with pytest.raises(ValueError, match="metrics='few' is unknown; choose one of core, all"):
        CalibrationCallback(metrics="few")


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "calibration").glob("*.png"))


def test_the_last_and_the_best_evaluation_are_drawn(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "learning_rate": 1e-2}
    trainer = dpsm_trainer(tmp_path, metric_for_best_model="nll", greater_is_better=True, **options)
    stale = tmp_path / "calibration" / "eval-step-000002.png"
    stale.parent.mkdir()
    stale.touch()  # of an earlier run in this folder
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[1]["eval_nll"], "the first is not the worst"
    assert pictures(tmp_path) == ["eval-step-000001.png", "eval-step-000004.png"]
    assert len(list((tmp_path / "calibration").glob("*.json"))) == 4
    trainer.evaluate(metric_key_prefix="test")
    assert "test-step-000004.png" in pictures(tmp_path), "outside of a training every evaluation is drawn"
    none = dpsm_trainer(tmp_path / "none", reliability_diagrams="none", **options)
    none.train()
    none.evaluate()
    assert pictures(tmp_path / "none") == []


def test_after_an_interrupted_training_evaluations_are_drawn(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = dpsm_trainer(tmp_path, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.evaluate()
    assert pictures(tmp_path) == ["eval-step-000001.png"]


# ---- where the picture goes, and how files are written -------------------------------------------------------------


def events(folder: Path) -> list[tuple[int, str]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = []
    for path in folder.rglob("events.out.*"):
        reader = accumulator.EventAccumulator(str(path))
        reader.Reload()
        found += [(e.step, tag) for tag in reader.Tags()["images"] for e in reader.Images(tag)]
    return sorted(found)


@pytest.mark.parametrize("ours", [True, False])
def test_the_picture_goes_to_tensorboard(ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    options: dict[str, Any] = {"report_to": ["tensorboard"], "eval_strategy": "steps", "eval_steps": 2}
    trainer: Trainer = (
        dpsm_trainer(tmp_path, reliability_diagrams="all", **options)
        if ours
        else plain_trainer(tmp_path, CalibrationCallback(diagrams="all"), **options)
    )
    trainer.train()
    assert events(tmp_path) == [(2, "eval/reliability_diagram"), (3, "eval/reliability_diagram")]


def test_no_picture_is_sent_unasked(tmp_path: Path) -> None:
    dpsm_trainer(tmp_path, eval_strategy="steps", eval_steps=3).train()
    assert not list(tmp_path.rglob("events.out.*"))


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_json({"a": 1}, path)
    with pytest.raises(ValueError):
        write_json({"a": math.nan}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json({"a": 2}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}, "the old file is gone before the new is whole"


def test_an_infinite_perplexity_is_null(tmp_path: Path) -> None:
    trainer = dpsm_trainer(tmp_path)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CalibrationCallback))
    panel = EvaluationPanel()
    panel.tokens.update(confidence=[0.5], correct=[0], nll=[1e4])
    callback.receive(panel, "eval")
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics={})
    saved = record(tmp_path, "eval-step-000000.json")
    assert saved["metrics"]["perplexity"] is None and saved["metrics"]["nll"] == 1e4


def test_a_trainer_needs_no_matplotlib_until_it_draws() -> None:
    code = "import sys; from dpsm_hf import DPSMTrainer; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
