"""Errors found before training starts, and the words for a loss that is not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length
from transformers.utils import logging

from ..calibration import METRICS
from ..evaluation.panel import better_direction, reported_names
from ..rules.losses import IGNORE_INDEX, TokenScores, describe_invalid_labels
from ..rules.scoring_rules import Objective
from .arguments import DPSMArguments
from .clock import CLOCK

logger = logging.get_logger(__name__)

# Reading is a pass over memory-mapped integers, about a second for this many; what lies beyond is checked batch by
# batch while training.
_MOST_TOKENS = 200_000_000
# Steps at which the values of schedules are looked at.
_LOOKED_AT = 200

#: Of the names of what is measured on the calibration set during training.
CALIBRATION_PREFIX = "eval_calibration"


def integer_labels(labels: Tensor, model: nn.Module) -> Tensor:
    """Return labels as int64, whatever integers they were.

    Raises:
        ValueError: if they are no token ids: numbers of a regression, or booleans, of which every one that is ignored
            would be token 1.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"the labels of the batch are a {type(labels).__name__}, but a scoring rule scores a tensor of token ids "
            "[batch, length]: let the data collator return torch.as_tensor(labels)."
        )
    if labels.dtype == torch.int64:
        return labels
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(
            f"the labels of the batch are {kind}, but a scoring rule scores token ids, which are integers "
            f"({IGNORE_INDEX} is not scored). If {type(model).__name__} is trained on something else (a regression, "
            "several labels at once), DPSM has no meaning for it: train it with Trainer."
        )
    return labels.long()


def check_batch_labels(inputs: Mapping[str, Any], arguments: DPSMArguments, *, flips: bool) -> None:
    """Check whether a training batch has labels, where something has to be computed from them.

    Args:
        inputs: the batch.
        arguments: the DPSM fields in force.
        flips: whether targets are flipped.

    Raises:
        ValueError: it has none.
    """
    if "labels" in inputs:
        return
    if not arguments.is_cross_entropy():
        raise ValueError(
            f"the batch has no 'labels', only {', '.join(inputs)}, so scoring_rule={arguments.scoring_rule!r}"
            f"{_added_to_ce(arguments)} cannot be computed; let the data collator name them so, or use "
            "scoring_rule='ce' alone for the model's own loss."
        )
    if flips:
        raise ValueError(f"flipped targets need a batch with 'labels'; this one has only {', '.join(inputs)}.")


def check_train_dataset(dataset: Any, vocab_size: int | None) -> None:
    """Check whether there is anything to train on, and for labels that the model has no logit for.

    Args:
        dataset: the training set.
        vocab_size: of the model, if it tells.

    Raises:
        ValueError: the set is empty, or as `check_dataset_labels`.
    """
    if has_length(dataset) and len(dataset) == 0:
        raise ValueError("train_dataset is empty: there is nothing to train on. Look at its split and filters.")
    check_dataset_labels(dataset, vocab_size, "train_dataset")


def check_dataset_labels(dataset: Any, vocab_size: int | None, name: str) -> None:
    """Look at the ``labels`` column of a `datasets.Dataset` for labels that the model has no logit for.

    Other kinds of data sets, and those with selected rows or a transform, are checked batch by batch instead.

    Raises:
        ValueError: naming the label, its row and the vocabulary size.
    """
    if not isinstance(dataset, Dataset) or vocab_size is None or "labels" not in dataset.column_names:
        return
    if dataset._indices is not None or dataset.format["type"] == "custom":
        return
    rows_before, seen = 0, 0
    for chunk in dataset.data.column("labels").chunks:
        if not isinstance(chunk, (pa.ListArray, pa.LargeListArray)) or not pa.types.is_integer(chunk.type.value_type):
            return
        entries = chunk.flatten()
        if entries.null_count:  # an unsigned type has no IGNORE_INDEX to put there
            entries = entries.cast(pa.int64()).fill_null(IGNORE_INDEX)
        values = entries.to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((values >= vocab_size) | ((values < 0) & (values != IGNORE_INDEX)))
        if len(wrong):
            lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            row = rows_before + int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
            raise ValueError(
                f"{name} row {row} has label {values[wrong[0]]}, outside [0, {vocab_size}), the model's vocabulary. "
                f"Tokens that are not to be scored carry {IGNORE_INDEX}; if the tokenizer has more entries than the "
                "model, call model.resize_token_embeddings(len(tokenizer))."
            )
        rows_before += len(chunk)
        seen += len(values)
        if seen > _MOST_TOKENS:
            return


