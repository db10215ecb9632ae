"""`score_tokens`: loss and statistics of each token from its logits; `DPSMLoss` for a training loop of your own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..runtime.ranges import ROW_PASS, ranged
from .extra_statistics import ExtraStatistics
from .knob_schedules import parse_knob_schedules
from .knobs import KNOBS, objective_with
from .registry import further_parameters
from .rows import (
    RowScore,
    logits_gradient,
    row_blocks,
    row_statistics,
    statistics_columns,
    statistics_names,
    tail_statistics,
)
from .schedules import KnobSchedule, get_alpha_schedule
from .scoring_rules import Objective, score_rows, tail_threshold

IGNORE_INDEX = -100

# Rows are scored in chunks whose float32 copy has at most this many entries (64 MiB): the copies of a whole batch
# would cost several times the logits themselves.
_CHUNK_ENTRIES = 2**24


@dataclass(frozen=True)
class TokenScores:
    """The loss and the statistics of a batch of N tokens.

    Each tensor has shape ``[N]`` and is 0 (False) where the label is ignored. All but ``loss`` are detached.

    Args:
        loss: the objective of each token, differentiable with respect to the logits (from `linear_scoring_loss`:
            reduced by its ``reduction``, differentiable with respect to its inputs); None without an objective.
        scored: bool, False where the label is ``ignore_index``.
        nll: ``-log p_y`` in nats.
        brier: ``sum_j (p_j - [j = y])**2``, in [0, 2].
        spherical: ``1 - p_y / ||p||``, in [0, 1].
        confidence: ``max_j p_j``.
        correct: 1.0 where the label has the largest logit.
        entropy: ``H = -sum_j p_j log p_j`` in nats; None if it was not requested.
        varentropy: ``sum_j p_j (log p_j)**2 - H**2``, the variance of ``log p_j`` under p; None if it was not
            requested.
        extra: ``[N, width]``, the columns of `ExtraStatistics`; None if none were requested.
    """

    loss: Tensor | None
    scored: Tensor
    nll: Tensor
    brier: Tensor
    spherical: Tensor
    confidence: Tensor
    correct: Tensor
    entropy: Tensor | None
    extra: Tensor | None = None
    varentropy: Tensor | None = None


@ranged(ROW_PASS)
def score_tokens(
    logits: Tensor,
    labels: Tensor,
    objective: Objective | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    extra: ExtraStatistics | None = None,
    varentropy: bool = False,
) -> TokenScores:
    """Score every token of a batch from its logits, in float32 whatever their dtype.

    Equivalent plain torch for ``Objective("dpsm", alpha=a)``::

        p = logits.float().softmax(-1)
        loss = (1 - a) * F.cross_entropy(logits.float(), labels, reduction="none") \\
             + a * (p - F.one_hot(labels, V)).square().sum(-1)

    Args:
        logits: ``[..., V]``; the leading dimensions are flattened to N.
        labels: same leading shape, int64 in ``[0, V)`` or ``ignore_index``.
        objective: the scoring rule to differentiate; None computes the statistics only.
        ignore_index: label of tokens that are not scored.
        extra: further statistics to compute for each token.
        varentropy: also compute the variance of ``log p_j`` under p, as evaluations do.

    Returns:
        `TokenScores`, with one loss per token.

    Raises:
        ValueError: if the shapes disagree, or (on a CPU) if a label lies outside ``[0, V)``. On an accelerator the
            loss of such a token is NaN instead, since checking would synchronise with the device.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, "
                         f"but they have {tuple(labels.shape)}.")  # fmt: skip
    flat_logits, flat_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    vocab_size = flat_logits.shape[-1]
    scored = flat_labels != ignore_index
    invalid = scored & ((flat_labels < 0) | (flat_labels >= vocab_size))
    if labels.device.type == "cpu" and bool(invalid.any()):
        raise ValueError(describe_invalid_labels(labels, vocab_size, ignore_index))
    safe_labels = torch.where(scored & ~invalid, flat_labels, 0)

    loss, more, kept = None, None, scored.unsqueeze(-1)
    if objective is None:
        rows = row_blocks(flat_logits, _CHUNK_ENTRIES)
        detached = flat_logits.detach()
        found = (row_statistics(detached[r], safe_labels[r], varentropy=varentropy) for r in rows)
        stats = torch.cat([statistics_columns(row) for row in found])
    else:
        loss, stats = _TokenObjective.apply(flat_logits, safe_labels, scored, objective, varentropy)
        loss = torch.where(invalid, torch.nan, torch.where(scored, loss, 0.0))
    if extra is not None:
        more = torch.where(kept, extra(flat_logits.detach(), safe_labels), 0.0)
    columns = torch.where(kept, stats, 0.0).unbind(-1)
    return TokenScores(loss, scored, extra=more, **dict(zip(statistics_names(True, varentropy), columns, strict=True)))


