"""The scores of a batch and its loss: one denominator, inside the model's head or from its logits."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import ModelOutput, logging

from ..head.model_head import FusedHead, FusedHeadError, OtherLossError, ScoringRequest
from ..models.language_model import (
    Alignment,
    align_targets,
    check_positions,
    core_model,
    inputs_without_labels,
    is_compiled,
    label_alignment,
    logits_in,
    loss_in,
    virtual_tokens,
)
from ..models.output_layer import output_layer
from ..models.own_loss import OwnLoss, correct_own_loss, own_loss, replacement_of
from ..rules.extra_statistics import ExtraStatistics
from ..rules.losses import IGNORE_INDEX, TokenScores, score_tokens
from ..rules.scoring_rules import Objective
from ..runtime.distributed import sum_over_processes
from ..runtime.ranges import HEAD, ROW_PASS, HeadRanges, active, named
from .arguments import DPSMArguments
from .frozen_states import FrozenStates

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Batch:
    """A batch as it is scored; `Scorer.batch` makes it."""

    trainer_model: nn.Module  #: with its wrappers, as the trainer holds it
    inputs: dict[str, Any]  #: of the model, without labels
    labels: Tensor  #: ``[B, T]``, -100 is not scored
    shift_labels: Tensor | None  #: the targets where the collator made them, ``[B, T]``
    alignment: Alignment  #: which label a row of the logits predicts
    denominator: Tensor | int  #: the loss is the sum over tokens divided by this
    share: Tensor  #: of this batch in its optimizer step
    own_loss: OwnLoss | None = None  #: what the model's own loss consists of; None if not measured yet

    @property
    def labelled_inputs(self) -> dict[str, Any]:
        """Return the inputs with the labels that the model's own loss is made of."""
        return {**self.inputs, "labels": self.labels}


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

    loss: Tensor  #: of the tokens, 0-d, differentiable
    outputs: Any  #: of the model; without logits if it was scored inside its head
    scores: TokenScores  #: of each token, detached, ``[B * T]``
    targets: Tensor  #: the labels they were scored against, ``[B, T]``
    added: Tensor | None = None  #: what the model adds to the loss of its tokens, in training
    labelled: bool = False  #: the model was given labels, and its outputs hold what it made of them


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
        takes_count: whether the model's forward takes ``num_items_in_batch``, and divides its own loss by it.
        entropy_in_training: compute the entropy of each token in training too.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        dpsm: DPSMArguments,
        *,
        takes_count: bool = False,
        entropy_in_training: bool = False,
    ) -> None:
        self.args, self.dpsm = args, dpsm
        self._takes_count = takes_count
        self._entropy_in_training = entropy_in_training
        #: Which label a row of the logits predicts; None until a model that is not known was given a label.
        self.alignment: Alignment | None = label_alignment(model)
        #: The head that scores; None before the first batch and where logits are made.
        self.head: FusedHead | None = None
        #: The frozen lower layers of the model, where it has them.
        self.frozen_states: FrozenStates | None = None
        self._not_fused: weakref.ref[nn.Module] | None = None
        # whether a wrapper around the model adds to its loss (AdaLoRA's regularisation), in training and evaluation
        self._added_around: dict[bool, bool] = {}

    @property
    def fell_back(self) -> bool:
        """Return whether a model was met that cannot be scored inside its head."""
        return self._not_fused is not None

    def release(self) -> None:
        """Let go of the model, which another one may be about to replace."""
        self.head = None
        self._added_around.clear()

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
        found = own_loss(own, inputs)
        self.alignment = label_alignment(own) if found is None else found.alignment
        alignment = self.alignment or "aligned"  # unknown only as long as nothing was scored
        shifted = self._leaves_out_first(own) if num_items_in_batch is None else self.counts_shifted(own, inputs)
        counted = shift_labels if shift_labels is not None else labels[..., 1:] if shifted else labels
        count = (counted != IGNORE_INDEX).sum()
        denominator = self._denominator(labels.device, count, num_items_in_batch)
        return Batch(
            own,
            inputs_without_labels(own, inputs),
            labels,
            shift_labels,
            alignment,
            denominator,
            share=count / denominator,
            own_loss=found,
        )

    def counts_shifted(self, own: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Return whether the tokens of a step are counted without the first label of every row.

        For a model that takes the count, `Trainer` decides by the name of its loss, which is not for every model what
        that loss scores; what such a model is trained with is divided as there. For the others nobody but this package
        uses the number, and it is that of the scored tokens.

        Args:
            own: the trainer's model.
            inputs: as in `batch`; a model that is not known is called with them once.
        """
        if self._takes_count:
            core = core_model(own)
            encodes = bool(getattr(getattr(core, "config", None), "is_encoder_decoder", False))
            return LOSS_MAPPING.get(getattr(core, "loss_type", None) or "") is ForCausalLMLoss and not encodes
        found = own_loss(own, inputs)
        self.alignment = label_alignment(own) if found is None else found.alignment
        return self._leaves_out_first(own)

    def _leaves_out_first(self, own: nn.Module) -> bool:
        # the last virtual token of prompt tuning predicts the first label
        return self.alignment == "shifted" and not virtual_tokens(own)

    def _denominator(
        self, device: torch.device, count: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor | int:
        if num_items_in_batch is None:
            return count.clamp_min(1)
        if not isinstance(num_items_in_batch, Tensor):
            return max(1, num_items_in_batch)
        if self.args.n_gpu > 1:  # DataParallel: one entry a replica; the logits are gathered, so one number is right
            replicas = 1 if self.args.average_tokens_across_devices else self.args.n_gpu
            num_items_in_batch = num_items_in_batch.reshape(-1)[0] * replicas
        # a step whose labels are all ignored has a loss of 0 with a graph, not 0 / 0
        return num_items_in_batch.clamp_min(1).to(device)

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
        with self.below(model, batch.inputs):
            if not logits_needed and self._may_fuse(model, batch):
                scored, failure = self._score_in_head(model, batch, rule, extra)
                if scored is not None:
                    return scored
            scored = self._score_from_logits(model, batch, rule, extra)
        if failure is not None:  # of the head, since the batch itself is sound
            self._give_up_fusing(batch.trainer_model, failure)
        return scored

    def below(self, model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return the context of a forward on a batch, which takes the kept outputs of frozen lower layers.

        Args:
            model: that is called, possibly wrapped.
            inputs: of the batch, without labels.
        """
        return nullcontext() if self.frozen_states is None else self.frozen_states.below(model, inputs)

    # ---- inside the head -------------------------------------------------------------------------------------------

    def _may_fuse(self, model: nn.Module, batch: Batch) -> bool:
        core = core_model(model)
        if self.dpsm.fused_head == "off" or core is not core_model(batch.trainer_model):
            return False
        if model.training and batch.own_loss is not None and batch.own_loss.adds:
            return False  # what it adds is what its loss is more than the cross-entropy of its logits
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
            labelled = _adds_to_replaced(model, batch)
            request = ScoringRequest(
                labels=batch.labels if batch.shift_labels is None else batch.shift_labels,
                alignment=batch.alignment if batch.shift_labels is None else None,
                objective=rule.objective,
                denominator=batch.denominator,
                entropy=self._entropy_in_training or not model.training,
                varentropy=not model.training,
                chunk_tokens=self.dpsm.chunk_tokens,
                extra=extra,
                labelled=labelled,
                leads=batch.own_loss is not None and batch.own_loss.leads,
            )
            checked = self.head.checked
            outputs = self.head(model, batch.labelled_inputs if labelled else batch.inputs, request)
        except Exception as error:
            # from a model whose head was checked it is no failure of the head; and full logits need more memory still
            if checked or isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                raise
            failure = error
        # every process goes the same way, or their collective operations would not match
        if not checked and sum_over_processes(torch.tensor(float(failure is not None), device=self.args.device)):
            failure = failure or FusedHeadError("another process could not")
            torch.set_rng_state(random_state)  # the attempt has drawn its dropout; the batch draws it again
            if isinstance(failure, OtherLossError) and batch.own_loss is not None:
                return self._score_in_head(model, _without_labels(batch), rule, extra)
            if isinstance(failure, FusedHeadError) and self.dpsm.fused_head == "on":
                self._give_up_fusing(batch.trainer_model, failure)
            return None, failure
        scores = replace(outputs.scores(), loss=None)  # what is kept for the log and for errors is to hold no graph
        loss, added = outputs.tokens_loss, outputs.added
        if model.training not in self._added_around:  # looked at once: it waits for the device
            self._added_around[model.training] = not torch.equal(outputs.loss.detach(), loss.detach())
        if self._added_around[model.training]:
            added = outputs.loss - loss + (0.0 if added is None else added)
        return ScoredBatch(loss, outputs, scores, outputs.targets, added), None

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
            outputs, added = self._call(model, batch)
        labelled = added is not None
        logits = _logits(core_model(model), outputs)
        with named(HEAD):
            loss, scores, targets = _score_logits(logits, batch, rule, extra, varentropy=not model.training)
            if labelled and batch.own_loss is not None and batch.own_loss.adds:
                added = _more_than_cross_entropy(added, logits, targets)
        head.until_hidden(loss)
        return ScoredBatch(loss, outputs, replace(scores, loss=None), targets, added, labelled)

    def _call(self, model: nn.Module, batch: Batch) -> tuple[Any, Tensor | None]:
        """Return the outputs of the model and the loss in them, zero but for what it adds where that can be."""
        core, found = core_model(model), batch.own_loss
        if _adds_to_replaced(model, batch):
            random_state = torch.get_rng_state()
            with replacement_of(core).active(core, any_thread=self.args.n_gpu > 1) as replacement:
                outputs = model(**batch.labelled_inputs)
            if replacement.calls or is_compiled(model):
                return outputs, _one(loss_in(outputs))
            # a forward that was put in place of the class's own, such as Liger's, may take another way in training
            batch = _without_labels(batch)
            torch.set_rng_state(random_state)
        elif model.training and core is core_model(batch.trainer_model) and found is not None and found.adds:
            outputs = model(**batch.labelled_inputs)
            return outputs, _one(loss_in(outputs))
        return model(**batch.inputs), None


def _one(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else loss.mean()  # data parallelism gathers one a replica


def _without_labels(batch: Batch) -> Batch:
    """Return a batch whose model, from now on, is given no labels: it computes its loss in training in another way."""
    assert batch.own_loss is not None
    found = replace(batch.own_loss, replaceable=False)
    correct_own_loss(core_model(batch.trainer_model), found)
    return replace(batch, own_loss=found)


def _adds_to_replaced(model: nn.Module, batch: Batch) -> bool:
    """Return whether the model is called with labels and its loss function replaced, for what it adds in training."""
    found = batch.own_loss
    return (
        model.training
        and found is not None
        and found.replaceable
        and core_model(model) is core_model(batch.trainer_model)
    )


def _more_than_cross_entropy(loss: Tensor | None, logits: Tensor, targets: Tensor) -> Tensor | None:
    if loss is None or not bool((targets != IGNORE_INDEX).any()):
        return None
    flat = logits.float().reshape(-1, logits.shape[-1])
    return loss - F.cross_entropy(flat, targets.reshape(-1).to(flat.device), ignore_index=IGNORE_INDEX)


def _logits(core: nn.Module, outputs: Any) -> Tensor:
    """Return the logits among a model's outputs.

    Raises:
        ValueError: if there are none.
    """
    logits = logits_in(outputs)
    if logits is None or logits.dim() < 2 or not logits.shape[-1] or not logits.shape[-2]:
        found = f"logits of shape {tuple(logits.shape)}" if logits is not None else "no tensor of logits"
        raise ValueError(
            f"{type(core).__name__} returned {found}, so its tokens cannot be scored. A forward that was replaced to "
            "save memory (Unsloth's, Liger's fused cross-entropy) leaves them out in training: let it return them "
            "(Unsloth: set the environment variable UNSLOTH_RETURN_LOGITS=1) or load the model "
            "without that replacement; DPSM's own head (fused_head='auto') saves that memory."
        )
    return logits


def with_added_terms(scored: ScoredBatch, batch: Batch) -> Tensor:
    """Return the loss of a batch of training, with what the model adds: load balancing of experts, a z-loss.

    Weighted by its share of the step's tokens, that too is a mean over the whole step at any split into micro-batches.
    """
    if scored.added is None:
        return scored.loss
    return scored.loss + scored.added.to(scored.loss.device) * batch.share


def with_loss(scored: ScoredBatch, loss: Tensor) -> Any:
    """Return a model's outputs with the loss that was computed for it, in the place of its own."""
    outputs = scored.outputs
    if isinstance(outputs, Tensor):
        return (loss, outputs)
    if isinstance(outputs, ModelOutput):
        return type(outputs)(**{**outputs, "loss": loss})
    if isinstance(outputs, Mapping):
        return {"loss": loss, **{key: value for key, value in outputs.items() if key != "loss"}}
    has_loss = scored.labelled or outputs[0] is None
    return (loss, *(outputs[1:] if has_loss else outputs))


def _score_logits(
    logits: Tensor, batch: Batch, rule: BatchRule, extra: ExtraStatistics | None, *, varentropy: bool
) -> tuple[Tensor, TokenScores, Tensor]:
    labels, shift_labels, alignment = batch.labels, batch.shift_labels, batch.alignment
    if shift_labels is None:
        leads = batch.own_loss is not None and batch.own_loss.leads
        check_positions(batch.trainer_model, labels, logits.shape[-2], leads=leads)
        targets = align_targets(labels, logits.shape[-2], alignment)
    else:
        targets = shift_labels
    # labels are checked here, before cross-entropy would index with a wrong one
    scores = score_tokens(
        logits.detach() if rule.as_trainer else logits,
        targets,
        None if rule.as_trainer else rule.objective,
        extra=extra,
        varentropy=varentropy,
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
