"""Arguments: `DPSMConfig` and `DPSMSeq2SeqConfig`, TrainingArguments with the fields of DPSM."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..calibration import GRID_BINS, lower_is_better
from ..head.options import FUSED_MODES
from ..rules.knob_schedules import parse_knob_schedules
from ..rules.knobs import KNOBS, objective_with
from ..rules.registry import PARAMETERS, RULES, SCORING_RULES, rule_parameter, with_rule_parameters
from ..rules.schedules import KnobSchedule, get_alpha_schedule
from ..rules.scoring_rules import Objective
from ..runtime.options import option
from ..runtime.typed_values import typed_value

#: Choices of ``calibration_metrics``: what an evaluation logs and returns.
CALIBRATION_METRICS = ("core", "all")

#: Choices of ``reliability_diagrams``: which evaluations are drawn.
RELIABILITY_DIAGRAMS = ("final", "all", "none")


@dataclass
@with_rule_parameters
class DPSMArguments:
    """What to train with; the trainers use these defaults when they are given plain TrainingArguments.

    Raises:
        ValueError: for a value out of its range, an unknown schedule, or options that contradict each other.
    """

    scoring_rule: str = option(
        "dpsm_hf: the training loss. dpsm is (1 - alpha) * CE + alpha * Brier with alpha scheduled; the "
        "others are fixed. Whatever is chosen, eval_loss is cross-entropy and NLL, Brier and ECE are reported.",
        "dpsm",
        choices=SCORING_RULES,
    )
    alpha_schedule: str = option(
        "dpsm_hf: how alpha moves: linear, cosine, constant, late_linear, step, triangle, feedback, or a "
        "name registered with register_alpha_schedule.",
        "linear",
    )
    alpha_start: float | None = option("dpsm_hf: alpha before the ramp, in [0, 1]; 0 if left out.")
    alpha_end: float = option("dpsm_hf: alpha after the ramp, in [0, 1]; of constant, the fixed one.", 1.0)
    alpha_warmup_steps: float = option(
        "dpsm_hf: length of the ramp; 1 or more counts steps, below 1 is a share of all.", 0.1
    )
    alpha_hold: float | None = option(
        "dpsm_hf: length of the phase before the ramp or the switch, in the unit of alpha_warmup_steps "
        "(late_linear and step: 0.5, else 0)."
    )
    alpha_feedback_gain: float = option(
        "dpsm_hf: feedback: alpha moves by gain * (confidence - accuracy) at evaluations.", 2.0
    )
    alpha_feedback_limit: float = option("dpsm_hf: feedback: the most that alpha moves after one evaluation.", 0.1)
    alpha_feedback_metric: str = option(
        "dpsm_hf: feedback: the logged gap of the evaluation set that moves alpha.", "eval_signed_gap"
    )
    knob_schedules: dict[str, Any] | str | None = option(
        "dpsm_hf: schedules of other numbers of the objective than alpha (label_smoothing_factor, score_smoothing, "
        "z_loss, a rule's own such as focal_gamma), keys with values or JSON: "
        '\'{"focal_gamma": "linear 0 -> 2 over 0.1"}\' or, of each, schedule, start, end, warmup_steps and hold; '
        '\'{"z_loss": {"schedule": "feedback", "low": 0, "high": 0.01}}\' is moved by a signal of the evaluations '
        "(docs/schedules.md)."
    )
    score_smoothing: float = option(
        "dpsm_hf: epsilon of score smoothing (Shao et al. 2024), Brier or spherical; 0 is off.", 0.0
    )
    focal_gamma: float = rule_parameter("focal_gamma")
    z_loss: float = option("dpsm_hf: weight of log(Z)**2 in the training loss; 0 is off.", 0.0)
    entropy_weight: float = option(
        "dpsm_hf: lambda of an entropy bonus on any rule, loss - lambda * H: above 0 the model becomes less sure, "
        "below 0 surer; 0 is off.",
        0.0,
    )
    fused_head: str = option(
        "dpsm_hf: score tokens inside the output layer, so that no tensor of logits exists: auto (where "
        "the model allows it, found out at the first batch), on (an error where not), off (from full logits; with "
        "scoring_rule=ce then Trainer bit for bit).",
        "auto",
        choices=FUSED_MODES,
    )
    chunk_tokens: int | None = option(
        "dpsm_hf: tokens that the fused head scores at a time; fewer take less memory. Left out: 128 to "
        "256 on a CPU, up to 2048 on a GPU, by the size of the vocabulary."
    )
    calibration_bins: int = option(f"dpsm_hf: bins of the reliability diagrams; a divisor of {GRID_BINS}.", 15)
    calibration_metrics: str = option(
        "dpsm_hf: what evaluations log and return: core (nll, perplexity, brier, ece_15, signed_gap, token_accuracy, "
        "and what metric_for_best_model names) or all, some eighty figures. The file of each evaluation in "
        "output_dir/calibration has all of them either way.",
        "core",
        choices=CALIBRATION_METRICS,
    )
    reliability_diagrams: str = option(
        "dpsm_hf: which evaluations are drawn: final (the last and the best one of a training, and every one outside "
        "of a training), all or none. The data of each are written either way, and ReliabilityDisplay draws them.",
        "final",
        choices=RELIABILITY_DIAGRAMS,
    )
    classwise_tokens: int = option(
        "dpsm_hf: report class-wise ECE over this many of the most frequent tokens; 0 is off.", 0
    )
    frequency_buckets: bool = option(
        "dpsm_hf: compare, in the files of evaluations, the probability that frequent and rare tokens get with how "
        "often they are labels, in four buckets by frequency in the training set.",
        False,
    )
    ignore_forced_tokens: bool = option(
        "dpsm_hf: keep the labels that a text is made to begin with (BART's first <s>, a language code) "
        "out of the calibration metrics and the temperature, and report them apart, as eval_forced_...; the loss "
        "is not changed.",
        False,
    )
    fit_temperature: bool = option(
        "dpsm_hf: fit a temperature on the calibration split before an evaluation that is not part of "
        "training, and report every metric after scaling too, as eval_..._scaled.",
        False,
    )

    generated_calibration: bool = option(
        "dpsm_hf: with predict_with_generate, score the generated tokens once more and report how far "
        "their probabilities can be believed, as eval_generated_... and eval_summary_...; one forward a batch.",
        True,
    )
    log_component_grad_norms: bool = option(
        "dpsm_hf: log the gradient norms that cross-entropy and the Brier score would have alone, as "
        "grad_norm_ce and grad_norm_brier, and that of a z-loss, as grad_norm_z_loss; a pass of one micro-batch each "
        "at every logged step, whose time does not count as training.",
        False,
    )
    expected_depth: bool = option(
        "dpsm_hf: report after how many layers a token's most likely successor no longer changes; one "
        "more forward a batch.",
        False,
    )

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            value = getattr(self, name)
            try:
                converted = typed_value(name, hint, value)
            except ValueError as error:
                raise ValueError(f"{name}={value!r} {error}.") from None
            if not (isinstance(value, int) and value == converted):  # 5 steps are reported as 5, not as 5.0
                setattr(self, name, converted)
        if isinstance(self.knob_schedules, str):
            self.knob_schedules = _from_json("knob_schedules", self.knob_schedules)
        parent: Any = super()
        own: Any = self
        metric = getattr(own, "metric_for_best_model", None)
        if metric is not None and getattr(own, "greater_is_better", None) is None and lower_is_better(metric):
            # where nothing is said, TrainingArguments takes more to be better of all but a loss
            own.greater_is_better = False
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()
        self._check_schedules()
        for parameter in PARAMETERS.values():
            value = getattr(self, parameter.name)
            owners = [rule.name for rule in RULES.values() if parameter in rule.parameters]
            if value != parameter.default and self.scoring_rule not in owners:
                raise ValueError(
                    f"{parameter.name}={value} has no effect on scoring_rule={self.scoring_rule!r}; leave it out or "
                    f"choose {' or '.join(f'scoring_rule={owner!r}' for owner in owners)}."
                )
        for name, known in (
            ("fused_head", FUSED_MODES),
            ("calibration_metrics", CALIBRATION_METRICS),
            ("reliability_diagrams", RELIABILITY_DIAGRAMS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be at least 1; leave it out for the default.")
        if self.calibration_bins < 1 or GRID_BINS % self.calibration_bins:
            raise ValueError(
                f"calibration_bins={self.calibration_bins} does not divide {GRID_BINS}; use 10, 15, 20, 50 or 100."
            )
        if self.classwise_tokens < 0:
            raise ValueError(f"classwise_tokens={self.classwise_tokens} must be 0 (off) or a number of tokens.")
        if self.log_component_grad_norms and getattr(self, "logging_strategy", None) != IntervalStrategy.STEPS:
            raise ValueError(
                f"log_component_grad_norms measures at the steps that are logged; logging_strategy="
                f"{getattr(self, 'logging_strategy', None)!s} does not say which: set logging_strategy='steps'."
            )

    def _check_schedules(self) -> None:
        """Look for a schedule that is wrong by itself, or that contradicts another argument.

        Raises:
            ValueError: naming knob, value and remedy.
        """
        self.schedule()
        self.objective()
        schedules = self.schedules()
        for name in self.knob_schedules or {}:
            fields = _alpha_fields() if name == "alpha" else [name]
            given = {field: getattr(self, field, KNOBS[name].default) for field in fields}
            defaults = {field: getattr(DPSMArguments, field, KNOBS[name].default) for field in fields}
            if twice := [f"{field}={value}" for field, value in given.items() if value != defaults[field]]:
                raise ValueError(
                    f"knob_schedules has a schedule of {name}, which {', '.join(twice)} says something else about; "
                    "leave one of them out."
                )
        for name, schedule in schedules.items():
            if schedule.name == "feedback" and getattr(self, "eval_strategy", None) == IntervalStrategy.NO:
                where = f"knob_schedules: {name}: " if name in (self.knob_schedules or {}) else "alpha_"
                raise ValueError(
                    f"{where}schedule='feedback' moves {name} after evaluations, but eval_strategy='no' makes none; "
                    "set eval_strategy='steps' and eval_steps."
                )

    def objective(self, alpha: float | None = None, knobs: Mapping[str, float] | None = None) -> Objective:
        """Return the training objective, at a given alpha or at ``alpha_end``.

        Args:
            alpha: weight of the Brier score in the mix.
            knobs: values of scheduled numbers, by name, in place of those of the arguments; alpha may be among them.

        Raises:
            ValueError: for a value out of its range, or values that contradict each other.
        """
        plain = Objective(
            scoring_rule=self.scoring_rule,
            alpha=self.alpha_end if alpha is None else alpha,
            label_smoothing=getattr(self, "label_smoothing_factor", 0.0),
            score_smoothing=self.score_smoothing,
            z_loss=self.z_loss,
            entropy_weight=self.entropy_weight,
            **{name: getattr(self, name) for name in PARAMETERS},
        )
        return objective_with(plain, knobs) if knobs else plain

    def is_cross_entropy(self) -> bool:
        """Return whether the objective is plain cross-entropy throughout, with label smoothing at most."""
        smoothing = getattr(self, "label_smoothing_factor", 0.0)
        plain = self.scoring_rule == "ce" and not self.knob_schedules
        return plain and self.objective(0.0) == Objective("ce", label_smoothing=smoothing)

    def schedules(self) -> dict[str, KnobSchedule]:
        """Return the schedule of every number of the objective that has one; alpha's first, if the rule is a mix."""
        given = self._knob_schedules()
        return {"alpha": self.schedule(), **given} if self.scoring_rule == "dpsm" else dict(given)

    def _knob_schedules(self) -> Mapping[str, KnobSchedule]:
        if not self.knob_schedules:
            return {}
        try:
            text = json.dumps(self.knob_schedules)
        except TypeError as error:
            raise ValueError(f"knob_schedules={self.knob_schedules!r} should hold plain numbers ({error}).") from None
        return _parsed(text, self.scoring_rule)

    def schedule(self) -> KnobSchedule:
        """Return the alpha schedule these arguments describe."""
        given = self._knob_schedules()
        if "alpha" in given:
            return given["alpha"]
        return get_alpha_schedule(
            self.alpha_schedule,
            warmup_steps=self.alpha_warmup_steps,
            start=self.alpha_start,
            end=self.alpha_end,
            hold=self.alpha_hold,
            gain=self.alpha_feedback_gain,
            limit=self.alpha_feedback_limit,
            metric=self.alpha_feedback_metric,
        )