def describe_invalid_labels(labels: Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX) -> str:
    """Return an error message that names the first label outside ``[0, V)`` and the remedies; "" if there is none."""
    invalid = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if not bool(invalid.any()):
        return ""
    place = tuple(int(i) for i in invalid.nonzero()[0])
    return (
        f"label {int(labels[place])} at position {place} lies outside [0, {vocab_size}), the model's vocabulary. "
        f"Tokens that are not to be scored carry {ignore_index}; if the tokenizer has more entries than the model, "
        "call model.resize_token_embeddings(len(tokenizer)); if -1 marks padding, replace it by -100."
    )


def refuse_second_derivative(name: str) -> None:
    """Refuse a backward pass with create_graph=True; `once_differentiable` would return a gradient without a graph.

    Raises:
        RuntimeError: in such a pass, naming the function ``name``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the scoring rules have no second derivative: call backward without create_graph=True (a penalty on "
            f"the gradient or a Hessian needs the plain torch form in {name}' documentation)."
        )


class _TokenObjective(torch.autograd.Function):
    """The objective of each token as an autograd function.

    It saves the maximum and the normalizer of each row, from which the backward pass recomputes the probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, scored: Tensor, objective: Objective, varentropy: bool
    ) -> tuple[Tensor, Tensor]:
        vocab_size = logits.shape[-1]
        threshold = tail_threshold(objective, vocab_size)
        values, columns, rows_kept, scores_kept = [], [], [], []
        for rows in row_blocks(logits, _CHUNK_ENTRIES):
            row = row_statistics(logits[rows], labels[rows], objective.needs, varentropy=varentropy)
            tail = None if threshold is None else tail_statistics(logits[rows], row, threshold)
            score = score_rows(row, objective, vocab_size, tail)
            values.append(score.value)
            columns.append(statistics_columns(row))
            if ctx.needs_input_grad[0]:
                rows_kept.append(torch.stack([row.row_max, row.normalizer]))
                parts = [torch.as_tensor(part, dtype=row.nll.dtype, device=logits.device) for part in score[1:]]
                scores_kept.append(torch.stack([part.expand_as(row.nll) for part in parts]))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, labels, scored, torch.cat(rows_kept, -1), torch.cat(scores_kept, -1))
            ctx.threshold, ctx.exponent = threshold, objective.needs.exponent
            ctx.has_f = bool(objective.entropy_weight)
        stats = torch.cat(columns)
        ctx.mark_non_differentiable(stats)
        return torch.cat(values), stats

    @staticmethod
    @ranged(ROW_PASS)
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        refuse_second_derivative("score_tokens")
        logits, labels, scored, row_scalars, coefficients = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in row_blocks(logits, _CHUNK_ENTRIES):
            row_max, normalizer = row_scalars[:, rows]
            # scaling the coefficients scales the whole row: [N] multiplications instead of [N, V]
            a, b, d, e, target, f = coefficients[:, rows] * grad_loss[rows]
            score = RowScore(grad_loss[rows], a, b, d, e, target, f if ctx.has_f else 0.0)
            part = logits_gradient(logits[rows], labels[rows], row_max, normalizer, score, ctx.threshold, ctx.exponent)
            # set to 0, not multiplied by 0: the logits of a padding position may be NaN
            gradient[rows] = part.masked_fill_(~scored[rows].unsqueeze(-1), 0.0)
        return gradient, None, None, None, None


