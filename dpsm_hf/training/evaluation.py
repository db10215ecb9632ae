"""The evaluation of the trainers: sufficient statistics instead of logits, and a temperature fitted apart."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, has_length
from transformers.utils import logging

from ..calibration import TokenCalibration
from ..evaluation.depth import DepthReader
from ..evaluation.frequent_tokens import frequent_labels
from ..evaluation.generation.scoring import FreeRunning
from ..evaluation.panel import EvaluationPanel, check_finite, real_tokens
from ..evaluation.temperature import Moments, TemperatureScaler, UnfittableError
from ..models.fingerprint import fingerprint
from ..models.language_model import core_model, end_tokens, label_alignment
from ..models.token_bytes import token_bytes
from ..rules.extra_statistics import ExtraStatistics
from ..rules.losses import TokenScores
from ..runtime.devices import float64_device
from ..runtime.distributed import sum_over_processes
from .arguments import DPSMArguments
from .callbacks import CalibrationCallback
from .checks import check_calibration_dataset
from .training_loss import TrainingLossMixin

logger = logging.get_logger(__name__)


class _MomentPanel:
    """Sum the moments that a temperature is fitted with; takes the place of an `EvaluationPanel` for one pass."""

    counts_depths = False

    def __init__(self, temperature: float) -> None:
        self.extra = ExtraStatistics(moments_at=temperature)
        self.sums: Tensor | None = None

    def add(self, scores: TokenScores, targets: Tensor, batch_size: int, depths: Tensor | None = None) -> None:
        check_finite(scores, batch_size)
        mask = real_tokens(scores, batch_size)
        assert scores.extra is not None  # asked for above
        home = float64_device(mask.device)
        columns = scores.extra[mask].to(home).double()
        sums = torch.cat([columns.sum(0), mask.sum().to(home).double()[None]])
        self.sums = sums if self.sums is None else self.sums + sums

    def moments(self, device: torch.device) -> Moments:
        sums = torch.zeros(4, dtype=torch.float64) if self.sums is None else self.sums
        nll, gradient, curvature, tokens = sum_over_processes(sums.to(float64_device(device))).tolist()
        return Moments(nll, gradient, curvature, int(tokens))


class EvaluationMixin(TrainingLossMixin):
    """Evaluate as the trainer does, and report what `EvaluationPanel` makes of every scored token beside."""

    def __init__(self, *args: Any, calibration_dataset: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calibration_dataset = calibration_dataset
        #: What the last evaluation saw, over all processes.
        self.panel: EvaluationPanel | None = None
        # None where there is no best temperature for these weights
        self._scaler: tuple[Any, TemperatureScaler | None] | None = None
        self._byte_lengths: tuple[Any, int, Tensor | None] | None = None
        self._free_running: FreeRunning | None = None
        self._depth_reader: tuple[nn.Module, DepthReader] | None = None
        self._seconds_evaluating = 0.0
        self._loaded_set: Any = None
        self._evaluating_since: float | None = None
        if isinstance(self.args, DPSMArguments) and self.args.fit_temperature and calibration_dataset is None:
            raise ValueError(
                "fit_temperature=True needs data to fit on: pass calibration_dataset=, a split that is neither "
                "trained nor tested on."
            )
        if calibration_dataset is not None:
            check_calibration_dataset(calibration_dataset, self.train_dataset, self.eval_dataset)

    @property
    def calibration_dataset(self) -> Any:
        """Return where a temperature is fitted; neither trained nor tested on. Another set makes another one."""
        return self._calibration_dataset

    @calibration_dataset.setter
    def calibration_dataset(self, dataset: Any) -> None:
        if dataset is not None:
            check_calibration_dataset(dataset, self.train_dataset, self.eval_dataset)
        self._calibration_dataset, self._scaler = dataset, None

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

    # ---- one batch -------------------------------------------------------------------------------------------------

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
        generates = self._predicts_with_generate() and not prediction_loss_only
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
        evaluated = self._take_evaluated()
        if evaluated is not None and self._collector is not None:
            depths = self._depths(inputs, evaluated[1]) if self._collector.counts_depths else None
            try:
                self._collector.add(*evaluated, inputs["labels"].shape[0], depths)
            except FloatingPointError as error:
                raise FloatingPointError(f"at optimizer step {self.state.global_step}: {error}") from None
        if generates and evaluated is not None and result[1] is not None:
            self._score_generated(model, inputs, result[1], gen_kwargs or getattr(self, "_gen_kwargs", {}))
        return result

    def _predicts_with_generate(self) -> bool:
        return isinstance(self, Seq2SeqTrainer) and bool(getattr(self.args, "predict_with_generate", False))

    def _depths(self, inputs: dict[str, Any], targets: Tensor) -> Tensor:
        assert self._depth_reader is not None  # the collector that counts depths was made from it
        return self._depth_reader[1].depths(self._prepare_inputs(inputs), targets)

    def _score_generated(
        self, model: nn.Module, inputs: dict[str, Any], generated: Tensor, options: dict[str, Any]
    ) -> None:
        """Score the tokens that were generated as the model's own labels."""
        if self._free_running is None:
            return
        given = {name: value for name, value in options.items() if value is not None}
        prepared = self._prepare_inputs(inputs)
        batch = self._free_running.batch(prepared, generated, given)
        if batch is None:
            return
        collector, self._collector = self._collector, None
        self._logits_unused = True
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                self.compute_loss(model, dict(batch), return_outputs=True)
        finally:
            self._collector, self._logits_unused = collector, False
        if (evaluated := self._take_evaluated()) is not None:
            self._free_running.add(batch, prepared["labels"], evaluated[0])

    def _take_evaluated(self) -> tuple[TokenScores, Tensor] | None:
        evaluated, self._evaluated = self._evaluated, None
        return evaluated

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

    # ---- a whole set -----------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the trainer does; the training clock stands still until the last file and picture is written."""
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict as the trainer does, with the training clock standing still."""
        with self._evaluating():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        if self._evaluating_since is not None:  # one of several sets
            yield
            return
        self._evaluating_since = time.perf_counter()
        try:
            yield
        finally:
            self._seconds_evaluating += time.perf_counter() - self._evaluating_since
            self._evaluating_since = None

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
        if self.dpsm.fit_temperature and not self.is_in_train:
            self._fit_if_possible()
        self.panel = None  # two would be held otherwise
        outer, free_running = self._collector, self._free_running  # of an evaluation that this one is part of
        panel = self._collector = self._new_panel(dataset)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            self.panel = panel.reduce(sum_over_processes, self.args.device)
            if self._free_running is not None:
                panel.generated = self._free_running.joined()
        finally:
            self._collector, self._free_running = outer, free_running
        if found := panel.metrics():
            metrics: dict[str, Any] = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            if self.is_in_train:
                metrics[f"{metric_key_prefix}_train_seconds"] = self._train_seconds()
            # a metric of the user's own compute_metrics keeps its name
            assert output.metrics is not None  # the loop always returns a dict
            output.metrics.update({k: v for k, v in metrics.items() if k not in output.metrics})
            for callback in self._calibration_callbacks():
                callback.receive(panel, metric_key_prefix, self._tensorboard_writer())
        elif panel.samples and output.metrics is not None and f"{metric_key_prefix}_loss" in output.metrics:
            # no token, no loss: a 0 would be the best that there ever was
            output.metrics[f"{metric_key_prefix}_loss"] = math.nan
            logger.warning(f"no token of the data set for {metric_key_prefix!r} is scored: every label is ignored.")
        return output

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        """Evaluate in the order of the set, whatever order is trained in: a row's place tells which document it is."""
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def _new_panel(self, dataset: Any) -> EvaluationPanel:
        scaler = self._scaler_in_force()
        wanted = self.dpsm.classwise_tokens
        if not self.dpsm.expected_depth:
            self._depth_reader = None
        elif self._depth_reader is None or self._depth_reader[0] is not self.model:
            self._depth_reader = (self.model, DepthReader(self.model))
        self._free_running = None
        encoder_decoder = getattr(getattr(core_model(self.model), "config", None), "is_encoder_decoder", False)
        if self._predicts_with_generate() and encoder_decoder and self.dpsm.generated_calibration:
            self._free_running = FreeRunning(self.model, self.processing_class)
        return EvaluationPanel(
            eos_tokens=end_tokens(core_model(self.model), self.processing_class),
            byte_lengths=self._token_bytes(),
            temperature=None if scaler is None else scaler.temperature,
            classes=frequent_labels(dataset, wanted, unscored=self._unscored_labels()) if wanted else None,
            layers=None if self._depth_reader is None else self._depth_reader[1].layers,
        )

    def _unscored_labels(self) -> int:
        """Return how many labels at the beginning of a row no row of the logits predicts."""
        return 1 if label_alignment(self.model) == "shifted" else 0

    def _token_bytes(self) -> Tensor | None:
        """Return the bytes of each token of the tokenizer as it is now; None, too, is found out only once."""
        tokenizer: Any = self.processing_class
        size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0  # grows with added tokens
        if self._byte_lengths is None or self._byte_lengths[0] is not tokenizer or self._byte_lengths[1] != size:
            self._byte_lengths = (tokenizer, size, token_bytes(tokenizer))
        return self._byte_lengths[2]

    def _calibration_callbacks(self) -> list[CalibrationCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, CalibrationCallback)]

    def _tensorboard_writer(self) -> Any:
        writers = (getattr(callback, "tb_writer", None) for callback in self.callback_handler.callbacks)
        return next((writer for writer in writers if writer is not None), None)

    def _train_seconds(self) -> float:
        return 0.0

    # ---- temperature -----------------------------------------------------------------------------------------------

    def fit_temperature(self, dataset: Any = None, *, split: str = "calibration") -> TemperatureScaler:
        """Fit a temperature for the model as it is now and let the following evaluations report scaled metrics too.

        About five passes over the data, without gradients or stored logits; the result is also written to
        ``temperature.json`` in ``output_dir``. Nothing is fitted again while the weights stay as they are and no data
        set is given.

        Args:
            dataset: to fit on; ``calibration_dataset`` if left out. Never the test set: the temperature would have
                seen the labels that it is judged by.
            split: name of the data, kept in ``temperature.json``.

        Raises:
            ValueError: if there is no data set, or as `TemperatureScaler.fit`.
        """
        if dataset is None:
            if (scaler := self._scaler_in_force()) is not None:
                return scaler
            dataset = self.calibration_dataset
        if dataset is None:
            raise ValueError(
                "there is no data to fit a temperature on: pass a dataset, or calibration_dataset= to the trainer."
            )
        dataloader = self.get_eval_dataloader(dataset)

        def moments(temperature: float) -> Moments:
            panel = self._collector = _MomentPanel(temperature)
            try:
                super(EvaluationMixin, self).evaluation_loop(dataloader, "temperature fit", prediction_loss_only=True)
            finally:
                self._collector = None
                self._close_progress_bar()
            return panel.moments(self.args.device)

        scaler = TemperatureScaler.fit_moments(moments, split=split)
        if self.is_world_process_zero():
            scaler.save(str(self.args.output_dir))
        self._scaler = (fingerprint(self.model), scaler)
        return scaler

    def _fit_if_possible(self) -> None:
        """Fit for the weights as they are; where no temperature is best, the metrics are reported without one."""
        if self._scaler is not None and self._scaler[0] == fingerprint(self.model):
            return
        try:
            self.fit_temperature()
        except UnfittableError as error:
            self._scaler = (fingerprint(self.model), None)
            logger.warning(f"no temperature was fitted, and no metric is reported after scaling: {error}")

    def use_temperature(self, scaler: TemperatureScaler | float) -> None:
        """Let the evaluations of the model as it is now report metrics scaled by a temperature that is known already.

        Args:
            scaler: of `TemperatureScaler.load`, or a temperature.

        Raises:
            ValueError: if the temperature is not positive.
        """
        scaler = scaler if isinstance(scaler, TemperatureScaler) else TemperatureScaler(float(scaler))
        self._scaler = (fingerprint(self.model), scaler)

    @property
    def temperature_scaler(self) -> TemperatureScaler | None:
        """Return the temperature that was fitted for the weights as they are now; None if there is none."""
        return self._scaler_in_force()

    def _scaler_in_force(self) -> TemperatureScaler | None:
        if self._scaler is None or self._scaler[0] != fingerprint(self.model):
            return None
        return self._scaler[1]

    def _close_progress_bar(self) -> None:
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "prediction_bar", None)
            if bar is not None:  # as at the end of every evaluation; there is one a pass
                bar.close()
                callback.prediction_bar = None
