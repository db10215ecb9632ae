"""The fields that DPSM adds to TrainingArguments: parsing, keeping, and refusing."""

from __future__ import annotations

import dataclasses
import json
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from dpsm_hf import DPSMArguments, DPSMConfig, DPSMSeq2SeqConfig
from dpsm_hf.rules.registry import PARAMETERS
from dpsm_hf.training.arguments import dpsm_arguments, dpsm_field_names

CLASSES = (DPSMConfig, DPSMSeq2SeqConfig)
# each field with a value that differs from its default, as one types it
TYPED = {
    "scoring_rule": "brier",
    "alpha_schedule": "cosine",
    "alpha_start": "0.1",
    "alpha_end": "0.9",
    "alpha_warmup_steps": "250",
    "alpha_hold": "0.25",
    "alpha_feedback_gain": "1.5",
    "alpha_feedback_limit": "0.05",
    "alpha_feedback_metric": "eval_dev_signed_gap",
    "score_smoothing": "0.1",
    "z_loss": "1e-4",
    "entropy_weight": "-0.05",
    "fused_head": "off",
    "chunk_tokens": "64",
    "calibration_bins": "20",
    "calibration_metrics": "all",
    "reliability_diagrams": "none",
    "classwise_tokens": "50",
    "frequency_buckets": "true",
    "fit_temperature": "true",
    "ignore_forced_tokens": "true",
    "generated_calibration": "false",
    "expected_depth": "true",
    "log_component_grad_norms": "true",
}


@pytest.mark.parametrize("config", CLASSES)
def test_defaults(config: type, tmp_path: Path) -> None:
    args = config(output_dir=str(tmp_path))
    assert args.scoring_rule == "dpsm" and args.alpha_schedule == "linear"
    assert args.alpha_warmup_steps == 0.1 and args.alpha_end == 1.0 and args.calibration_bins == 15
    assert args.fused_head == "auto" and args.chunk_tokens is None
    assert args.schedule()(50, 1000) == 0.5
    assert args.objective(0.3).alpha == 0.3 and args.objective().alpha == 1.0


@pytest.mark.parametrize(
    ("config", "base"), [(DPSMConfig, TrainingArguments), (DPSMSeq2SeqConfig, Seq2SeqTrainingArguments)]
)
def test_no_default_of_transformers_is_changed(config: type, base: type, tmp_path: Path) -> None:
    assert issubclass(config, base) and issubclass(config, DPSMArguments)
    ours, theirs = config(output_dir=str(tmp_path)), base(output_dir=str(tmp_path))
    for field in dataclasses.fields(base):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    added = {f.name for f in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(base)}
    assert added == {*dpsm_field_names(), "loss_type"}


@pytest.mark.parametrize("config", [DPSMConfig, DPSMSeq2SeqConfig])
def test_the_former_name_of_scoring_rule_is_taken_with_a_warning(config: type, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="loss_type is now called scoring_rule") as caught:
        args = config(output_dir=str(tmp_path), loss_type="brier")
    assert len(caught) == 1 and Path(caught[0].filename) == Path(__file__)
    assert args.scoring_rule == "brier" and args.objective().scoring_rule == "brier"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataclasses.replace(args, scoring_rule="ce").scoring_rule == "ce"
    with pytest.raises(ValueError, match="loss_type='ce' contradicts scoring_rule='brier'"):
        config(output_dir=str(tmp_path), scoring_rule="brier", loss_type="ce")
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="scoring_rule='brief' is unknown"):
        config(output_dir=str(tmp_path), loss_type="brief")
    with pytest.warns(FutureWarning):
        (args,) = HfArgumentParser(config).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--loss_type", "ce"]
        )
    assert args.scoring_rule == "ce"