class DPSMLoss(nn.Module):
    """The loss ``(1 - alpha) * CE + alpha * Brier`` with scheduled alpha, for a training loop of your own.

    Args:
        vocab_size: V; logits of any other width are refused.
        warmup_steps: training calls over which alpha rises from ``alpha_start`` to ``alpha_end`` (a number below 1
            is a share of ``total_steps``).
        schedule: a name that `get_alpha_schedule` knows, or a `KnobSchedule` of alpha. "feedback" is refused: it needs
            held-out metrics and therefore a trainer.
        reduction: "mean" over the scored tokens (0 when there is none), "sum", or "none" for one value per token in
            the shape of the targets, 0 where ignored.
        ignore_index: target of tokens that are not scored.
        total_steps: length of training, needed by schedules that are defined by shares of it.
        alpha_start, alpha_end, hold: as in `get_alpha_schedule`.
        fixed_alpha: the same alpha at every call, in place of a schedule.
        scoring_rule, label_smoothing, score_smoothing, focal_gamma, z_loss, entropy_weight: as in `Objective`.
        rule_parameters: values of the rule's other parameters by name, such as ``{"gce_q": 0.5}``.
        knob_schedules: schedules of other numbers than alpha, as `parse_knob_schedules` takes them.

    The buffer ``global_step`` counts the calls in training mode and is part of the state dict, so that a resumed loop
    continues at the same alpha. A call counts itself: with ``warmup_steps=W`` the first training call has alpha 1/W,
    as in the method's own code. (In `DPSMTrainer` alpha follows the finished steps, so its first step has alpha 0.)
    In evaluation mode the loss uses the alpha of the last training call, and the count stays.

    Example::

        criterion = DPSMLoss(vocab_size=50257, warmup_steps=1000)
        loss = criterion(model(input_ids).logits[:, :-1], input_ids[:, 1:])
    """

    global_step: Tensor

    def __init__(
        self,
        vocab_size: int,
        warmup_steps: float = 10000,
        schedule: str | KnobSchedule = "linear",
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = IGNORE_INDEX,
        total_steps: int = 0,
        alpha_start: float | None = None,
        alpha_end: float = 1.0,
        hold: float | None = None,
        fixed_alpha: float | None = None,
        scoring_rule: str = "dpsm",
        label_smoothing: float = 0.0,
        score_smoothing: float = 0.0,
        focal_gamma: float = 2.0,
        z_loss: float = 0.0,
        entropy_weight: float = 0.0,
        rule_parameters: Mapping[str, float] | None = None,
        knob_schedules: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if vocab_size < 2:
            raise ValueError(f"vocab_size={vocab_size} must be at least 2.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown; choose mean, sum or none.")
        if fixed_alpha is not None:
            if schedule not in ("linear", "constant") or (alpha_start, alpha_end, hold) != (None, 1.0, None):
                raise ValueError(f"fixed_alpha={fixed_alpha} takes the place of a schedule: leave out schedule, "
                                 "alpha_start, alpha_end and hold.")  # fmt: skip
            schedule, alpha_end = "constant", fixed_alpha
        if not isinstance(schedule, KnobSchedule):
            schedule = get_alpha_schedule(
                schedule, warmup_steps=warmup_steps, start=alpha_start, end=alpha_end, hold=hold
            )
        if schedule.knob != "alpha":
            raise ValueError(f"schedule moves {schedule.knob}, not alpha; give it in knob_schedules.")
        if schedule.name == "feedback":
            raise ValueError(
                "schedule='feedback' reads held-out metrics, which a loss does not have; use DPSMTrainer."
            )
        self.vocab_size, self.reduction, self.ignore_index = vocab_size, reduction, ignore_index
        self.schedule, self.total_steps = schedule, total_steps
        self.schedule.check(total_steps)
        self.options: dict[str, Any] = {
            "scoring_rule": scoring_rule, "label_smoothing": label_smoothing, "score_smoothing": score_smoothing,
            "focal_gamma": focal_gamma, "z_loss": z_loss, "entropy_weight": entropy_weight,
            **further_parameters(scoring_rule, rule_parameters),
        }  # fmt: skip
        plain = Objective(**self.options)
        self.knob_schedules = parse_knob_schedules(knob_schedules or {}, scoring_rule)
        for name, knob in self.knob_schedules.items():
            if name == "alpha" or knob.name == "feedback":
                remedy = "alpha's is schedule" if name == "alpha" else "use DPSMTrainer, which has held-out metrics"
                raise ValueError(f"knob_schedules: {name}: {knob.name} is not for here: {remedy}.")
            if getattr(plain, KNOBS[name].field) != KNOBS[name].default:
                raise ValueError(
                    f"knob_schedules has a schedule of {name}, which is given a value too; leave one out."
                )
            knob.check(total_steps)
        self.register_buffer("global_step", torch.zeros((), dtype=torch.int64))

    @property
    def alpha(self) -> float:
        """Return the Brier weight of the next call, in the present mode (training or evaluation)."""
        return self.schedule(int(self.global_step) + self.training, self.total_steps)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of ``logits`` ``[B, T, V]`` or ``[N, V]`` against ``targets`` ``[B, T]`` or ``[N]``.

        Targets must be aligned with the logits: for a causal model pass ``logits[:, :-1]`` and ``ids[:, 1:]``.
        """
        if logits.shape[-1] != self.vocab_size:
            raise ValueError(f"the logits have {logits.shape[-1]} entries a token, but DPSMLoss was made for "
                             f"vocab_size={self.vocab_size}.")  # fmt: skip
        objective = Objective(alpha=self.alpha, **self.options)
        if self.knob_schedules:
            step = int(self.global_step) + self.training
            values = {name: knob(step, self.total_steps) for name, knob in self.knob_schedules.items()}
            objective = objective_with(objective, values)
        scores = score_tokens(logits, targets, objective, ignore_index=self.ignore_index)
        assert scores.loss is not None  # an objective was given
        if self.training:
            self.global_step += 1
        if self.reduction == "none":
            return scores.loss.view_as(targets)
        total = scores.loss.sum()
        return total if self.reduction == "sum" else total / scores.scored.sum().clamp_min(1)

    def extra_repr(self) -> str:
        """Describe the loss in a printed module."""
        return f"vocab_size={self.vocab_size}, schedule={self.schedule}, reduction={self.reduction!r}"
