"""`DPSMTrainer` and `DPSMSeq2SeqTrainer`: the Hugging Face trainers, training with scheduled proper scoring rules."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, default_compute_objective, has_length
from transformers.utils import logging

from .arguments import DPSMArguments
from .calibration import METRICS, TokenCalibration
from .callbacks import AlphaScheduleCallback, CalibrationCallback
from .checks import check_dataset_labels, check_feedback_metric, describe_non_finite
from .distributed import sum_over_processes
from .evaluation import add_batch
from .losses import TokenScores
from .model_card import add_objective_section, objective_section
from .models import vocabulary_size
from .training_loss import TrainingLossMixin

logger = logging.get_logger(__name__)


class DPSMMixin(TrainingLossMixin):
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
        self._tally_started = 0.0
        self._seconds_evaluating = 0.0
        self._batch_of_step = (-1, 0)
        #: What the last evaluation saw, over all processes.
        self.calibration: TokenCalibration | None = None
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
        step, batch = self._batch_of_step
        self._batch_of_step = (self.state.global_step, batch + 1 if step == self.state.global_step else 1)
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
        self._seconds_evaluating = 0.0
        return super().train(*args, **kwargs)

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
            seconds = self._train_seconds()
            if tokens and seconds > self._tally_started:
                logs["tokens_per_second"] = tokens / (seconds - self._tally_started)
                logs["train_seconds"] = seconds
            self._tally_started = seconds
        super().log(logs, start_time)

    def _train_seconds(self) -> float:
        """Return the wall-clock seconds since the first batch of this `train()`, evaluation not counted."""
        if self._train_started is None:
            return 0.0
        return time.perf_counter() - self._train_started - self._seconds_evaluating

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of one optimizer step; the clock of the log starts with the first."""
        if self._train_started is None:
            self._train_started, self._tally_started = time.perf_counter(), 0.0
        return super().get_batch_samples(*args, **kwargs)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Predict as the trainer does and add the batch's tokens to the calibration statistics."""
        self._take_evaluated()
        # Seq2SeqTrainer calls the model itself after generating; hand it one whose loss is ours
        generates = (
            isinstance(self, Seq2SeqTrainer)
            and bool(getattr(self.args, "predict_with_generate", False))
            and not prediction_loss_only
        )
        self._logits_unused = generates or prediction_loss_only
        smoother = self.label_smoother
        try:
            target = self._scored_model(model, smoother) if generates else model
            if generates:
                self.label_smoother = None  # it would smooth the loss a second time, from logits that are not there
            result = super().prediction_step(target, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)  # type: ignore[arg-type]
        finally:
            self.label_smoother = smoother
            self._logits_unused = False
        scores = self._take_evaluated()
        if scores is not None and self.calibration is not None:
            try:
                add_batch(self.calibration, scores, inputs["labels"].shape[0])
            except FloatingPointError as error:
                raise FloatingPointError(f"at optimizer step {self.state.global_step}: {error}") from None
        return result

    def _take_evaluated(self) -> TokenScores | None:
        scores, self._evaluated = self._evaluated, None
        return scores

    def _scored_model(self, model: nn.Module, smoother: Any) -> Any:
        def call(**batch: Any) -> dict[str, Any]:
            count = self._get_num_items_in_batch([batch], self.args.device)
            self.label_smoother = smoother
            try:
                loss, _ = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=count)
            finally:
                self.label_smoother = None
            return {"loss": loss}

        return call

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as the trainer does and merge the token metrics, prefixed, into the output's metrics.

        Raises:
            ValueError: if the data set is empty.
        """
        dataset = getattr(dataloader, "dataset", None)
        if dataset is not None and has_length(dataset) and len(dataset) == 0:
            raise ValueError(f"the data set for {description.lower()} ({metric_key_prefix!r}) is empty.")
        # Seq2SeqTrainer gathers the samples that fill up the last batch along with the others, and scores them twice
        self.gather_function = self.accelerator.gather_for_metrics
        dispatch = getattr(self.args.accelerator_config, "dispatch_batches", None)
        if dispatch is False and self.accelerator.num_processes > 1 and not has_length(dataset):
            logger.warning(
                "dispatch_batches=False fills up the last batches of an iterable data set with samples that cannot be "
                "told from the others: some tokens are evaluated twice. Leave dispatch_batches at its default."
            )
        started, train_seconds = time.perf_counter(), self._train_seconds()
        self.calibration = TokenCalibration()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self.calibration = self.calibration.to(self.args.device).reduce(sum_over_processes)
        if self.calibration.tokens:
            metrics: dict[str, Any] = {
                f"{metric_key_prefix}_{name}": value for name, value in self.calibration.compute().items()
            }
            if self.is_in_train:
                metrics[f"{metric_key_prefix}_train_seconds"] = train_seconds
            # a metric of the user's own compute_metrics keeps its name
            assert output.metrics is not None  # the loop always returns a dict
            output.metrics.update({k: v for k, v in metrics.items() if k not in output.metrics})
            for callback in self._calibration_callbacks():
                callback.receive(self.calibration, metric_key_prefix, self._tensorboard_writer())
        self._seconds_evaluating += time.perf_counter() - started
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card as `Trainer` does, with a section on the training objective and calibration."""
        super().create_model_card(*args, **kwargs)
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and card.exists():
            section = objective_section(self.dpsm, self.state.max_steps, self.state.log_history)
            add_objective_section(card, section)

    def _calibration_callbacks(self) -> list[CalibrationCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, CalibrationCallback)]

    def _tensorboard_writer(self) -> Any:
        writers = (getattr(callback, "tb_writer", None) for callback in self.callback_handler.callbacks)
        return next((writer for writer in writers if writer is not None), None)


def _default_objective(metrics: dict[str, float]) -> float:
    # Transformers' default adds up whatever is no loss and no speed: perplexity and a count of tokens, say
    added = tuple(f"_{name}" for name in (*METRICS, "train_seconds"))
    return default_compute_objective({key: value for key, value in metrics.items() if not key.endswith(added)})


class DPSMTrainer(DPSMMixin, Trainer):
    """A `Trainer` that trains with Dynamic Proper-Score Mixing; takes the arguments of `Trainer`.

    Example::

        trainer = DPSMTrainer(model=model, args=DPSMConfig(output_dir="out"), train_dataset=train, eval_dataset=dev)
        trainer.train()
    """


class DPSMSeq2SeqTrainer(DPSMMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that trains with Dynamic Proper-Score Mixing; takes the arguments of `Seq2SeqTrainer`."""