@dataclass
class _FormerNames:
    """Arguments under names that they no longer have."""

    loss_type: str | None = option(
        "dpsm_hf: the former name of scoring_rule, taken with a warning.", choices=SCORING_RULES
    )

    def __post_init__(self) -> None:
        own: Any = self
        given, self.loss_type = self.loss_type, None  # so that a copy with another scoring_rule contradicts nothing
        if given is not None:
            if own.scoring_rule not in (given, type(own).scoring_rule):
                raise ValueError(
                    f"loss_type={given!r} contradicts scoring_rule={own.scoring_rule!r}, whose former name it is; "
                    "leave loss_type out."
                )
            warnings.warn("loss_type is now called scoring_rule; write that.", FutureWarning, stacklevel=3)
            own.scoring_rule = given
        parent: Any = super()
        parent.__post_init__()


def _from_json(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}={text!r} should be keys with values as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}={text!r} should be keys with values as JSON.")
    return found


# asked for at every micro-batch
@functools.lru_cache(maxsize=64)
def _parsed(text: str, scoring_rule: str) -> Mapping[str, KnobSchedule]:
    return parse_knob_schedules(json.loads(text), scoring_rule)


def _alpha_fields() -> list[str]:
    return [name for name in dpsm_field_names() if name.startswith("alpha_")]


