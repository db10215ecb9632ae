"""`DPSMTrainer` and `DPSMSeq2SeqTrainer`: the Hugging Face trainers, training with scheduled proper scoring rules."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, default_compute_objective, has_length
from transformers.utils import logging

from .arguments import DPSMArguments, dpsm_arguments
from .calibration import METRICS, TokenCalibration
from .callbacks import AlphaScheduleCallback, CalibrationCallback
from .checks import check_dataset_labels, check_feedback_metric, describe_non_finite
from .distributed import sum_over_processes
from .evaluation import add_batch
from .losses import IGNORE_INDEX, TokenScores, score_tokens
from .model_card import add_objective_section, objective_section
from .models import (
    Alignment,
    align_targets,
    inputs_without_labels,
    label_alignment,
    probe_alignment,
    router_loss,
    vocabulary_size,
)
from .tally import TokenTally

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class DPSMMixin(_Base):
    """Replace the loss, the training log and the evaluation of a `Trainer`; everything else stays as it is.

    Put it before the trainer class: ``class MyTrainer(DPSMMixin, SomeTrainer)``.

    - Training: one denominator, the number of scored tokens of the whole optimizer step over all processes, so the
      gradient is the same at any split of the batch into accumulation steps and processes.
    - alpha is a function of ``state.global_step``, ``state.max_steps`` and ``state.log_history`` alone: resuming is
      exact.
    - Evaluation keeps sufficient statistics, never logits.
    """

    model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plain_arguments = None if isinstance(self.args, DPSMArguments) else dpsm_arguments(self.args)
        self._alignment: Alignment | None = label_alignment(self.model)
        self._tally = TokenTally()
        self._alpha: float | None = None
        self._last_batch: tuple[TokenScores, Tensor] | None = None
        self._evaluated: TokenScores | None = None
        self._train_started: float | None = None
        self._tally_started = 0.0
        self._seconds_evaluating = 0.0
        self._batch_of_step = (-1, 0)
        #: What the last evaluation saw, over all processes.
        self.calibration: TokenCalibration | None = None
        self._refuse_other_losses()
        if self._owns_loss():
            # the denominator is ours whether or not the model's forward has a place for it
            self.model_accepts_loss_kwargs = True
            self.loss_is_scaled_for_ga = True
        if isinstance(self.args, DPSMArguments):
            for kind in (AlphaScheduleCallback, CalibrationCallback):
                if not any(isinstance(callback, kind) for callback in self.callback_handler.callbacks):
                    self.add_callback(kind())
        for callback in self._calibration_callbacks():
            callback.stop_listening()

    # ---- what is trained -------------------------------------------------------------------------------------------

    @property
    def dpsm(self) -> DPSMArguments:
        """Return the DPSM fields in force: of the arguments, or the defaults for plain TrainingArguments."""
        return self.args if isinstance(self.args, DPSMArguments) else self._plain_arguments  # type: ignore[return-value]

    @property
    def alpha(self) -> float | None:
        """Return the Brier weight of the next optimizer step; None if the loss is not a mix."""
        if self.dpsm.loss_type != "dpsm":
            return None
        return self.dpsm.schedule()(self.state.global_step, self.state.max_steps, self.state.log_history)

    def _owns_loss(self) -> bool:
        """Return whether the loss is computed here: always, but for plain CE on a model whose logits are unknown."""
        return self.compute_loss_func is None and (self._alignment is not None or self.dpsm.loss_type != "ce")

    def _refuse_other_losses(self) -> None:
        if self.dpsm.loss_type == "ce":
            return
        if self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func would replace loss_type={self.dpsm.loss_type!r}, which could then have no effect; "
                "leave one of them out (loss_type='ce' honours compute_loss_func as Trainer does)."
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and parallelism.sp_backend == "deepspeed" and parallelism.sp_enabled:
            raise ValueError(
                f"loss_type={self.dpsm.loss_type!r} does not run under DeepSpeed sequence parallelism, which computes "
                "the loss itself; use loss_type='ce' or another parallelism."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch: the objective while training, cross-entropy while evaluating.

        Args:
            model: possibly wrapped; it is called without labels, so that it computes no loss of its own.
            inputs: a batch with ``labels`` (``[B, T]``, -100 is not scored), optionally ``shift_labels``.
            return_outputs: return ``(loss, outputs)``.
            num_items_in_batch: tokens of the whole optimizer step over all processes, the denominator; None divides
                by the scored tokens of this batch.
        """
        if "labels" not in inputs and model.training and self.dpsm.loss_type != "ce":
            raise ValueError(
                f"the batch has no 'labels', only {', '.join(inputs)}, so loss_type={self.dpsm.loss_type!r} cannot be "
                "computed; let the data collator name them so, or use loss_type='ce' for the model's own loss."
            )
        if "labels" not in inputs or not self._owns_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, shift_labels = inputs["labels"], inputs.get("shift_labels")
        if self._alignment is None and bool((labels != IGNORE_INDEX).any()):
            self._alignment = probe_alignment(self.model, inputs)
        alignment = self._alignment or "aligned"  # unknown only as long as nothing was scored
        outputs = model(**inputs_without_labels(self.model, inputs))
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        targets = align_targets(labels, logits, alignment) if shift_labels is None else shift_labels

        training = model.training
        plain_ce = not training or (self.dpsm.loss_type == "ce" and not self.dpsm.z_loss)
        if training:
            self._alpha = self.alpha
        objective = None if plain_ce else self.dpsm.objective(self._alpha)
        # labels are checked here, before cross-entropy would index with a wrong one
        scores = score_tokens(logits if objective else logits.detach(), targets, objective)
        denominator = self._denominator(scores, num_items_in_batch)
        if scores.loss is not None:
            loss = scores.loss.sum() / denominator
        else:
            shifted = alignment == "shifted" and shift_labels is None and labels.shape == targets.shape
            loss = self._cross_entropy(logits, labels, None if shifted else targets, denominator)
        auxiliary = router_loss(self.model, outputs) if training else None
        if auxiliary is not None:
            # weighted by its share of the step's tokens, it too is independent of the split into micro-batches
            loss = loss + auxiliary.to(loss.device) * scores.scored.sum() / denominator
        if num_items_in_batch is not None and self.args.average_tokens_across_devices and self.args.n_gpu <= 1:
            # data parallelism averages gradients over processes, but the denominator is already global
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())

        self._last_batch = (scores, targets)
        if training:
            self._tally.add(scores)
        else:
            self._evaluated = scores
        if isinstance(outputs, tuple):
            outputs = (loss, *outputs)
        return (loss, outputs) if return_outputs else loss

    def _denominator(self, scores: TokenScores, num_items_in_batch: Tensor | int | None) -> Tensor | int:
        if num_items_in_batch is None:
            return scores.scored.sum().clamp_min(1)
        if not isinstance(num_items_in_batch, Tensor):
            return max(1, num_items_in_batch)
        if self.args.n_gpu > 1:  # DataParallel: one entry a replica; the logits are gathered, so one number is right
            replicas = 1 if self.args.average_tokens_across_devices else self.args.n_gpu
            num_items_in_batch = num_items_in_batch.reshape(-1)[0] * replicas
        # a step whose labels are all ignored has a loss of 0 with a graph, not 0 / 0
        return num_items_in_batch.clamp_min(1).to(scores.nll.device)

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor, targets: Tensor | None, denominator: Tensor | int
    ) -> Tensor:
        """Return cross-entropy by the very operations of Trainer and its models, so that it is equal bit for bit.

        ``targets`` are the labels aligned with the logits, or None where ``labels`` are, shifted by one.
        """
        if self.label_smoother is not None:
            shift = targets is None
            labels = labels if targets is None else targets
            return self.label_smoother({"logits": logits}, labels, shift_labels=shift, num_items_in_batch=denominator)
        if targets is None:
            targets = align_targets(labels, logits, "shifted")
        flat_logits = logits.float().reshape(-1, logits.shape[-1])
        total = F.cross_entropy(flat_logits, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / denominator

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
        generates = isinstance(self, Seq2SeqTrainer) and getattr(self.args, "predict_with_generate", False)
        target = self._scored_model(model) if generates and not prediction_loss_only else model
        result = super().prediction_step(target, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)  # type: ignore[arg-type]
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

    def _scored_model(self, model: nn.Module) -> Any:
        def call(**batch: Any) -> dict[str, Any]:
            count = self._get_num_items_in_batch([batch], self.args.device)
            loss, outputs = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=count)
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
            return {"loss": loss, "logits": logits}

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
