"""The scores of a batch and its loss: one denominator, inside the model's head or from its logits."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from ..head.model_head import FusedHead, FusedHeadError, ScoringRequest
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
from ..runtime.ranges import HEAD, ROW_PASS, HeadRanges, active, named
from .arguments import DPSMArguments

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Batch:
    """A batch as it is scored; `Scorer.batch` makes it."""

    own: nn.Module  #: the trainer's model
    inputs: dict[str, Any]  #: of the model, without labels
    labels: Tensor  #: ``[B, T]``, -100 is not scored
    shift_labels: Tensor | None  #: the targets where the collator made them, ``[B, T]``
    alignment: Alignment  #: which label a row of the logits predicts
    denominator: Tensor | int  #: the loss is the sum over tokens divided by this


@dataclass(frozen=True)
class BatchRule:
    """What a batch is scored with.

    Args:
        objective: the scoring rule.
        as_trainer: from full logits, take cross-entropy by the very operations of `Trainer` and its models, so that it
            is equal to theirs bit for bit; the objective is then cross-entropy, too.
        smoother: the trainer's label smoother, for that.
    """

    objective: Objective
    as_trainer: bool = False
    smoother: Any = None


@dataclass(frozen=True)
class ScoredBatch:
    """What `Scorer.score` makes of a batch."""

    loss: Tensor  #: 0-d, differentiable
    outputs: Any  #: of the model; without logits if it was scored inside its head
    scores: TokenScores  #: of each token, detached, ``[B * T]``
    targets: Tensor  #: the labels they were scored against, ``[B, T]``


class ScoredLoss(dict[str, Tensor]):
    """Outputs of a model that hold its loss, smoothed already where that is asked for, and no logits."""


class SmoothedOnce(LabelSmoother):
    """A trainer's label smoother that leaves a loss alone which is smoothed already."""

    def __call__(
        self, model_output: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the outputs; of any others what `LabelSmoother` makes of their logits."""
        if isinstance(model_output, ScoredLoss):
            return model_output["loss"]
        return super().__call__(model_output, labels, shift_labels, num_items_in_batch)


class Scorer:
    """Score the batches of one trainer, and decide for each whether that takes its logits.

    Args:
        model: the trainer's.
        args: of the trainer, for the number of devices and how processes share a step.
        dpsm: the DPSM fields in force, for ``fused_head`` and ``chunk_tokens``.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, dpsm: DPSMArguments) -> None:
        self.args, self.dpsm = args, dpsm
        #: Which label a row of the logits predicts; None until a model that is not known was given a label.
        self.alignment: Alignment | None = label_alignment(model)
        #: The head that scores; None before the first batch and where logits are made.
        self.head: FusedHead | None = None
        self._not_fused: weakref.ref[nn.Module] | None = None

    @property
    def fell_back(self) -> bool:
        """Return whether a model was met that cannot be scored inside its head."""
        return self._not_fused is not None

    def release(self) -> None:
        """Let go of the model, which another one may be about to replace."""
        self.head = None

    def batch(self, own: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None) -> Batch:
        """Return a batch as it is scored.

        Args:
            own: the trainer's model.
            inputs: with ``labels`` and perhaps ``shift_labels``, on the device.
            num_items_in_batch: tokens of the whole optimizer step over all processes, the denominator; None divides by
                the scored tokens of this batch.

        Raises:
            ValueError: if it cannot be found out which label a row of the model's logits predicts, or what its decoder
                is fed.
        """
        labels, shift_labels = inputs["labels"], inputs.get("shift_labels")
        if self.alignment is None and bool((labels != IGNORE_INDEX).any()):
            self.alignment = probe_alignment(own, inputs)
        alignment = self.alignment or "aligned"  # unknown only as long as nothing was scored
        denominator = self._denominator(labels, shift_labels, alignment, num_items_in_batch)
        return Batch(own, inputs_without_labels(own, inputs), labels, shift_labels, alignment, denominator)

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

    def score(
        self,
        model: nn.Module,
        batch: Batch,
        rule: BatchRule,
        *,
        logits_needed: bool = False,
        extra: ExtraStatistics | None = None,
    ) -> ScoredBatch:
        """Call the model on a batch and score every token, inside the model's head where that is possible.

        Args:
            model: possibly wrapped; one that is not the trainer's (a teacher) is scored from its logits.
            batch: on the device.
            rule: the loss.
            logits_needed: whether the outputs must have logits.
            extra: further columns for each token.

        Raises:
            ValueError: with ``fused_head="on"``, if the model cannot be scored inside its head.
        """
        failure: Exception | None = None
        if not logits_needed and self._may_fuse(model, batch):
            scored, failure = self._score_in_head(model, batch, rule, extra)
            if scored is not None:
                return scored
        scored = self._score_from_logits(model, batch, rule, extra)
        if failure is not None:  # of the head, since the batch itself is sound
            self._give_up_fusing(batch.own, failure)
        return scored

    # ---- inside the head -------------------------------------------------------------------------------------------

    def _may_fuse(self, model: nn.Module, batch: Batch) -> bool:
        core = core_model(model)
        if self.dpsm.fused_head == "off" or core is not core_model(batch.own):
            return False
        return self._not_fused is None or self._not_fused() is not core

    def _score_in_head(
        self, model: nn.Module, batch: Batch, rule: BatchRule, extra: ExtraStatistics | None
    ) -> tuple[ScoredBatch | None, Exception | None]:
        """Return the scores of a batch without its logits ever existing; None, and why, where that failed."""
        core = core_model(model)
        failure: Exception | None = None
        outputs: Any = None
        checked, random_state = False, torch.get_rng_state()
        try:
            if self.args.n_gpu > 1:
                raise FusedHeadError("data parallelism in one process copies modules; start one process a GPU")
            if self.head is None or self.head.core is not core:
                self.head = FusedHead(model)
            request = ScoringRequest(
                labels=batch.labels if batch.shift_labels is None else batch.shift_labels,
                alignment=batch.alignment if batch.shift_labels is None else None,
                objective=rule.objective,
                denominator=batch.denominator,
                entropy=not model.training,
                chunk_tokens=self.dpsm.chunk_tokens,
                extra=extra,
            )
            checked = self.head.checked
            outputs = self.head(model, batch.inputs, request)
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
                self._give_up_fusing(batch.own, failure)
            return None, failure
        scores = replace(outputs.scores(), loss=None)  # what is kept for the log and for errors is to hold no graph
        return ScoredBatch(outputs.loss, outputs, scores, outputs.targets), None

    def _give_up_fusing(self, own: nn.Module, failure: Exception) -> None:
        reason = str(failure) if isinstance(failure, FusedHeadError) else f"{type(failure).__name__}: {failure}"
        if self.dpsm.fused_head == "on":
            raise ValueError(
                f"fused_head='on', but tokens cannot be scored inside the head of this model: {reason}. Use "
                "fused_head='auto' to fall back to full logits."
            ) from failure
        self.head, self._not_fused = None, weakref.ref(core_model(own))
        logger.warning(
            f"Tokens cannot be scored inside the head of this model: {reason}. The loss is computed from full logits, "
            "which is exact too and takes more memory and time; fused_head='off' does so without this warning."
        )

    # ---- from logits -----------------------------------------------------------------------------------------------

    def _score_from_logits(
        self, model: nn.Module, batch: Batch, rule: BatchRule, extra: ExtraStatistics | None
    ) -> ScoredBatch:
        # a hook on the layer would be another program to torch.compile, and replicas would share it
        seen = active() and self.args.n_gpu <= 1 and not is_compiled(model)
        with HeadRanges(output_layer(core_model(model)) if seen else None) as head:
            outputs = model(**batch.inputs)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        with named(HEAD):
            loss, scores, targets = _score_logits(logits, batch, rule, extra)
        head.until_hidden(loss)
        return ScoredBatch(loss, outputs, replace(scores, loss=None), targets)