@pytest.mark.parametrize("config", CLASSES)
def test_command_line(config: type, tmp_path: Path) -> None:
    line = [part for name, value in TYPED.items() for part in (f"--{name}", value)]
    (args,) = HfArgumentParser(config).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *line])
    assert args.scoring_rule == "brier" and args.alpha_schedule == "cosine"
    assert args.alpha_start == 0.1 and args.alpha_end == 0.9 and args.alpha_warmup_steps == 250.0
    assert args.entropy_weight == -0.05
    assert args.alpha_hold == 0.25 and args.z_loss == 1e-4 and args.calibration_bins == 20
    assert args.alpha_feedback_gain == 1.5 and args.alpha_feedback_limit == 0.05 and args.score_smoothing == 0.1
    assert type(args.calibration_bins) is int and type(args.alpha_warmup_steps) is float
    assert args.alpha_feedback_metric == "eval_dev_signed_gap"
    assert (args.calibration_metrics, args.reliability_diagrams) == ("all", "none")
    assert args.classwise_tokens == 50 and args.fit_temperature is True and args.ignore_forced_tokens is True
    assert args.generated_calibration is False and args.expected_depth is True
    assert args.log_component_grad_norms is True and args.frequency_buckets is True
    assert args.fused_head == "off" and args.chunk_tokens == 64 and type(args.chunk_tokens) is int
    apart = {*PARAMETERS, "knob_schedules"}  # they contradict what is typed above
    assert set(TYPED) | apart == set(dpsm_field_names()), "a new field has no test"
    (knobs,) = HfArgumentParser(config).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--knob_schedules", '{"z_loss": "linear 0 -> 1e-3 over 4"}']
    )
    assert knobs.schedules()["z_loss"](2, 10) == 5e-4
    assert knobs.knob_schedules == {"z_loss": "linear 0 -> 1e-3 over 4"}
    (focal,) = HfArgumentParser(config).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--scoring_rule", "focal", "--focal_gamma", "1.5"]
    )
    assert focal.objective().focal_gamma == 1.5


def test_command_line_refuses_an_unknown_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(DPSMConfig).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--scoring_rule", "hinge"]
        )
    assert "invalid choice: 'hinge'" in capsys.readouterr().err


def test_every_field_has_help() -> None:
    fields = {f.name: f for f in dataclasses.fields(DPSMArguments)}
    for name, field in fields.items():
        assert len(field.metadata.get("help", "")) > 20, name
    text = " ".join(HfArgumentParser(DPSMConfig).format_help().split())
    assert all(f"--{name}" in text for name in fields)
    assert set(typing.get_type_hints(DPSMArguments)) == set(fields)


@pytest.mark.parametrize("config", CLASSES)
def test_round_trips(config: type, tmp_path: Path) -> None:
    args = config(
        output_dir=str(tmp_path), alpha_schedule="step", alpha_hold=0.3, alpha_start=0.1, z_loss=0.01,
        label_smoothing_factor=0.1, calibration_bins=20, eval_strategy="steps", eval_steps=5,
    )  # fmt: skip
    scheduled = config(output_dir=str(tmp_path), knob_schedules={"z_loss": {"start": 0, "end": 0.1, "hold": 3}})
    assert config(**scheduled.to_dict()).schedules() == scheduled.schedules()
    kept = {name: getattr(args, name) for name in dpsm_field_names()}
    plain = json.loads(args.to_json_string())
    assert {name: plain[name] for name in kept} == kept
    assert {name: args.to_dict()[name] for name in kept} == kept
    path = tmp_path / "args.json"
    path.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}), encoding="utf-8")
    for again in (
        config(**args.to_dict()),
        HfArgumentParser(config).parse_json_file(str(path), allow_extra_keys=True)[0],
    ):
        assert {name: getattr(again, name) for name in kept} == kept
        assert again.schedule() == args.schedule() and again.objective() == args.objective()
    assert args.to_sanitized_dict()["alpha_schedule"] == "step"


def test_plain_training_arguments_get_the_defaults(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)
    found = dpsm_arguments(plain)
    assert found.scoring_rule == "dpsm" and found.schedule()(50, 1000) == 0.5
    assert found.objective(0.5).label_smoothing == 0.1, "label smoothing of the plain arguments is lost"
    own = DPSMConfig(output_dir=str(tmp_path), scoring_rule="brier")
    assert dpsm_arguments(own) is own


def test_label_smoothing_reaches_the_objective(tmp_path: Path) -> None:
    args = DPSMConfig(output_dir=str(tmp_path), label_smoothing_factor=0.2)
    assert args.objective().label_smoothing == 0.2
    assert DPSMArguments().objective().label_smoothing == 0.0


