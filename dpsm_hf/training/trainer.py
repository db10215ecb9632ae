"""`DPSMTrainer` and `DPSMSeq2SeqTrainer`: the Hugging Face trainers, training with scheduled proper scoring rules."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import TrainOutput, default_compute_objective, has_length
from transformers.utils import logging

from ..evaluation.panel import reported_names
from ..models.language_model import vocabulary_size
from ..runtime.ranges import BACKWARD, active, calls_named, name_steps
from .arguments import DPSMArguments
from .callbacks import AlphaScheduleCallback, CalibrationCallback
from .checks import check_dataset_labels, check_feedback_metric, describe_non_finite
from .clock import seconds_trained, tells_time
from .component_gradients import ComponentGradientsMixin
from .evaluation import EvaluationMixin
from .model_card import add_objective_section, objective_section, with_equal_columns

logger = logging.get_logger(__name__)


class DPSMMixin(ComponentGradientsMixin, EvaluationMixin):
    """Replace the loss, the training log and the evaluation of a `Trainer`; everything else stays as it is.

    Put it before the trainer class: ``class MyTrainer(DPSMMixin, SomeTrainer)``.

    - Training: one denominator, the number of scored tokens of the whole optimizer step over all processes, so the
      gradient is the same at any split of the batch into accumulation steps and processes.
    - alpha is a function of ``state.global_step``, ``state.max_steps`` and ``state.log_history`` alone: resuming is
      exact.
    - Evaluation keeps sufficient statistics, never logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._train_started: float | None = None
        self._seconds_before = 0.0
        self._tally_started = 0.0
        self._batch_of_step = (-1, 0)
        if isinstance(self.args, DPSMArguments):
            for kind in (AlphaScheduleCallback, CalibrationCallback):
                if not any(isinstance(callback, kind) for callback in self.callback_handler.callbacks):
                    self.add_callback(kind())
        for callback in self._calibration_callbacks():
            callback.stop_listening()

    # ---- training step ---------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch and stop with its place if its loss is not finite.

        Raises:
            FloatingPointError: naming the step, the micro-batch and the token, before the optimizer uses the gradient.
                With ``logging_nan_inf_filter=False`` (no waiting for the device) the next log raises instead.
        """
        self._scaler = None  # fused optimizers write without raising the version of what they write to
        step, batch = self._batch_of_step
        self._batch_of_step = (self.state.global_step, batch + 1 if step == self.state.global_step else 1)
        if self._batch_of_step[1] == 1 and self._components_due(inputs):
            with self._evaluating():  # the training clock stands still
                self._measure_components(inputs)
        if active():
            name_steps(self.optimizer)
            with calls_named(self.accelerator, "backward", BACKWARD):
                loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        # the loop that called us waits for this very number, so looking at it here costs nothing
        if self.args.logging_nan_inf_filter and not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(self._describe_non_finite(float(loss.mean())))
        return loss

    def _describe_non_finite(self, loss: float) -> str:
        place = f"optimizer step {self.state.global_step + 1}, micro-batch {self._batch_of_step[1]}"
        scores, targets = self._last_batch or (None, None)
        return describe_non_finite(loss, place, scores, targets, vocabulary_size(self.model))

    # ---- training log ----------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does, after looking at the labels and the schedule for errors."""
        if self.train_dataset is not None:
            if has_length(self.train_dataset) and len(self.train_dataset) == 0:  # type: ignore[arg-type]
                raise ValueError(
                    "train_dataset is empty: there is nothing to train on. Look at its split and filters."
                )
            check_dataset_labels(self.train_dataset, vocabulary_size(self.model), "train_dataset")
        if self.compute_metrics is None:
            check_feedback_metric(self.dpsm, self.eval_dataset)
        self._tally.reset()
        self._fused = None  # it would keep a model alive that model_init is about to replace
        self._train_started = None
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch as `Trainer` does, unless the checkpoint that was loaded has nothing left to train.

        Transformers 5.23 looks for the end of training after a step only: resumed from its last checkpoint within an
        epoch, a finished run would train one step more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint as `Trainer` does, with the training clock in its log."""
        step, history = self.state.global_step, self.state.log_history
        if not any(entry.get("step") == step and tells_time(entry) for entry in history):
            entry: dict[str, Any] = {"train_seconds": self._train_seconds(), "step": step}
            history.append(entry)
        super()._save_checkpoint(*args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Search as `Trainer.hyperparameter_search` does; the default objective is blind to the metrics DPSM adds."""
        if len(args) < 2 and kwargs.get("compute_objective") is None:
            kwargs["compute_objective"] = _default_objective
        return super().hyperparameter_search(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does; training entries also get token means over all processes, and alpha."""
        if "loss" in logs:
            means, tokens = self._tally.drain(self.args.device)
            if any(value != value for value in means.values()):
                raise FloatingPointError(self._describe_non_finite(float("nan")))
            if self._alpha is not None:
                logs["alpha"] = self._alpha
            logs.update(means)
            logs.update(self._component_norms)
            self._component_norms.clear()
            seconds = self._train_seconds()
            if tokens and seconds > self._tally_started:
                logs["tokens_per_second"] = tokens / (seconds - self._tally_started)
                logs["train_seconds"] = seconds
            self._tally_started = seconds
        elif "train_runtime" in logs:  # the summary at the end
            logs["train_seconds"] = self._train_seconds()
        super().log(logs, start_time)

    def _train_seconds(self) -> float:
        """Return the wall-clock seconds of training up to now, evaluation not counted, resumed parts added up."""
        if self._train_started is None:
            return seconds_trained(self.state.log_history) or 0.0
        now = time.perf_counter() if self._evaluating_since is None else self._evaluating_since
        return self._seconds_before + now - self._train_started - self._seconds_evaluating

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of one optimizer step; the clock of the log starts with the first."""
        if self._train_started is None:
            self._seconds_before = self._tally_started = self._train_seconds()
            self._train_started, self._seconds_evaluating = time.perf_counter(), 0.0
        return super().get_batch_samples(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card as `Trainer` does, with a section on the training objective and calibration."""
        history, self.state.log_history = self.state.log_history, with_equal_columns(self.state.log_history)
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.state.log_history = history
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and card.exists():
            section = objective_section(self.dpsm, self.state.max_steps, self.state.log_history)
            add_objective_section(card, section)


def _default_objective(metrics: dict[str, float]) -> float:
    # Transformers' default adds up whatever is no loss and no speed: perplexity and a count of tokens, say
    added = tuple(f"_{name}" for name in (*reported_names(), "train_seconds"))
    return default_compute_objective({key: value for key, value in metrics.items() if not key.endswith(added)})


class DPSMTrainer(DPSMMixin, Trainer):
    """A `Trainer` that trains with Dynamic Proper-Score Mixing; takes the arguments of `Trainer`.

    Example::

        trainer = DPSMTrainer(model=model, args=DPSMConfig(output_dir="out"), train_dataset=train, eval_dataset=dev)
        trainer.train()
    """


class DPSMSeq2SeqTrainer(DPSMMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that trains with Dynamic Proper-Score Mixing; takes the arguments of `Seq2SeqTrainer`."""
