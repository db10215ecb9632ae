"""Early stopping that survives a resume, and the best checkpoint in the place of the last weights for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..training.trainer import DPSMMixin

logger = logging.getLogger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' early stopping, which counts anew after a resume, with the count taken from the log instead."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what the checkpoint had evaluated; one that training had stopped at is not trained on."""
        # Trainer writes a callback's state into a place that a checkpoint made without the callback does not have
        states: Any = state.stateful_callbacks  # a dict once training has begun
        states.setdefault(type(self).__name__, self.state())
        metric = str(args.metric_for_best_model)
        key = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.early_stopping_patience_counter = evaluations_since_best(
            [entry[key] for entry in state.log_history if key in entry], greater=bool(args.greater_is_better)
        )
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so where training ended early."""
        if self.early_stopping_patience_counter >= self.early_stopping_patience and state.is_world_process_zero:
            logger.info(
                "Stopped early at step %s of %s: %s evaluations in a row without a new best %s.",
                state.global_step,
                state.max_steps,
                self.early_stopping_patience_counter,
                args.metric_for_best_model,
            )


def early_stopping(patience: int | None) -> list[TrainerCallback]:
    """Return the callback of --early_stopping_patience, if there is to be one."""
    return [] if patience is None else [EarlyStopping(patience)]


def evaluations_since_best(values: list[float], *, greater: bool) -> int:
    """Count the evaluations behind the one with the best value; one that is NaN is never the best.

    Args:
        values: of the metric, in the order of the evaluations.
        greater: whether more is better.
    """
    better = np.greater if greater else np.less
    best, since = float("-inf") if greater else float("inf"), 0
    for i, value in enumerate(values):
        # transformers counts from the second on
        since = 0 if i == 0 or better(value, best) else since + 1
        best = value if better(value, best) else best
    return since


def best_step(trainer: Trainer) -> int | None:
    """Return the step of the best checkpoint that there is; None where none was kept track of.

    By step, not by the path that a checkpoint noted: the output folder may have been moved before a resume.
    """
    step = trainer.state.best_global_step
    return step if step and _checkpoint(trainer, step).is_dir() else None


def _checkpoint(trainer: Trainer, step: int) -> Path:
    return Path(str(trainer.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


@contextmanager
def best_weights(trainer: Trainer) -> Iterator[bool]:
    """Put the weights of the best checkpoint into the model and let what is evaluated meanwhile carry its step.

    Afterwards the model keeps them, but ``temperature.json`` in ``output_dir`` is again that of the last weights, the
    ones that are saved there; the best checkpoint's own is in its folder.

    Args:
        trainer: after training, with ``metric_for_best_model``.

    Yields:
        Whether there is a best checkpoint.
    """
    step = best_step(trainer)
    if step is None:
        logger.warning(
            "There is no best checkpoint: no evaluation during training had a finite %s.",
            trainer.args.metric_for_best_model,
        )
        yield False
        return
    scaler = trainer.temperature_scaler if isinstance(trainer, DPSMMixin) else None
    last, folder = trainer.state.global_step, _checkpoint(trainer, step)
    if step != last:  # else these are its weights
        trainer.state.best_model_checkpoint = str(folder)
        trainer._load_best_model()
    trainer.state.global_step = step
    try:
        yield True
    finally:
        trainer.state.global_step = last
    if scaler is not None and trainer.is_world_process_zero():
        assert isinstance(trainer, DPSMMixin)
        if (of_best := trainer.temperature_scaler) is not None:
            of_best.save(folder)
        scaler.save(str(trainer.args.output_dir))