@functools.cache
def _hints() -> dict[str, Any]:
    hints = typing.get_type_hints(DPSMArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(DPSMArguments)}


@dataclass
class DPSMConfig(_FormerNames, DPSMArguments, TrainingArguments):
    """TrainingArguments with the fields of `DPSMArguments`; no default of TrainingArguments is changed.

    Of ``metric_for_best_model`` less is better, too, for the metrics that are reported here (``eval_nll``,
    ``eval_ece_15``, ...), unless ``greater_is_better`` says otherwise.

    ``loss_type``, the former name of ``scoring_rule``, is taken with a warning, and reads None.

    With this config `DPSMTrainer` installs `AlphaScheduleCallback` and `CalibrationCallback`.
    """


@dataclass
class DPSMSeq2SeqConfig(_FormerNames, DPSMArguments, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the fields of `DPSMArguments`; see `DPSMConfig`."""


def dpsm_arguments(args: TrainingArguments) -> DPSMArguments:
    """Return the DPSM fields of training arguments: their own, or the defaults for plain TrainingArguments.

    Raises:
        ValueError: if the defaults contradict what the plain arguments ask for, or if these have fields of DPSM, which
            nothing would read.
    """
    if isinstance(args, DPSMArguments):
        return args
    check_no_foreign_fields(args, "DPSMConfig")
    return _PlainDefaults(label_smoothing_factor=args.label_smoothing_factor)


def check_no_foreign_fields(args: Any, config: str) -> None:
    """Check whether arguments that are not ours have fields of DPSM, which would be ignored.

    Args:
        args: of a trainer.
        config: the class to name that does have these fields.

    Raises:
        ValueError: naming the fields and their values.
    """
    foreign = [f"{name}={getattr(args, name)!r}" for name in dpsm_field_names() if hasattr(args, name)]
    if foreign:
        raise ValueError(
            f"{type(args).__name__} has {', '.join(foreign)}, which would have no effect, since it is no "
            f"DPSMArguments: use {config}, or derive the class from it (or from DPSMArguments and your own)."
        )


@dataclass
class _PlainDefaults(DPSMArguments):
    label_smoothing_factor: float = 0.0


def dpsm_field_names() -> list[str]:
    """Return the names of the fields that DPSM adds to TrainingArguments."""
    return [f.name for f in dataclasses.fields(DPSMArguments)]
