"""`DPSMTrainer` and `DPSMSeq2SeqTrainer`: the Hugging Face trainers, training with scheduled proper scoring rules."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother, find_batch_size
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    PredictionOutput,
    TrainOutput,
    default_compute_objective,
    has_length,
)
from transformers.utils import logging

from ..calibration import TokenCalibration
from ..evaluation.evaluation import Collector, Evaluation, MomentPass, TokenBytes
from ..evaluation.forced_tokens import forced_token_ids
from ..evaluation.panel import EvaluationPanel, names_in, reported_names
from ..evaluation.temperature import FittedTemperature, TemperatureScaler
from ..evaluation.temperature_search import Sums
from ..evaluation.token_frequency import TrainingFrequency
from ..models.language_model import core_model, vocabulary_size
from ..rules.schedules import KnobSchedule
from ..rules.scoring_rules import Objective
from ..runtime.ranges import BACKWARD, FORWARD, active, calls_named, name_steps, ranged
from .arguments import DPSMArguments, dpsm_arguments
from .callbacks import AlphaScheduleCallback, CalibrationCallback
from .checks import (
    CALIBRATION_PREFIX,
    check_batch_labels,
    check_best_metric,
    check_calibration_dataset,
    check_feedback_metric,
    check_feedback_scale,
    check_other_losses,
    check_schedules,
    check_train_dataset,
    integer_labels,
    reads_calibration,
)
from .clock import TrainingClock
from .component_gradients import active_terms, check_component_norms, component_norms, next_step_is_logged
from .corruption import Corruption, Corruptor
from .evaluation_report import EvaluationReport, gathered_rows
from .finite import FiniteNumbers, engine_steps
from .frozen_states import FrozenStates
from .gradient_accumulation import LossAccumulation
from .model_card import CardFacts, finish_card, last_evaluated
from .resuming import CheckpointKeeper
from .run_facts import RunFacts
from .scorer import BatchRule, ScoredBatch, ScoredLoss, Scorer, SmoothedOnce, with_added_terms, with_loss
from .training_log import TrainingLog

logger = logging.get_logger(__name__)

_LABELS = ("labels", "shift_labels")
_Callback = TypeVar("_Callback", bound=TrainerCallback)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class DPSMMixin(_Base):
    """Replace the loss, the training log and the evaluation of a `Trainer`; everything else stays as it is.

    Put it before the trainer class: ``class MyTrainer(DPSMMixin, SomeTrainer)``.

    - Training: one denominator, the number of scored tokens of the whole optimizer step over all processes, so the
      gradient is the same at any split of the batch into accumulation steps and processes.
    - alpha, and every other number of the objective that has a schedule, is a function of ``state.global_step``,
      ``state.max_steps`` and ``state.log_history`` alone: resuming is exact.
    - Evaluation keeps sufficient statistics, never logits.

    Args:
        calibration_dataset: where a temperature is fitted, and what a "feedback" schedule can be moved by
            (``eval_calibration_...``); neither trained nor tested on.
        corruption: of the training targets; None trains on the data as they are.
    """

    model: nn.Module

    #: The class of arguments that a trainer given plain ones names.
    config_name = "DPSMConfig"
    #: Whether the entropy of training tokens is computed too, for `batch_scored`; it takes one more read of each row.
    entropy_in_training = False

    def __init__(
        self, *args: Any, calibration_dataset: Any = None, corruption: Corruption | None = None, **kwargs: Any
    ) -> None:
        _keep_liger_out_of_the_loss(kwargs.get("args", args[1] if len(args) > 1 else None))
        self._corruptor = Corruptor(corruption or Corruption())
        self._clock = TrainingClock()
        self._finite = FiniteNumbers()
        self._checkpoints = CheckpointKeeper()
        super().__init__(*args, **kwargs)
        self._corruptor.check(self)
        self._plain_arguments = None if isinstance(self.args, DPSMArguments) else dpsm_arguments(self.args)
        takes_count = self._model_takes_count = self.model_accepts_loss_kwargs
        self._accumulation = LossAccumulation(takes_count)
        self._scorer = Scorer(
            self.model, self.args, self.dpsm, takes_count=takes_count, entropy_in_training=self.entropy_in_training
        )
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps  # `train` sets it anew
        self._training_log = TrainingLog()
        #: What the last evaluation saw, over all processes.
        self.panel: EvaluationPanel | None = None
        self._evaluation: Collector | None = None  # the one in progress
        self._batch_rows = 0  # of the batch that was evaluated last
        self._evaluation_report = EvaluationReport()
        self._announcement_due = False  # what is trained, where that is not known before the first micro-batch
        self._temperature = FittedTemperature()
        self._token_bytes = TokenBytes()
        self._frequency = TrainingFrequency()
        self._loaded_set: Any = None
        self._calibration_dataset = self.prepared_for_evaluation(calibration_dataset)
        self._check_arguments()
        if type(self.label_smoother) is LabelSmoother:
            self.label_smoother = SmoothedOnce(self.label_smoother.epsilon, self.label_smoother.ignore_index)
        if self._owns_loss():
            # the denominator is ours whether or not the model's forward has a place for it
            self.model_accepts_loss_kwargs = True
        for kind in (AlphaScheduleCallback, CalibrationCallback):
            if not self._callbacks(kind):
                self.add_callback(kind())
        for announcer in self._callbacks(AlphaScheduleCallback):
            announcer.waits = _overrides(type(self), "compute_loss")
            announcer.config_name = self.config_name
        for callback in self._callbacks(CalibrationCallback):
            callback.stop_listening()

    def _check_arguments(self) -> None:
        dpsm, dataset = self.dpsm, self._calibration_dataset
        check_other_losses(self, dpsm)
        check_best_metric(self.args, self.eval_dataset, own_metrics=self.compute_metrics is not None)
        if dataset is not None:
            check_calibration_dataset(dataset, self.train_dataset, self.eval_dataset)
        elif isinstance(self.args, DPSMArguments) and dpsm.fit_temperature:
            raise ValueError(
                "fit_temperature=True needs data to fit on: pass calibration_dataset=, a split that is neither "
                "trained nor tested on."
            )
        if dpsm.log_component_grad_norms:
            check_component_norms(self, owns_loss=self._owns_loss())

    @property
    def dpsm(self) -> DPSMArguments:
        """Return the DPSM fields in force: of the arguments, or the defaults for plain TrainingArguments."""
        return self.args if isinstance(self.args, DPSMArguments) else self._plain_arguments  # type: ignore[return-value]

    @property
    def alpha(self) -> float | None:
        """Return the Brier weight of the next optimizer step; None if the loss is not a mix.

        Before training it is that of the first step.
        """
        if self.dpsm.scoring_rule != "dpsm":
            return None
        return self._value_of(self.dpsm.schedule())

    @property
    def knobs(self) -> dict[str, float]:
        """Return the scheduled numbers of the objective at the next optimizer step, by name: alpha of a mix, others.

        Before training they are those of the first step.
        """
        found = {name: self._value_of(s) for name, s in self.dpsm.schedules().items() if name != "alpha"}
        alpha = self.alpha
        return found if alpha is None else {"alpha": alpha, **found}

    def _value_of(self, schedule: KnobSchedule) -> float:
        state = self.state
        # of an unknown length any will do: at step 0 the shares of a schedule are all still to come
        return schedule(state.global_step, state.max_steps or self._planned_steps(), state.log_history)

    def _planned_steps(self) -> int:
        """Return about how many optimizer steps `train` would take; a large number where the data do not tell."""
        args, data = self.args, self.train_dataset
        if args.max_steps > 0:
            return args.max_steps
        if data is None or not has_length(data):
            return 10**9
        epoch = math.ceil(len(data) / self.get_total_train_batch_size(args))  # type: ignore[arg-type]
        return max(1, math.ceil(args.num_train_epochs * epoch))

    @property
    def corruption(self) -> Corruption:
        """Return what of the training data is corrupted."""
        return self._corruptor.what

    @corruption.setter
    def corruption(self, what: Corruption) -> None:
        self._corruptor = Corruptor(what)
        self._corruptor.check(self)

    @property
    def frozen_states(self) -> FrozenStates | None:
        """Return the frozen lower layers of the model with what is kept of their outputs; None where none are."""
        return self._scorer.frozen_states

    @frozen_states.setter
    def frozen_states(self, states: FrozenStates | None) -> None:
        if states is not None:
            states.check(self)
        self._scorer.frozen_states = states

    def _current_scorer(self) -> Scorer:
        """Return the scorer with the arguments of now, which may have been replaced since it was made."""
        self._scorer.args, self._scorer.dpsm = self.args, self.dpsm
        return self._scorer

    def _owns_loss(self) -> bool:
        """Return whether the loss is computed here: always, but for clean CE on a model whose logits are unknown."""
        known = (
            self._scorer.alignment is not None or not self.dpsm.is_cross_entropy() or self.corruption.flips is not None
        )
        return self.compute_loss_func is None and known

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:  # type: ignore[override]
        """Return whether the loss of the micro-batch in progress is divided by the tokens of its whole step already.

        `Trainer` asks after every `compute_loss`, and divides by the accumulation steps where it is not. A class that
        says so itself, as Transformers documents it, is believed.
        """
        if self._accumulation.user_value is None and not self._owns_loss():
            return super().loss_is_scaled_for_ga
        return self._accumulation.loss_is_scaled

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._accumulation.user_value = value

    # ---- the loss of a batch ---------------------------------------------------------------------------------------

    @ranged(FORWARD)
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
        inputs = _without_missing_labels(inputs)
        if model.training:
            check_batch_labels(inputs, self.dpsm, flips=self.corruption.flips is not None)
        if "labels" not in inputs or not self._owns_loss():
            given = {key: value for key, value in inputs.items() if key not in _LABELS}
            with self._scorer.below(model, given):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = self._with_integer_labels(inputs)
        training, evaluation, divided = model.training, self._evaluation, False
        if training:
            num_items_in_batch, divided = self._accumulation.denominator_for(num_items_in_batch)
        batch = self._current_scorer().batch(self.model, inputs, num_items_in_batch)
        if training:
            self._training_log.knobs = self.knobs
            batch = self._corruptor.flipped(batch, self.state.global_step)
        logits_needed = return_outputs and (evaluation is None or evaluation.logits_needed)
        extra = None if training or evaluation is None else evaluation.extra
        scored = self._scorer.score(model, batch, self._rule(training), logits_needed=logits_needed, extra=extra)
        loss = with_added_terms(scored, batch) if training else scored.loss
        outputs = with_loss(scored, loss) if return_outputs else None
        if num_items_in_batch is not None and self.args.average_tokens_across_devices and self.args.n_gpu <= 1:
            # data parallelism averages gradients over processes, but the denominator is already global
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if divided:
            loss = loss * self.current_gradient_accumulation_steps
        if training:
            self._training_log.add(scored.scores, scored.targets)
        elif evaluation is not None:
            evaluation.receive(scored.scores, scored.targets)
        if training or isinstance(evaluation, Evaluation):
            self.batch_scored(scored, inputs)
        return (loss, outputs) if return_outputs else loss

    def _with_integer_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: integer_labels(v, self.model) if k in _LABELS and v is not None else v for k, v in inputs.items()}

    def batch_scored(self, scored: ScoredBatch, inputs: dict[str, Any]) -> None:
        """Do nothing: for trainers with metrics of their own, called with each batch of a training or an evaluation.

        Args:
            scored: the batch's tokens; holds the graph of the loss, so nothing of it is to be kept without detaching.
            inputs: of the model, with labels, on the device.
        """

    def _rule(self, training: bool) -> BatchRule:
        """Return the rule of a batch; an evaluation's loss is cross-entropy, smoothed where `Trainer` smooths it."""
        smoother: Any = self.label_smoother
        if training:
            objective = self.dpsm.objective(knobs=self._training_log.knobs)
            return BatchRule(objective, self.dpsm.is_cross_entropy(), smoother)
        return BatchRule(
            Objective("ce", label_smoothing=0.0 if smoother is None else smoother.epsilon), True, smoother
        )

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch and stop with its place if its loss is not finite.

        Raises:
            FloatingPointError: naming the step, the micro-batch and the token, before the optimizer uses the gradient.
                With ``logging_nan_inf_filter=False`` (no waiting for the device) the next log raises instead.
        """
        self._temperature.forget()  # fused optimizers write without raising the version of what they write to
        begins = self._training_log.begin_micro_batch(self.state.global_step)
        # an alignment that is unknown, or a batch without labels, is for the step to find out or to refuse
        measurable = self._scorer.alignment is not None and "labels" in inputs
        if self.dpsm.log_component_grad_norms and begins and measurable and next_step_is_logged(self.args, self.state):
            with self._clock.evaluating():
                self._measure_components(inputs)
        overridden = _overrides(type(self), "compute_loss")
        named = calls_named(self.accelerator, "backward", BACKWARD) if active() else nullcontext()
        if active():
            name_steps(self.optimizer)
        with self._accumulation.micro_batch(num_items_in_batch, overridden=overridden) as count, named:
            loss = super().training_step(model, inputs, count)
        if self._announcement_due:  # now it is known whether a subclass's `compute_loss` calls this class's
            self._announcement_due = False
            other = None if self._accumulation.scored else f"{type(self).__name__}.compute_loss"
            for announcer in self._callbacks(AlphaScheduleCallback):
                announcer.announce(self.args, self.state, other)
        # the loop that called us waits for this very number, so looking at it here costs nothing
        if self.args.logging_nan_inf_filter and not bool(torch.isfinite(loss).all()):
            step, vocabulary = self.state.global_step, vocabulary_size(self.model)
            raise self._training_log.non_finite(float(loss.mean()), step, vocabulary, updated=engine_steps(self))
        return loss

    def _measure_components(self, inputs: dict[str, Any]) -> None:
        """Measure the gradient norms of the objective's parts on a micro-batch, for the log."""
        prepared = self._prepare_inputs(dict(inputs))
        count = self._get_num_items_in_batch([prepared], self.args.device)  # as the training step counts
        batch = self._current_scorer().batch(self.model, prepared, count)
        batch = self._corruptor.flipped(batch, self.state.global_step, counted=False)
        scaler = getattr(self.accelerator, "scaler", None)

        def loss_under(rule: Objective) -> Tensor:
            with self.compute_loss_context_manager():
                return self._scorer.score(self.model, batch, BatchRule(rule)).loss

        self.model.train()
        self._training_log.component_norms = component_norms(
            loss_under,
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            device=prepared["labels"].device,
            # like the step's gradient: summed over processes where the count is everybody's, else averaged
            shares=1 if self.args.average_tokens_across_devices else self.accelerator.num_processes,
            scale=1.0 if scaler is None else float(scaler.get_scale()),
            terms=active_terms(self._rule(training=True).objective),
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does, after looking at the labels and the schedule for errors.

        With corruption the metrics get the counts of what was corrupted, as ``train_...``; with frozen layers whose
        outputs are kept, the seconds that this took before training and its size, as ``train_frozen_cache_...``.
        """
        if self.train_dataset is not None:
            check_train_dataset(self.train_dataset, vocabulary_size(self.model))
        check_schedules(self.dpsm, self._planned_steps())
        if self.compute_metrics is None:
            check_feedback_metric(self.dpsm, self.eval_dataset, self.calibration_dataset)
        check_feedback_scale(self.dpsm, self.args)
        self._finite.forget()
        resume_from_checkpoint = self._checkpoints.settle(self, self.dpsm, resume_from_checkpoint)
        self._scorer.release()  # it would keep a model alive that model_init is about to replace
        self._forget_preparation_for_evaluation()
        if self._corruptor.active:
            self._corruptor.begin(resume_from_checkpoint, str(self.args.output_dir))
        kept = {} if self.frozen_states is None else self.frozen_states.prepare_training(self)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            for callback in self._callbacks(CalibrationCallback):
                callback.interrupted()
            raise
        output.metrics.update(kept)
        if self._corruptor.active:
            self._corruptor.gather(self.args.device)
            output.metrics.update({f"train_{name}": value for name, value in (self.corruption_record() or {}).items()})
        return output

    def _forget_preparation_for_evaluation(self) -> None:
        # Accelerate prepares a model only once: evaluated before, each process would train a model of its own
        parallel = self.accelerator.num_processes > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if parallel and self.model_wrapped is self.model:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # takes the autocast of its forward off
            self.model._is_accelerate_prepared = False  # type: ignore[assignment]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does, and forget an attempt before that ran out of memory (``auto_find_batch_size``)."""
        self._training_log.reset()
        self._clock.reset()
        self._announcement_due = _overrides(type(self), "compute_loss")
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch as `Trainer` does, unless the checkpoint that was loaded has nothing left to train.

        Transformers 5.23 looks for the end of training after a step only: resumed from its last checkpoint within an
        epoch, a finished run would train one step more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of one optimizer step; the training clock starts with the first.

        Where summaries are corrupted, they are swapped here between the step's pairs on all processes.
        """
        self._clock.start(self.state)
        batches, number = super().get_batch_samples(*args, **kwargs)
        if self._corruptor.swaps is None or not batches:
            return batches, number
        batches = self._corruptor.swapped(batches, self.state.global_step, self)
        # of all processes together the number stays, of one it may not
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Count the tokens of a step as `Trainer` does; for a model that takes no count, those that are scored."""
        first = batch_samples[0] if batch_samples else None
        if isinstance(first, Mapping) and not self._model_takes_count and self._owns_loss():
            if first.get("labels") is not None and first.get("shift_labels") is None:
                inputs = self._with_integer_labels(self._prepare_inputs(dict(first)))
                self._loss_shifts_labels = self._scorer.counts_shifted(self.model, inputs)
        return super()._get_num_items_in_batch(batch_samples, device)

    def corruption_record(self) -> dict[str, int] | None:
        """Return what was corrupted up to the last log, checkpoint or end of the training; None for clean training.

        Returns:
            ``target_tokens``, ``flipped_tokens`` and ``flip_steps`` (optimizer steps with flips) where targets are
            flipped, ``pairs`` and ``swapped_summaries`` where summaries are swapped; over all processes and, after a
            resume, all parts of the run. ``counted_from_step`` is there only if they begin later than at step 0.
        """
        return self._corruptor.record(self.state.global_step)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Search as `Trainer.hyperparameter_search` does; the default objective is blind to the metrics DPSM adds."""
        if len(args) < 2 and kwargs.get("compute_objective") is None:
            kwargs["compute_objective"] = _default_objective
        return super().hyperparameter_search(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does; training entries also get token means over all processes, and alpha.

        With corruption they also get how much was corrupted since the last one.
        """
        if "loss" in logs:
            vocabulary = vocabulary_size(self.model)
            entry, tokens = self._training_log.entry(self.args.device, self.state.global_step, vocabulary)
            logs.update(entry)
            seconds, since = self._clock.lap(self.state)
            if tokens and since > 0:
                logs["tokens_per_second"] = tokens / since
                logs["train_seconds"] = seconds
            if self._corruptor.active:
                logs.update(self._corruptor.entry(self.args.device))
        elif "train_runtime" in logs:  # the summary at the end
            logs["train_seconds"] = self._clock.seconds(self.state)
        if "loss" in logs or "train_runtime" in logs:  # the last one may be long past
            self._finite.check_past_gradients(self.state.global_step)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card: objective, calibration, use, and how to repeat it; metadata with the results.

        Takes what `Trainer.create_model_card` takes. The text of another trainer class is kept and gets a section.
        """
        history, self.state.log_history = self.state.log_history, []  # its table would have a column a metric
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.state.log_history = history
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and card.exists():
            given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            finish_card(card, self._card_facts(given))

    def _card_facts(self, given: Mapping[str, Any]) -> CardFacts:
        callback = next(iter(self._callbacks(CalibrationCallback)), None)
        records = {} if callback is None else callback.records
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        evaluated = last_evaluated(records, self.state.log_history, best)
        shown = next((r for p, r in records.items() if evaluated and p == evaluated.split), None)
        return CardFacts(
            self.args, self.dpsm, self.state.max_steps, self.accelerator.unwrap_model(self.model),
            self.processing_class is not None, "DPSMSeq2SeqTrainer" if isinstance(self, Seq2SeqTrainer) else
            "DPSMTrainer", evaluated,
            None if callback is None or shown is None else callback.picture_of(self.args, shown), given,
        )  # fmt: skip

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def run_facts(self) -> RunFacts:
        """Return what is written into checkpoints, and compared on going on from one."""
        return self._checkpoints.facts

    @run_facts.setter
    def run_facts(self, facts: RunFacts) -> None:
        self._checkpoints.facts = facts

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient as `Trainer` does, which asks for it right before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite.check_gradient(self, norm, model)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint as `Trainer` does, with clock, facts and counts of corruption, of finite weights."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._clock.save(self.state)
        if self._corruptor.active:
            self._corruptor.gather(self.args.device)
            if self.args.should_save:
                self._corruptor.save(folder)  # before the others: a checkpoint is complete with its trainer_state.json
        self._finite.check_before_saving(self)
        with self._checkpoints.saving(self, self.dpsm, folder):
            super()._save_checkpoint(model, trial)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as `Trainer` does, and seal a checkpoint once callbacks have written into it, too."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._checkpoints.seal(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `Trainer` does, unless a weight is not finite: a FloatingPointError names the first."""
        if not _internal_call:  # a checkpoint's were looked at
            self._finite.check_before_saving(self)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model as `Trainer` does, its arguments without the hub's token."""
        with self._checkpoints.writing_model(self.args, output_dir):
            super()._save(output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights as `Trainer` does, unless they are those of another model."""
        self._checkpoints.check_model(self, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their states as `Trainer` does, unless they are those of another kind."""
        with self._checkpoints.loading_optimizer(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state as `Trainer` does, unless it is something else."""
        with self._checkpoints.loading_random_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Find the place to go on from as `Trainer` does; in a stream that was read more than once, the right one."""
        found: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        return self._checkpoints.place_in_stream(self.args, checkpoint, num_train_epochs, found)

    # ---- evaluation of a batch -------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Predict as the trainer does and add the batch's tokens to the evaluation in progress."""
        inputs = _without_missing_labels(inputs)
        generates = self._predicts_with_generate() and not prediction_loss_only
        evaluation = self._evaluation or Collector()
        with self._collecting(evaluation, logits_needed=not (generates or prediction_loss_only)):
            called = self._scoring_model(model) if generates else model
            result = super().prediction_step(called, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        self._batch_rows = find_batch_size(inputs) or 0
        if (scored := evaluation.take()) is None:
            return result
        prepared = self._prepare_inputs(inputs) if evaluation.reads_inputs else inputs
        try:
            evaluation.add(*scored, prepared)
        except FloatingPointError as error:
            raise FloatingPointError(f"at optimizer step {self.state.global_step}: {error}") from None
        if generates and result[1] is not None and evaluation.generated is not None:
            options = gen_kwargs or getattr(self, "_gen_kwargs", {})
            given = {name: value for name, value in options.items() if value is not None}
            batch = evaluation.generated.batch(prepared, result[1], given)
            if batch is not None and (rescored := self._scores_of_generated(model, batch)) is not None:
                evaluation.generated.add(batch, prepared["labels"], rescored[0])
        return result

    def _predicts_with_generate(self) -> bool:
        return isinstance(self, Seq2SeqTrainer) and bool(getattr(self.args, "predict_with_generate", False))

    @contextmanager
    def _collecting(self, collector: Collector, *, logits_needed: bool = True) -> Iterator[None]:
        """Give the scores of evaluated batches to a collector, for the length of a context."""
        outer, self._evaluation = self._evaluation, collector  # an evaluation that this one may be part of
        # a class that wraps compute_loss may look at the outputs whatever the evaluation needs
        try:
            with collector.batch(logits_needed=logits_needed or _overrides(type(self), "compute_loss")):
                yield
        finally:
            self._evaluation = outer

    def _scoring_model(self, model: nn.Module) -> Any:
        """Return what `Seq2SeqTrainer` calls for the loss of a batch, after it has generated with ``self.model``."""

        def call(**batch: Any) -> ScoredLoss:
            count = self._get_num_items_in_batch([batch], self.args.device)
            loss, _ = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=count)
            return ScoredLoss(loss=loss)

        return call

    def _scores_of_generated(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Return the scores of generated tokens, taken as labels of the model's own; None if nothing was scored."""
        collector = Collector()
        with self._collecting(collector, logits_needed=False), torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, dict(batch), return_outputs=True)
        return collector.take()

    # ---- evaluation of a set ---------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the trainer does; the training clock stands still until the last file and picture is written."""
        with self._clock.evaluating():
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate within a training as `Trainer` does, after the calibration set where a schedule is moved by it."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if self.calibration_dataset is not None and "calibration" not in sets:
            if reads_calibration(self.dpsm):
                self.evaluate(self.calibration_dataset, metric_key_prefix=CALIBRATION_PREFIX)
        return super()._evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict as the trainer does, with the training clock standing still."""
        with self._clock.evaluating():
            return super().predict(*args, **kwargs)

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
        self.gather_function = self._gathered_rows
        dispatch = getattr(self.args.accelerator_config, "dispatch_batches", None)
        if dispatch is False and self.accelerator.num_processes > 1 and not has_length(dataset):
            logger.warning(
                "dispatch_batches=False fills up the last batches of an iterable data set with samples that cannot be "
                "told from the others: some tokens are evaluated twice. Leave dispatch_batches at its default."
            )
        if self.dpsm.fit_temperature and not self.is_in_train:
            self._temperature.fit_if_possible(self.model, self.fit_temperature)
        self.panel = None  # two would be held otherwise
        evaluation = self._new_evaluation(dataset)
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        with self._collecting(evaluation):
            output = super().evaluation_loop(*arguments)
            self.panel = evaluation.finish(self.args.device)
        smoothed = bool(self.args.label_smoothing_factor)
        seconds = self._clock.seconds(self.state) if self.is_in_train else None
        shown = self._shown_metrics(self.panel)
        if self._evaluation_report.add(
            shown, self.panel.samples, output, metric_key_prefix, seconds=seconds, smoothed=smoothed
        ):
            writers = (getattr(callback, "tb_writer", None) for callback in self.callback_handler.callbacks)
            tensorboard = next((writer for writer in writers if writer is not None), None)
            for writing in self._callbacks(CalibrationCallback):
                writing.receive(self.panel, metric_key_prefix, tensorboard)
        return output

    def _gathered_rows(self, tensors: Any) -> Any:
        return gathered_rows(self.accelerator, tensors, self._batch_rows)

    def _new_evaluation(self, dataset: Any) -> Evaluation:
        dpsm, tokenizer = self.dpsm, self.processing_class
        frequency = self._frequency.of(self.train_dataset, dataset) if dpsm.frequency_buckets else None
        return Evaluation(
            self.model, tokenizer, dataset, byte_lengths=self._token_bytes.of(tokenizer),
            scaler=self.temperature_scaler, classwise_tokens=dpsm.classwise_tokens,
            depth=dpsm.expected_depth, ignore_forced_tokens=dpsm.ignore_forced_tokens,
            generated=self._predicts_with_generate() and dpsm.generated_calibration, frequency=frequency,
        )  # fmt: skip

    def _shown_metrics(self, panel: EvaluationPanel) -> dict[str, float]:
        """Return the metrics of an evaluation that are logged and returned, without prefix; `panel` keeps all."""
        if self.dpsm.calibration_metrics == "all":
            return panel.metrics()
        also = names_in(self.args.metric_for_best_model or "")
        for schedule in self.dpsm.schedules().values():
            if schedule.name == "feedback":
                also |= set().union(*map(names_in, schedule.options.feedback().read()))
        return panel.core_metrics(also)

    def _callbacks(self, kind: type[_Callback]) -> list[_Callback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, kind)]

    def with_all_metrics(self, metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
        """Return the metrics of the evaluation that has just ended with those that ``calibration_metrics`` left out.

        Args:
            metrics: as `evaluate` or `predict` returned them.
            prefix: of their names.
        """
        found = {} if self.panel is None else self.panel.metrics()
        return {**metrics, **{key: v for n, v in found.items() if (key := f"{prefix}_{n}") not in metrics}}

    @property
    def calibration(self) -> TokenCalibration | None:
        """Return the statistics of all tokens of the last evaluation, over all processes; None before the first."""
        return None if self.panel is None else self.panel.tokens

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of a set as the trainer does, and never that of another one.

        With persistent workers Trainer keeps loaders by name, and all sets that are passed as objects have one name.
        """
        if not isinstance(eval_dataset, str):
            chosen = self.eval_dataset if eval_dataset is None else eval_dataset
            if self._loaded_set is not chosen:
                getattr(self, "_eval_dataloaders", {}).pop("eval", None)
                self._loaded_set = chosen
        return super().get_eval_dataloader(eval_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        """Evaluate in the order of the set, whatever order is trained in: a row's place tells which document it is."""
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    # ---- temperature -----------------------------------------------------------------------------------------------

    @property
    def calibration_dataset(self) -> Any:
        """Return the data a temperature is fitted on. Setting another set discards the temperature that was fitted."""
        return self._calibration_dataset

    @calibration_dataset.setter
    def calibration_dataset(self, dataset: Any) -> None:
        dataset = self.prepared_for_evaluation(dataset)
        if dataset is not None:
            check_calibration_dataset(dataset, self.train_dataset, self.eval_dataset)
        self._calibration_dataset = dataset
        self._temperature.forget()

    def prepared_for_evaluation(self, dataset: Any) -> Any:
        """Return a set as it is evaluated: as it is, but for trainers that tokenize the sets they are given."""
        return dataset

    @property
    def temperature_scaler(self) -> TemperatureScaler | None:
        """Return the temperature that was fitted for the weights as they are now; None if there is none."""
        return self._temperature.of(self.model)

    def use_temperature(self, scaler: TemperatureScaler | float) -> None:
        """Let the evaluations of the model as it is now report metrics scaled by a temperature that is known already.

        Args:
            scaler: of `TemperatureScaler.load`, or a temperature.

        Raises:
            ValueError: if the temperature is not positive.
        """
        scaler = scaler if isinstance(scaler, TemperatureScaler) else TemperatureScaler(float(scaler))
        self._temperature.keep(self.model, scaler)

    def fit_temperature(self, dataset: Any = None, *, split: str = "calibration") -> TemperatureScaler:
        """Fit a temperature for the model as it is now and let the following evaluations report scaled metrics too.

        By NLL; beside it by Brier score and by the gap between confidence and accuracy, of which some metrics are
        reported too. About five passes over the data, without gradients or stored logits; the result is also written
        to ``temperature.json`` in ``output_dir``. Nothing is fitted again while the weights stay as they are and no
        data set is given.

        Args:
            dataset: to fit on; ``calibration_dataset`` if left out. Never the test set: the temperature would have
                seen the labels that it is judged by.
            split: name of the data, kept in ``temperature.json``.

        Raises:
            ValueError: if there is no data set, or as `TemperatureScaler.fit`.
        """
        if dataset is None:
            if (scaler := self.temperature_scaler) is not None:
                return scaler
            dataset = self.calibration_dataset
        if dataset is None:
            raise ValueError(
                "there is no data to fit a temperature on: pass a dataset, or calibration_dataset= to the trainer."
            )
        dataloader = self.get_eval_dataloader(self.prepared_for_evaluation(dataset))
        number = itertools.count(1)
        scaler = TemperatureScaler.fit_passes(
            lambda wanted: self._moments(dataloader, wanted, f"temperature fit, pass {next(number)} (of about five)"),
            split=split,
        )
        if scaler.left_out:
            logger.warning(f"of the temperatures beside that of NLL one is left out: {scaler.left_out}")
        if self.is_world_process_zero():
            scaler.save(str(self.args.output_dir))
        self._temperature.keep(self.model, scaler)
        return scaler

    def _moments(self, dataloader: Any, wanted: Mapping[str, float], description: str = "temperature fit") -> Sums:
        """Return the sums that temperatures are fitted with, at one of each search, from a pass over the data."""
        ignored = self.dpsm.ignore_forced_tokens
        moments = MomentPass(
            wanted, forced_token_ids(core_model(self.model), self.processing_class) if ignored else ()
        )
        with self._collecting(moments):
            super().evaluation_loop(dataloader, description, prediction_loss_only=True)
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "prediction_bar", None)
            if bar is not None:  # as at the end of every evaluation; there is one a pass
                bar.close()
                callback.prediction_bar = None
        return moments.finish(self.args.device)


def _without_missing_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    # DataCollatorForSeq2Seq puts labels=None into the batches of data without labels
    return inputs if inputs.get("labels", ()) is not None else {k: v for k, v in inputs.items() if k != "labels"}


def _overrides(kind: type, method: str) -> bool:
    """Return whether a class derived from the mixin has a method of its own in front of the mixin's."""
    return any(method in vars(base) for base in kind.__mro__[: kind.__mro__.index(DPSMMixin)])


def _keep_liger_out_of_the_loss(args: Any) -> None:
    """Leave Liger its norms and activations, but not the head: its fused loss is cross-entropy alone."""
    if getattr(args, "use_liger_kernel", False):
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}


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
