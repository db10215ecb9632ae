"""Stopping a training run at a step before its end, to go on later."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .steps import stop_step

logger = logging.getLogger(__name__)


@dataclass
class StoppingArguments:
    """When to stop early."""

    stop_at_step: float | None = field(
        default=None,
        metadata={
            "help": "dpsm_hf: stop there with a checkpoint, the schedules still those of the full length; the same "
            "command without it goes on to the end. 1 or more counts steps, below 1 is a share of all, rounded up to "
            "the next evaluation."
        },
    )

    def check_stopping(self) -> None:
        """Refuse a step that cannot be reached.

        Raises:
            ValueError: it is not positive, or no whole number of steps.
        """
        stop = self.stop_at_step
        if stop is not None and (stop <= 0 or (stop >= 1 and stop != int(stop))):
            raise ValueError(f"--stop_at_step {stop} must be a whole number of steps, or a share between 0 and 1.")


class StopAtStep(TrainerCallback):
    """Stop training with a checkpoint after a step; logs and evaluations that are due there are still made.

    Nothing but the length of this process changes: ``max_steps`` and with it every schedule stay what they were.

    Args:
        stop_at_step: 1 or more counts steps, below 1 is a share of all, rounded up to the next evaluation.
    """

    def __init__(self, stop_at_step: float) -> None:
        self.stop_at_step = stop_at_step
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a step that the checkpoint has passed.

        Raises:
            ValueError: naming both.
        """
        if state.global_step >= self._step(args, state):
            raise ValueError(
                f"--stop_at_step {self.stop_at_step:g} lies behind: the checkpoint is at step {state.global_step}. "
                "Leave the option out, name a later step, or use --resume_from_checkpoint none."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the Trainer to save and stop at the step."""
        if self._step(args, state) <= state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so where training was stopped."""
        if self.stopped and state.is_world_process_zero:
            logger.info("Stopped at step %s of %s, as asked for.", state.global_step, state.max_steps)

    def _step(self, args: TrainingArguments, state: TrainerState) -> int:
        by_steps = args.eval_strategy == IntervalStrategy.STEPS
        return stop_step(self.stop_at_step, state.max_steps, state.eval_steps if by_steps else None)


def stopping(stop_at_step: float | None) -> list[TrainerCallback]:
    """Return the callback of --stop_at_step, if there is to be one.

    Args:
        stop_at_step: the argument, or None.
    """
    return [] if stop_at_step is None else [StopAtStep(stop_at_step)]