@pytest.mark.parametrize("config", CLASSES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring_rule": "hinge"}, r"scoring_rule='hinge' is unknown; choose one of dpsm, ce"),
        ({"alpha_schedule": "quadratic"}, r"alpha_schedule='quadratic' is unknown; choose one of linear"),
        ({"alpha_start": 1.2}, r"alpha_start=1.2 lies outside \[0, 1\]"),
        ({"alpha_end": -0.5}, r"alpha=-0.5 lies outside \[0, 1\]|alpha_end=-0.5 lies outside \[0, 1\]"),
        ({"alpha_warmup_steps": -3}, r"alpha_warmup_steps=-3 must be 0 or more"),
        ({"alpha_warmup_steps": 2.5}, r"alpha_warmup_steps=2.5 is neither a share .* nor a whole number of steps"),
        ({"alpha_hold": -0.1}, r"alpha_hold=-0.1 must be 0 or more"),
        ({"alpha_schedule": "constant", "alpha_hold": 5}, r"alpha_hold=5 has no effect on alpha_schedule='constant'"),
        ({"alpha_schedule": "constant", "alpha_start": 0.5}, r"alpha_start=0.5 contradicts .*'constant'"),
        ({"alpha_feedback_limit": 0.0}, r"limit=0.0"),
        ({"alpha_feedback_gain": float("inf")}, r"gain=inf"),
        ({"score_smoothing": 1.0}, r"score_smoothing=1.0 lies outside \[0, 1\)"),
        ({"scoring_rule": "ce", "score_smoothing": 0.1}, r"score_smoothing=0.1 .*scoring_rule='ce' has neither"),
        ({"score_smoothing": 0.1, "label_smoothing_factor": 0.2},
         r"score_smoothing=0.1 and label_smoothing=0.2 both smooth .*label_smoothing_factor"),
        ({"focal_gamma": -1.0, "scoring_rule": "focal"}, r"focal_gamma=-1.0 must be a finite number of at least 0"),
        ({"focal_gamma": 1.0}, r"focal_gamma=1.0 has no effect on scoring_rule='dpsm'"),
        ({"z_loss": -1e-4}, r"z_loss=-0.0001 must be a finite number of at least 0"),
        ({"calibration_bins": 7}, r"calibration_bins=7 does not divide 3000; use 10, 15"),
        ({"calibration_bins": 0}, r"calibration_bins=0 does not divide"),
        ({"knob_schedules": {"z_loss": "linear 0 -> 1"}, "z_loss": 0.1},
         r"knob_schedules has a schedule of z_loss, which z_loss=0.1 says something else about; leave one"),
        ({"knob_schedules": {"label_smoothing_factor": "linear 0 -> .1"}, "label_smoothing_factor": 0.2},
         r"of label_smoothing_factor, which label_smoothing_factor=0.2 says"),
        ({"knob_schedules": {"alpha": "linear 0 -> 1"}, "alpha_end": 0.5, "alpha_hold": 3},
         r"alpha_end=0.5, alpha_hold=3"),
        ({"knob_schedules": {"alpha": "linear 0 -> 1"}, "scoring_rule": "ce"},
         r"alpha has no effect on scoring_rule='ce'"),
        ({"knob_schedules": {"z_loss": {"schedule": "feedback", "low": 0, "high": 1}}},
         r"knob_schedules: z_loss: schedule='feedback' moves z_loss after evaluations, but eval_strategy='no'"),
        ({"knob_schedules": "schedules.json"}, r"knob_schedules='schedules.json' should be keys with values as JSON"),
        ({"knob_schedules": '{"z_loss": '}, r"knob_schedules='{\"z_loss\": ' should be keys with values as JSON"),
        ({"knob_schedules": {"z_loss": {"start": 0, "end": {1}}}}, r"knob_schedules=.* should hold plain numbers"),
        ({"alpha_schedule": "feedback"}, r"'feedback' moves alpha after evaluations, but eval_strategy='no'"),
    ],
)  # fmt: skip
def test_refused(config: type, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_feedback_with_evaluations(strategy: str, tmp_path: Path) -> None:
    args = DPSMConfig(output_dir=str(tmp_path), alpha_schedule="feedback", eval_strategy=strategy, eval_steps=5)
    assert args.schedule()(10, 100, [{"eval_signed_gap": 0.01, "step": 5}]) == pytest.approx(0.02)
    # a rule without alpha needs no evaluation
    DPSMConfig(output_dir=str(tmp_path), scoring_rule="brier", alpha_schedule="feedback")