def check_calibration_dataset(dataset: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Check whether a temperature would be fitted on the very data that the model learns from or is judged by.

    Raises:
        ValueError: if it is one of the other sets, the same object or row by row, or empty.
    """
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError("calibration_dataset is empty: there is nothing to fit a temperature on.")
    others = eval_dataset.items() if isinstance(eval_dataset, dict) else [("eval_dataset", eval_dataset)]
    for name, other in (("train_dataset", train_dataset), *others):
        if other is dataset or _same_rows(other, dataset):
            raise ValueError(
                f"calibration_dataset is {name} itself: a temperature fitted there tells nothing of new text. Set "
                "aside samples that are neither trained nor tested on."
            )


def _same_rows(one: Any, other: Any) -> bool:
    """Return whether two sets of `datasets` hold the same rows in the same order; False for any other kind."""
    if not isinstance(one, Dataset) or not isinstance(other, Dataset) or len(one) != len(other):
        return False
    if one.column_names != other.column_names or one.format["type"] == "custom" or other.format["type"] == "custom":
        return False
    one, other = one.with_format("arrow"), other.with_format("arrow")
    # most differ in the first rows, which spares a pass over both
    return all(one[i : i + 1000].equals(other[i : i + 1000]) for i in range(0, len(one), 1000))


def check_other_losses(trainer: Trainer, arguments: DPSMArguments) -> None:
    """Check whether something else would compute the loss of a trainer in place of the objective.

    Args:
        trainer: not trained yet.
        arguments: the DPSM fields in force.

    Raises:
        ValueError: if so.
    """
    if arguments.is_cross_entropy():
        return
    scoring_rule, added = arguments.scoring_rule, _added_to_ce(arguments)
    if trainer.compute_loss_func is not None:
        raise ValueError(
            f"compute_loss_func would replace scoring_rule={scoring_rule!r}{added}, which could then have no effect; "
            "leave one of them out (scoring_rule='ce' alone honours compute_loss_func as Trainer does)."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.sp_backend == "deepspeed" and parallelism.sp_enabled:
        raise ValueError(
            f"scoring_rule={scoring_rule!r}{added} does not run under DeepSpeed sequence parallelism, which computes "
            "the loss itself; use scoring_rule='ce' or another parallelism."
        )


def _added_to_ce(arguments: DPSMArguments) -> str:
    """Return in words what makes an objective more than cross-entropy, if that is its rule."""
    if arguments.scoring_rule != "ce":
        return ""
    given, plain = arguments.objective(), Objective("ce", alpha=arguments.alpha_end)
    set_ = [f.name for f in dataclasses.fields(given) if getattr(given, f.name) != getattr(plain, f.name)]
    return f" with {', '.join([*set_, *(arguments.knob_schedules or {})])}"


def check_best_metric(args: TrainingArguments, eval_dataset: Any, *, own_metrics: bool = False) -> None:
    """Check whether the checkpoint that ``metric_for_best_model`` chooses is the best one.

    With plain TrainingArguments, which take more to be better of all but a loss, the direction is put right.

    Args:
        args: of the trainer; ``greater_is_better`` may be changed.
        eval_dataset: of the trainer; a dict evaluates each entry under ``eval_<name>``.
        own_metrics: whether there is a ``compute_metrics``, whose names win and mean what its author knows.

    Raises:
        ValueError: if neither more nor less of the metric is better.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return
    name = metric.removeprefix("eval_")
    for one in eval_dataset if isinstance(eval_dataset, dict) else ():
        name = name.removeprefix(f"{one}_")
    if name not in (*reported_names(), CLOCK):
        return
    direction = better_direction(name)
    if direction is None and not own_metrics:
        raise ValueError(
            f"metric_for_best_model={metric!r} cannot choose a checkpoint: neither more nor less of it is better. "
            "Name one that can: eval_nll, eval_brier, eval_debiased_ece."
        )
    if direction == "lower" and args.greater_is_better and not isinstance(args, DPSMArguments):
        args.greater_is_better = False
        logger.warning(f"Less {metric} is better: greater_is_better is set to False, so that the best model is kept.")


def check_schedules(arguments: DPSMArguments, steps: int) -> None:
    """Check the objective at every step of a training, or at two hundred, as far as it is known beforehand.

    Of a number that evaluations move, the ends of its range are looked at.

    Args:
        arguments: the DPSM fields in force.
        steps: about how many optimizer steps there will be.

    Raises:
        ValueError: naming the step and the values of the schedules, of which one is out of its range or two exclude
            each other.
    """
    schedules = arguments.schedules()
    ends = {name: s.options.feedback() for name, s in schedules.items() if s.name == "feedback"}
    moved = [{name: getattr(end, side) for name, end in ends.items()} for side in ("low", "high")] if ends else [{}]
    last = max(0, steps - 1)
    for step in sorted({round(i * last / _LOOKED_AT) for i in range(_LOOKED_AT + 1)}) if schedules else ():
        ramps = {name: schedule(step, steps) for name, schedule in schedules.items() if name not in ends}
        for values in ({**ramps, **each} for each in moved):
            try:
                arguments.objective(knobs=values)
            except ValueError as error:
                shown = ", ".join(f"{name}={value:g}" for name, value in values.items())
                raise ValueError(f"the schedules do not go together at step {step} ({shown}): {error}") from None


def check_feedback_metric(arguments: DPSMArguments, eval_dataset: Any, calibration_dataset: Any = None) -> None:
    """Check whether any evaluation reports the number that a feedback schedule is moved by.

    Args:
        arguments: the DPSM fields in force.
        eval_dataset: of the trainer; a dict evaluates each entry under ``eval_<name>``.
        calibration_dataset: of the trainer, evaluated under ``eval_calibration`` where a schedule reads that.

    Raises:
        ValueError: naming the metric and those that are reported.
    """
    prefixes = [f"eval_{name}" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval"]
    if calibration_dataset is not None and CALIBRATION_PREFIX not in prefixes:
        prefixes.append(CALIBRATION_PREFIX)
    reported = {f"{prefix}_{name}" for prefix in prefixes for name in METRICS}
    for knob, schedule in arguments.schedules().items():
        if schedule.name == "feedback" and schedule.options.metric not in reported:
            of_alpha = knob not in (arguments.knob_schedules or {})
            place = "alpha_feedback_metric" if of_alpha else f"knob_schedules: {knob}: signal"
            without = ", for which calibration_dataset= is missing" if reads_calibration(arguments) else ""
            raise ValueError(
                f"{place}={schedule.options.metric!r} is reported by no evaluation{without}, so {knob} would never "
                f"move; use {' or '.join(f'{prefix}_signed_gap' for prefix in prefixes)}."
            )


def reads_calibration(arguments: DPSMArguments) -> bool:
    """Return whether a feedback schedule is moved by the calibration set, which is then evaluated in training too."""
    return any(
        name.startswith(f"{CALIBRATION_PREFIX}_")
        for schedule in arguments.schedules().values()
        if schedule.name == "feedback"
        for name in schedule.options.feedback().read()
    )


def check_feedback_scale(arguments: DPSMArguments, training: TrainingArguments) -> None:
    """Check whether the numbers are logged that a feedback schedule multiplies its gain by.

    Only numbers that are the same in every process will do, or each would train with a knob of its own; and only those
    of one step: means over the steps since the last entry begin anew when a training goes on from a checkpoint.

    Args:
        arguments: the DPSM fields in force.
        training: arguments of the trainer.

    Raises:
        ValueError: naming the one that is not, with the remedy.
    """
    trained = ["grad_norm", "grad_norm_ce", "grad_norm_brier"]
    for knob, schedule in arguments.schedules().items():
        for name in schedule.options.feedback().scale_names() if schedule.name == "feedback" else ():
            place = f"knob_schedules: {knob}: relative_to={schedule.options.relative_to!r}"
            if name.startswith("eval_") and any(name.endswith(f"_{metric}") for metric in METRICS):
                continue
            if name not in trained:
                raise ValueError(
                    f"{place}: {name!r} is not logged of a single step; use one of {', '.join(trained)} or a metric "
                    "of an evaluation (eval_brier)."
                )
            if training.logging_strategy == IntervalStrategy.NO:
                raise ValueError(f"{place} needs a training log, but logging_strategy='no'; set it to 'steps'.")
            if name in ("grad_norm_ce", "grad_norm_brier") and not arguments.log_component_grad_norms:
                raise ValueError(f"{place}: {name} is logged with log_component_grad_norms=True only; set that.")


def describe_non_finite(
    loss: float,
    place: str,
    scores: TokenScores | None,
    targets: Tensor | None,
    vocab_size: int | None,
    updated: bool = False,
) -> str:
    """Return what is to be said about a training loss that is NaN or infinite.

    Args:
        loss: the loss.
        place: step and micro-batch, in words.
        scores: of the micro-batch, flattened to N tokens, if it was scored.
        targets: its labels as they were scored, ``[..., T]``.
        vocab_size: of the model, if it tells.
        updated: whether the optimizer may have used its gradient.
    """
    used = (
        "The weights may have been updated with it, but they were not saved"
        if updated
        else "Nothing was updated with it: the last checkpoint is sound"
    )
    cause = ""
    if scores is not None and targets is not None:
        bad = (scores.scored & ~torch.isfinite(scores.nll)).nonzero()
        if invalid := describe_invalid_labels(targets, vocab_size or 2**62):
            cause = f" {invalid}"
        elif len(bad):
            sample, token = divmod(int(bad[0]), targets.shape[-1])
            cause = (
                f" The logits of {len(bad)} scored tokens are NaN or infinite, first in sample {sample} of the "
                f"micro-batch at position {token}."
            )
    return (
        f"the training loss is {loss} at {place}.{cause} {used}. "
        "Usual remedies: a lower learning rate, max_grad_norm, bf16 instead of fp16, a look at that sample."
    )
