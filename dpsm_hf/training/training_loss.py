"""The loss of a batch as the trainers compute it: one denominator, inside the model's head or from its logits."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from ..head.model_head import FusedHead, FusedHeadError, ScoredOutput, ScoringRequest
from ..models.language_model import (
    Alignment,
    align_targets,
    core_model,
    inputs_without_labels,
    is_compiled,
    label_alignment,
    probe_alignment,
    router_loss,
)
from ..models.output_layer import output_layer
from ..rules.extra_statistics import ExtraStatistics
from ..rules.losses import IGNORE_INDEX, TokenScores, score_tokens
from ..rules.scoring_rules import Objective
from ..runtime.distributed import sum_over_processes
from ..runtime.ranges import FORWARD, HEAD, ROW_PASS, HeadRanges, active, named, ranged
from .arguments import DPSMArguments, dpsm_arguments
from .corruption import CorruptionMixin
from .token_means import TokenTally

logger = logging.get_logger(__name__)


class Collector(Protocol):
    """What gathers the scores of evaluation batches."""

    @property
    def extra(self) -> ExtraStatistics | None: ...

    @property
    def counts_depths(self) -> bool: ...

    def add(self, scores: TokenScores, targets: Tensor, batch_size: int, depths: Tensor | None = None) -> None: ...


class _Batch(NamedTuple):
    """A batch whose loss is asked for."""

    inputs: dict[str, Tensor | Any]
    labels: Tensor
    shift_labels: Tensor | None
    alignment: Alignment
    denominator: Tensor | int


class TrainingLossMixin(CorruptionMixin):
    """Compute the loss of a `Trainer`; the half of `DPSMMixin` that knows scoring rules and models."""

    model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _keep_liger_out_of_the_loss(kwargs.get("args", args[1] if len(args) > 1 else None))
        super().__init__(*args, **kwargs)
        self._plain_arguments = None if isinstance(self.args, DPSMArguments) else dpsm_arguments(self.args)
        self._alignment: Alignment | None = label_alignment(self.model)
        self._tally = TokenTally()
        self._alpha: float | None = None
        self._last_batch: tuple[TokenScores, Tensor] | None = None
        self._evaluated: tuple[TokenScores, Tensor] | None = None
        self._collector: Collector | None = None
        self._logits_unused = False
        self._fused: FusedHead | None = None
        self._not_fused: weakref.ref[nn.Module] | None = None
        self._rule: Objective | None = None
        self._refuse_other_losses()
        if self._owns_loss():
            # the denominator is ours whether or not the model's forward has a place for it
            self.model_accepts_loss_kwargs = True
            self.loss_is_scaled_for_ga = True

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
        """Return whether the loss is computed here: always, but for clean CE on a model whose logits are unknown."""
        known = self._alignment is not None or self.dpsm.loss_type != "ce" or self.corruption.flips is not None
        return self.compute_loss_func is None and known

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
        if "labels" not in inputs and model.training and self.dpsm.loss_type != "ce":
            raise ValueError(
                f"the batch has no 'labels', only {', '.join(inputs)}, so loss_type={self.dpsm.loss_type!r} cannot be "
                "computed; let the data collator name them so, or use loss_type='ce' for the model's own loss."
            )
        if "labels" not in inputs or not self._owns_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        if self._alignment is None and bool((labels != IGNORE_INDEX).any()):
            self._alignment = probe_alignment(self.model, inputs)
        alignment = self._alignment or "aligned"  # unknown only as long as nothing was scored
        shift_labels = inputs.get("shift_labels")
        denominator = self._denominator(labels, shift_labels, alignment, num_items_in_batch)
        clean = inputs_without_labels(self.model, inputs)
        training = model.training
        if training:
            self._alpha = self.alpha
            labels, shift_labels = self._flipped(labels, shift_labels, alignment)
        batch = _Batch(clean, labels, shift_labels, alignment, denominator)
        outputs: Any = None
        failure: Exception | None = None
        # a subclass that wraps this method may look at the outputs whatever the evaluation needs
        unused = self._logits_unused and type(self).compute_loss is TrainingLossMixin.compute_loss
        if not return_outputs or unused:
            outputs, failure = self._score_in_head(model, batch)
        if outputs is None:
            loss, scores, targets, outputs = self._score_from_logits(model, batch)
            if failure is not None:  # of the head, since the batch itself is sound
                self._give_up_fusing(failure)
        else:
            loss, scores, targets = outputs.loss, outputs.scores(), outputs.targets
        auxiliary = router_loss(self.model, outputs) if training else None
        if auxiliary is not None:
            # weighted by its share of the step's tokens, it too is independent of the split into micro-batches
            loss = loss + auxiliary.to(loss.device) * scores.scored.sum() / denominator
        if num_items_in_batch is not None and self.args.average_tokens_across_devices and self.args.n_gpu <= 1:
            # data parallelism averages gradients over processes, but the denominator is already global
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())

        scores = replace(scores, loss=None)  # what is kept for the log and for errors is to hold no graph
        self._last_batch = (scores, targets)
        if training:
            self._tally.add(scores)
        else:
            self._evaluated = (scores, targets)
        if isinstance(outputs, tuple):
            outputs = (loss, *outputs)
        return (loss, outputs) if return_outputs else loss

    def _loss_under(self, rule: Objective, inputs: dict[str, Any], count: Tensor | int | None) -> Tensor:
        """Return the loss of a batch of training under another rule, without a trace in the log.

        Args:
            rule: to score with.
            inputs: on the device, of a model whose alignment is known.
            count: of tokens, the denominator; see `compute_loss`.
        """
        assert self._alignment is not None
        labels, shift_labels = inputs["labels"], inputs.get("shift_labels")
        denominator = self._denominator(labels, shift_labels, self._alignment, count)
        labels, shift_labels = self._flipped(labels, shift_labels, self._alignment, counted=False)
        clean = inputs_without_labels(self.model, inputs)
        batch = _Batch(clean, labels, shift_labels, self._alignment, denominator)
        self._rule = rule
        try:
            outputs, _ = self._score_in_head(self.model, batch)
            if outputs is None:
                return self._score_from_logits(self.model, batch)[0]
            assert outputs.loss is not None  # there is a rule
            return outputs.loss
        finally:
            self._rule = None

    def _objective(self, training: bool) -> Objective:
        """Return the rule of a batch; an evaluation's loss is cross-entropy, smoothed where `Trainer` smooths it."""
        if self._rule is not None:
            return self._rule
        if training:
            return self.dpsm.objective(self._alpha)
        return Objective("ce", label_smoothing=self.label_smoother.epsilon if self.label_smoother is not None else 0.0)

    def _extra(self, training: bool) -> ExtraStatistics | None:
        return None if training or self._collector is None else self._collector.extra

    # ---- inside the head -------------------------------------------------------------------------------------------

    def _score_in_head(self, model: nn.Module, batch: _Batch) -> tuple[ScoredOutput | None, Exception | None]:
        """Return the scores of a batch without its logits ever existing; else None, and why where it was tried.

        Raises:
            ValueError: with ``fused_head="on"``, if the model cannot be scored so.
        """
        core = core_model(model)
        if self.dpsm.fused_head == "off" or core is not core_model(self.model):  # another model's scores: a teacher's
            return None, None
        if self._not_fused is not None and self._not_fused() is core:
            return None, None
        failure: Exception | None = None
        outputs: ScoredOutput | None = None
        checked, random_state = False, torch.get_rng_state()
        try:
            if self.args.n_gpu > 1:
                raise FusedHeadError("data parallelism in one process copies modules; start one process a GPU")
            if self._fused is None or self._fused.core is not core:
                self._fused = FusedHead(model)
            request = ScoringRequest(
                labels=batch.labels if batch.shift_labels is None else batch.shift_labels,
                alignment=batch.alignment if batch.shift_labels is None else None,
                objective=self._objective(model.training),
                denominator=batch.denominator,
                entropy=not model.training,
                chunk_tokens=self.dpsm.chunk_tokens,
                extra=self._extra(model.training),
            )
            checked = self._fused.checked
            outputs = self._fused(model, batch.inputs, request)
        except Exception as error:
            # from a model whose head was checked it is no failure of the head; and full logits need more memory still
            if checked or isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                raise
            failure = error
        # every process goes the same way, or their collective operations would not match
        if not checked and sum_over_processes(torch.tensor(float(failure is not None), device=self.args.device)):
            failure = failure or FusedHeadError("another process could not")
            torch.set_rng_state(random_state)  # the attempt has drawn its dropout; the batch draws it again
            if isinstance(failure, FusedHeadError) and self.dpsm.fused_head == "on":
                self._give_up_fusing(failure)
            return None, failure
        return outputs, None

    def _give_up_fusing(self, failure: Exception) -> None:
        reason = str(failure) if isinstance(failure, FusedHeadError) else f"{type(failure).__name__}: {failure}"
        if self.dpsm.fused_head == "on":
            raise ValueError(
                f"fused_head='on', but tokens cannot be scored inside the head of this model: {reason}. Use "
                "fused_head='auto' to fall back to full logits."
            ) from failure
        self._fused, self._not_fused = None, weakref.ref(core_model(self.model))
        logger.warning(
            f"Tokens cannot be scored inside the head of this model: {reason}. The loss is computed from full logits, "
            "which is exact too and takes more memory and time; fused_head='off' does so without this warning."
        )

    # ---- from logits -----------------------------------------------------------------------------------------------

    def _score_from_logits(self, model: nn.Module, batch: _Batch) -> tuple[Tensor, TokenScores, Tensor, Any]:
        """Return the loss, the scores, the targets and the model's outputs."""
        with self._head_ranges(model) as head:
            outputs = model(**batch.inputs)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        with named(HEAD):
            loss, scores, targets = self._score_logits(model, batch, logits)
        head.until_hidden(loss)
        return loss, scores, targets, outputs

    def _head_ranges(self, model: nn.Module) -> HeadRanges:
        # a hook on the layer would be another program to torch.compile, and replicas would share it
        seen = active() and self.args.n_gpu <= 1 and not is_compiled(model)
        return HeadRanges(output_layer(core_model(model)) if seen else None)

    def _score_logits(self, model: nn.Module, batch: _Batch, logits: Tensor) -> tuple[Tensor, TokenScores, Tensor]:
        labels, shift_labels, alignment = batch.labels, batch.shift_labels, batch.alignment
        targets = align_targets(labels, logits.shape[-2], alignment) if shift_labels is None else shift_labels
        plain_ce = not model.training or (self.dpsm.loss_type == "ce" and not self.dpsm.z_loss and self._rule is None)
        # labels are checked here, before cross-entropy would index with a wrong one
        scores = score_tokens(
            logits.detach() if plain_ce else logits,
            targets,
            None if plain_ce else self._objective(model.training),
            extra=self._extra(model.training),
        )
        if scores.loss is not None:
            return scores.loss.sum() / batch.denominator, scores, targets
        shifted = alignment == "shifted" and shift_labels is None and labels.shape == targets.shape
        loss = self._cross_entropy(logits, labels, None if shifted else targets, batch.denominator)
        return loss, scores, targets

    def _denominator(
        self,
        labels: Tensor,
        shift_labels: Tensor | None,
        alignment: Alignment,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor | int:
        if num_items_in_batch is None:
            if shift_labels is not None:
                labels = shift_labels
            elif alignment == "shifted":
                labels = labels[..., 1:]
            return (labels != IGNORE_INDEX).sum().clamp_min(1)
        if not isinstance(num_items_in_batch, Tensor):
            return max(1, num_items_in_batch)
        if self.args.n_gpu > 1:  # DataParallel: one entry a replica; the logits are gathered, so one number is right
            replicas = 1 if self.args.average_tokens_across_devices else self.args.n_gpu
            num_items_in_batch = num_items_in_batch.reshape(-1)[0] * replicas
        # a step whose labels are all ignored has a loss of 0 with a graph, not 0 / 0
        return num_items_in_batch.clamp_min(1).to(labels.device)

    @ranged(ROW_PASS)
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
            targets = align_targets(labels, logits.shape[-2], "shifted")
        flat_logits = logits.float().reshape(-1, logits.shape[-1])
        total = F.cross_entropy(flat_logits, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / denominator


def _keep_liger_out_of_the_loss(args: Any) -> None:
    """Leave Liger its norms and activations, but not the head: its fused loss is cross-entropy alone."""
    if getattr(args, "use_liger_kernel", False):
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