def with_router_loss(scored: ScoredBatch, batch: Batch) -> Tensor:
    """Return the loss of a batch of training, with the load balancing of a mixture of experts where there is one.

    Weighted by its share of the step's tokens, that too is independent of the split into micro-batches.
    """
    auxiliary = router_loss(batch.own, scored.outputs)
    if auxiliary is None:
        return scored.loss
    return scored.loss + auxiliary.to(scored.loss.device) * scored.scores.scored.sum() / batch.denominator


def _score_logits(
    logits: Tensor, batch: Batch, rule: BatchRule, extra: ExtraStatistics | None
) -> tuple[Tensor, TokenScores, Tensor]:
    labels, shift_labels, alignment = batch.labels, batch.shift_labels, batch.alignment
    targets = align_targets(labels, logits.shape[-2], alignment) if shift_labels is None else shift_labels
    # labels are checked here, before cross-entropy would index with a wrong one
    scores = score_tokens(
        logits.detach() if rule.as_trainer else logits,
        targets,
        None if rule.as_trainer else rule.objective,
        extra=extra,
    )
    if scores.loss is not None:
        return scores.loss.sum() / batch.denominator, scores, targets
    shifted = alignment == "shifted" and shift_labels is None and labels.shape == targets.shape
    with named(ROW_PASS):
        if rule.smoother is not None:
            labels = labels if shifted else targets
            count = {"num_items_in_batch": batch.denominator}
            return rule.smoother({"logits": logits}, labels, shift_labels=shifted, **count), scores, targets
        flat = logits.float().reshape(-1, logits.shape[-1])
        total = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / batch.denominator, scores, targets
