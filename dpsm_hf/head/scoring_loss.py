"""`linear_scoring_loss`: the loss and its gradients from hidden states, without a full tensor of logits.

It and the trainers' `FusedHead` call `score_hidden`, which leaves the work to `dpsm_hf.head.chunked`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rules.losses import IGNORE_INDEX, TokenScores, describe_invalid_labels, score_tokens
from ..rules.post_ops import PostOps
from ..rules.registry import further_parameters
from ..rules.rows import statistics_names
from ..rules.scoring_rules import Objective
from ..runtime.ranges import HEAD, ranged
from .chunked import ChunkedObjective
from .options import Head, HeadOptions, Implementation, LinearHead


def linear_scoring_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scoring_rule: str = "dpsm",
    alpha: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    score_smoothing: float = 0.0,
    focal_gamma: float = 2.0,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    impl: Implementation = "auto",
    rule_parameters: Mapping[str, float] | None = None,
) -> TokenScores:
    """Score every token from its hidden state and the output layer's weight, holding one chunk of logits at a time.

    Equivalent plain torch::

        z = F.linear(hidden_states, lm_head_weight, bias).float() * logit_scale
        z = logit_softcap * torch.tanh(z / logit_softcap)                       # where a softcap is given
        p = z.softmax(-1)
        loss = (1 - alpha) * F.cross_entropy(z, labels, reduction="none") \\
             + alpha * (p - F.one_hot(labels, V)).square().sum(-1)              # scoring_rule="dpsm"
        loss = loss[labels != ignore_index].sum() / num_items_in_batch

    Args:
        hidden_states: ``[..., D]``, float32, bfloat16, float16 or float64; leading dimensions are flattened to N.
        lm_head_weight: ``[V, D]``. It and the hidden states may each require a gradient or not.
        labels: the leading shape, int64 in ``[0, V)`` or ``ignore_index``, aligned with the hidden states: for a
            causal model pass ``hidden[:, :-1]`` and ``input_ids[:, 1:]``.
        bias: ``[V]``, added to the head's output.
        scoring_rule, alpha, label_smoothing, score_smoothing, focal_gamma, z_loss, entropy_weight: as in
            `Objective`; ``alpha`` may be a 0-d tensor, which is read without a device synchronisation.
        logit_scale, logit_softcap: the model's post-ops, as in `PostOps`.
        reduction: "mean" divides the sum over the scored tokens by ``num_items_in_batch``; "sum" does not divide;
            "none" gives one value per token, in the shape of the labels, and computes the logits a second time in the
            backward pass.
        num_items_in_batch: tokens of the whole optimizer step; None counts the scored tokens of this call.
        ignore_index: label of tokens that are not scored. Their rows are dropped before any matrix product.
        entropy: also compute each token's entropy.
        chunk_tokens: rows of a chunk. None takes 256 on a CPU, or as many as fit into 32 MiB if fewer (at least 128);
            elsewhere 2,048, or as many as fit into 512 MiB if fewer.
        impl: "torch" (in-place operations on any device), "triton" (one CUDA kernel for the row pass), "reference"
            (all logits at once), or "auto": triton on CUDA where it is installed, else torch.
        rule_parameters: values of the rule's other parameters by name, such as ``{"gce_q": 0.5}``.

    Returns:
        `TokenScores` with ``loss`` reduced by ``reduction``, and detached statistics ``[N]``; its ``entropy`` is None
        unless ``entropy=True``.

    Raises:
        ValueError: for shapes or options that do not fit, or (on a CPU) a label outside ``[0, V)``. On an accelerator
            such a label makes the loss NaN instead, since checking would synchronise with the device.

    Sources: Hsu et al., "Liger Kernel" (2024); Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models"
    (ICLR 2025).
    """
    _check_shapes(hidden_states, lm_head_weight, labels, bias)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose mean, sum or none.")
    if reduction != "mean" and num_items_in_batch is not None:
        raise ValueError(
            f"num_items_in_batch is the denominator of a mean, but reduction={reduction!r} takes none; leave one out."
        )
    own: dict[str, Any] = {**further_parameters(scoring_rule, rule_parameters)}
    objective = Objective(
        scoring_rule, alpha, label_smoothing, score_smoothing, focal_gamma, z_loss, entropy_weight, **own
    )
    options = HeadOptions(objective, PostOps(logit_scale, logit_softcap), entropy, chunk_tokens, impl)
    tokens = TokenLabels.of(labels, lm_head_weight.shape[0], ignore_index)
    if reduction == "none":
        scores = score_hidden(LinearHead(lm_head_weight, bias), hidden_states, tokens, options, denominator=None)
        return replace(scores, loss=cast(Tensor, scores.loss).view_as(labels))
    denominator: Tensor | int = 1
    if reduction == "mean":
        count = tokens.scored.sum() if num_items_in_batch is None else num_items_in_batch
        if count.numel() != 1 if isinstance(count, Tensor) else not (isinstance(count, int) and count >= 0):
            raise ValueError(f"num_items_in_batch={count} must be one whole number, the tokens of the optimizer step.")
        # a step without any scored token has a loss of 0, not 0 / 0
        denominator = count.reshape(()).clamp_min(1) if isinstance(count, Tensor) else max(1, count)
    return score_hidden(LinearHead(lm_head_weight, bias), hidden_states, tokens, options, denominator=denominator)


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or not len(weight) or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"lm_head_weight must be [V, D] with D={hidden.shape[-1]} of the hidden states {tuple(hidden.shape)}, "
            f"but is {tuple(weight.shape)}."
        )
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden_states of shape {tuple(hidden.shape)} need labels of shape {tuple(hidden.shape[:-1])}, "
            f"but they have {tuple(labels.shape)}."
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64, but are {labels.dtype}; convert them with labels.long().")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), but has {tuple(bias.shape)}.")


class ScoredRows:
    """Find the scored tokens of a batch, on a GPU without stalling it.

    The host needs their number for the shapes of the matrix products. The count is started here, before the model's
    forward is queued, and is ready by the time the host reaches the head; the device has the forward to work on
    meanwhile.
    """

    def __init__(self, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> None:
        self._scored = labels.reshape(-1) != ignore_index
        if labels.device.type == "cuda":
            # a stable sort puts the scored tokens first in their order, so only the length of that prefix is missing
            self._order = (~self._scored).to(torch.int8).argsort(stable=True)
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_(self._scored.sum(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def indices(self) -> Tensor:
        """Return the indices of the scored tokens, in order."""
        if self._scored.device.type == "cuda":
            self._event.synchronize()
            return self._order[: int(self._count)]
        return self._scored.nonzero().squeeze(-1)


@dataclass(frozen=True)
class TokenLabels:
    """The labels of a batch, flattened to N, and which of them are scored.

    Args:
        labels: ``[N]`` int64; 0 in place of a label that is ignored or invalid.
        scored: bool ``[N]``, False where the label is ignored.
        rows: indices of the scored tokens in order; None if all are scored.
        invalid: bool ``[N]``, True for a label outside the vocabulary; None if there are known to be none.
    """

    labels: Tensor
    scored: Tensor
    rows: Tensor | None
    invalid: Tensor | None

    @classmethod
    def of(
        cls, labels: Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX, rows: Tensor | None = None
    ) -> TokenLabels:
        """Return the flattened and checked labels of a batch.

        Args:
            labels: of any shape.
            vocab_size: V.
            ignore_index: label of tokens that are not scored.
            rows: indices of the scored tokens, if the caller has them; finding them synchronises with a GPU.

        Raises:
            ValueError: on a CPU, for a label outside ``[0, vocab_size)``.
        """
        flat = labels.reshape(-1)
        scored = flat != ignore_index
        invalid: Tensor | None = scored & ((flat < 0) | (flat >= vocab_size))
        if labels.device.type == "cpu":
            if bool(cast(Tensor, invalid).any()):
                raise ValueError(describe_invalid_labels(labels, vocab_size, ignore_index))
            invalid = None
        safe = torch.where(scored if invalid is None else scored & ~invalid, flat, 0)
        if rows is None:
            rows = ScoredRows(labels, ignore_index).indices()
        return cls(safe, scored, None if len(rows) == len(flat) else rows, invalid)

    @property
    def kept(self) -> Tensor:
        """Return the labels of the scored tokens, ``[M]``."""
        return self.labels if self.rows is None else self.labels[self.rows]


@ranged(HEAD)
def score_hidden(
    head: Head, hidden_states: Tensor, tokens: TokenLabels, options: HeadOptions, *, denominator: Tensor | int | None
) -> TokenScores:
    """Score every token of a batch from its hidden state, by the head's output and the options.

    Args:
        head: the output layer.
        hidden_states: ``[..., D]``, flattened to N.
        tokens: the labels of the same N tokens.
        options: the scoring rule, the post-ops, the chunk size.
        denominator: the loss is the sum over tokens divided by this; None returns one value per token, ``[N]``.
    """
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    if options.impl == "reference":
        return _score_all_logits(head, hidden, tokens, options, denominator)
    parameters = head.parameters
    if not torch.is_grad_enabled():
        # under no_grad an autograd function still sees requires_grad of its inputs, and would compute gradients
        hidden, parameters = hidden.detach(), tuple(None if p is None else p.detach() for p in parameters)
    loss, values, statistics = ChunkedObjective.apply(
        hidden, head, tokens.kept, tokens.rows, options, denominator, *parameters
    )
    result: Tensor | None = None
    if options.objective is not None:
        result = values if denominator is None else loss
    if tokens.rows is not None:
        size = len(tokens.scored)
        statistics = statistics.new_zeros(size, statistics.shape[-1]).index_copy_(0, tokens.rows, statistics)
        if denominator is None and result is not None:
            result = result.new_zeros(size).index_copy(0, tokens.rows, result)
    if result is not None and tokens.invalid is not None:
        poison = tokens.invalid if denominator is None else tokens.invalid.any()
        result = torch.where(poison, torch.nan, result)
    known = statistics_names(options.entropy, options.varentropy)
    columns = dict(zip(known, statistics[:, : len(known)].unbind(-1), strict=True))
    extra = None if options.extra is None else statistics[:, len(known) :]
    return TokenScores(loss=result, scored=tokens.scored, extra=extra, **{"entropy": None, **columns})


def _score_all_logits(
    head: Head, hidden: Tensor, tokens: TokenLabels, options: HeadOptions, denominator: Tensor | int | None
) -> TokenScores:
    z = F.linear(hidden, head.weight, head.bias) if isinstance(head, LinearHead) else head.forward(hidden)
    z = options.post(z if z.dtype == torch.float64 else z.float())
    labels = torch.where(tokens.scored, tokens.labels, IGNORE_INDEX)
    scores = score_tokens(z, labels, options.objective, extra=options.extra, varentropy=options.varentropy)
    loss = scores.loss
    if loss is not None and tokens.invalid is not None:
        loss = torch.where(tokens.invalid, torch.nan, loss)
    if loss is not None and denominator is not None:
        loss = loss.sum() / denominator
    return replace(scores, loss=loss) if options.entropy else replace(scores, loss=loss, entropy=None, varentropy=None)
