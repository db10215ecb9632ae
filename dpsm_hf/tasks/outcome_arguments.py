"""The arguments of both scripts that say what a run is to leave behind, and when it may end early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..calibration import lower_is_better
from .extra_datasets import ExtraDataset, parse_extra_datasets

#: What the best checkpoint is best in where nothing is said.
DEFAULT_METRIC = "eval_nll"


@dataclass
class OutcomeArguments:
    """What a run is to leave behind beside the model, and when it may end early."""

    extra_eval_datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "dpsm_hf: further sets to evaluate on after training, out of domain for instance, each as "
            "NAME=SOURCE[,config=..][,split=..][,text=COLUMN][,summary=COLUMN]; SOURCE is what --dataset_name takes, "
            "or a file. Figures are reported as NAME_..., with the temperature of the in-domain calibration split."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "dpsm_hf: stop training after so many evaluations in a row without a new best of "
            f"--metric_for_best_model, by default {DEFAULT_METRIC}; needs --eval_strategy."
        },
    )
    evaluate_best: bool = field(
        default=False,
        metadata={
            "help": "dpsm_hf: evaluate the best checkpoint too, after the last weights, as best_eval_... and so on; "
            f"best by --metric_for_best_model, by default {DEFAULT_METRIC}. Every evaluation must save a checkpoint."
        },
    )
    sample_outputs: int = field(
        default=0,
        metadata={
            "help": "dpsm_hf: put so many texts written by the model into outcome.json: greedy continuations of the "
            "first rows of the test (or validation) split, or their summaries."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.extra_eval_datasets, str):  # one, from a YAML file
            self.extra_eval_datasets = [self.extra_eval_datasets]
        self.extra_datasets()
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(
                f"--early_stopping_patience {self.early_stopping_patience} must be at least 1 evaluation; leave it "
                "out to train to the end."
            )
        if self.sample_outputs < 0:
            raise ValueError(f"--sample_outputs {self.sample_outputs} must be 0 (none) or a number of texts.")

    def extra_datasets(self) -> list[ExtraDataset]:
        """Give the data sets of --extra_eval_datasets.

        Raises:
            ValueError: as `parse_extra_datasets`.
        """
        return parse_extra_datasets(self.extra_eval_datasets or [])


def check_samples(outcome_args: OutcomeArguments, training_args: Any) -> None:
    """Refuse sample summaries where none are generated.

    Raises:
        ValueError: Naming the option that is missing.
    """
    if outcome_args.sample_outputs and not training_args.predict_with_generate:
        raise ValueError("--sample_outputs shows generated summaries: pass --predict_with_generate too.")


def settle_best_checkpoint(outcome_args: OutcomeArguments, training_args: Any) -> None:
    """Refuse options under which no best checkpoint can be told, and fill in what it is best in.

    Args:
        outcome_args: Of the run.
        training_args: `metric_for_best_model` and `greater_is_better` are filled in where they are needed.

    Raises:
        ValueError: With the options and the way out.
    """
    wanted = []
    if outcome_args.early_stopping_patience is not None:
        wanted.append(f"--early_stopping_patience {outcome_args.early_stopping_patience}")
    if outcome_args.evaluate_best:
        wanted.append("--evaluate_best")
    for option in wanted:
        if not training_args.do_train:
            raise ValueError(
                f"{option} concerns training and needs --do_train; a run that ended is not trained again."
            )
        if training_args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(f"{option} needs evaluations during training: pass --eval_strategy steps or epoch.")
    if wanted and training_args.metric_for_best_model is None:
        training_args.metric_for_best_model, training_args.greater_is_better = DEFAULT_METRIC, False
    metric = training_args.metric_for_best_model
    if metric is not None and training_args.greater_is_better and (metric.endswith("loss") or lower_is_better(metric)):
        raise ValueError(
            f"--metric_for_best_model {metric} is better when it is lower, but --greater_is_better is true: leave "
            "that out."
        )
    if outcome_args.evaluate_best:
        _check_saving(training_args)


def _check_saving(training_args: Any) -> None:
    if training_args.load_best_model_at_end:
        raise ValueError(
            "--load_best_model_at_end puts the best weights in the place of the last ones, so --evaluate_best could "
            "not evaluate both: leave out --load_best_model_at_end."
        )
    if training_args.save_strategy == SaveStrategy.BEST:
        return
    evaluating, saving = str(training_args.eval_strategy.value), str(training_args.save_strategy.value)
    by_steps = evaluating == "steps" and training_args.save_steps != training_args.eval_steps
    if evaluating != saving or by_steps:
        raise ValueError(
            "--evaluate_best needs a checkpoint of every evaluation, or the best weights may be lost: pass "
            f"--save_strategy best, or --save_strategy {evaluating}"
            + (f" --save_steps {training_args.eval_steps:g}" if evaluating == "steps" else "")
            + f" (it is --save_strategy {saving}"
            + (f" --save_steps {training_args.save_steps:g})." if saving == "steps" else ").")
        )
