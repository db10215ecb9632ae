"""What ends training before its last step: a step that was named, Ctrl-C or SIGTERM, or no progress any more."""

from __future__ import annotations

import logging
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..runtime.options import option
from .steps import stop_step

logger = logging.getLogger(__name__)


@dataclass
class StoppingArguments:
    """When to stop early, and what may be gone on from."""

    stop_at_step: float | None = option(
        "dpsm_hf: stop there with a checkpoint, the schedules still those of the full length; the same "
        "command without it goes on to the end. 1 or more counts steps, below 1 is a share of all, rounded up to "
        "the next evaluation."
    )

    resume_strict: bool = option(
        "dpsm_hf: stop where the newest checkpoint is damaged or incomplete, or was saved with other data "
        "or settings, instead of taking an older one or going on with a warning.",
        False,
    )

    def check_stopping(self) -> None:
        """Refuse a step that cannot be reached.

        Raises:
            ValueError: it is not positive, or no whole number of steps.
        """
        stop = self.stop_at_step
        if stop is not None and not (0 < stop < 1 or (float(stop).is_integer() and stop >= 1)):
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


class StopOnInterrupt(TrainerCallback):
    """Turn the first Ctrl-C, or SIGTERM, into "finish this step, save a checkpoint, stop", so that nothing is lost.

    Across processes the wish is agreed on every ``sync_every`` steps, because ranks that stop at different
    steps would wait for each other for ever.
    """

    sync_every = 10

    def __init__(self) -> None:
        self.received = 0
        self.stopped = False

    @property
    def exit_code(self) -> int:
        """Return what a shell expects of a program that a signal has ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the Trainer to save and stop once the wish is known to every process."""
        wanted = self.received
        if args.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            if state.global_step % self.sync_every:
                return control
            flag = torch.tensor(wanted, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            wanted = int(flag.item())
        if wanted:
            self.received = wanted
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control


@contextmanager
def graceful_interrupt(callback: StopOnInterrupt, *, terminate: bool = True) -> Iterator[None]:
    """Let the first Ctrl-C ask for a stop after the current step, and the second stop at once.

    SIGTERM (Slurm, a spot machine, ``docker stop``) asks for the same, as often as it comes: a launcher passes it on
    to processes that have it already, and whoever cannot wait sends SIGKILL.

    Args:
        callback: Is told which signal came.
        terminate: Whether SIGTERM is for us to take.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone; elsewhere Ctrl-C stays what it was.
        return

    pressed = False

    def handle(number: int, frame: types.FrameType | None) -> None:
        nonlocal pressed
        if number == signal.SIGTERM:
            if callback.received != number:
                logger.warning("SIGTERM: finishing this step and saving a checkpoint.")
        elif pressed:
            raise KeyboardInterrupt
        else:
            pressed = True
            logger.warning(
                "Interrupted: finishing this step and saving a checkpoint. Press Ctrl-C again to stop at once."
            )
        callback.received = max(callback.received, number)

    taken = (signal.SIGINT, signal.SIGTERM) if terminate else (signal.SIGINT,)
    previous = {number: signal.signal(number, handle) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping that survives a resume: the patience is counted from the log, where Transformers starts at 0."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the patience from the checkpoint's log; a run that had stopped early does not train further."""
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
