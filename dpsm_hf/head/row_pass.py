"""The row pass: overwrite a chunk of logits with its gradient and return the score and statistics of each row.

It is the step between the matrix products of the fused head, in plain torch operations for any device. It works on
blocks of rows that fit into the processor's cache, each converted to float32 once, so the logits are read from memory
once and written once, and the arithmetic costs little next to the matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules.post_ops import PostOps
from ..rules.rows import (
    LEAST_SHIFTED,
    RowNeeds,
    RowScore,
    RowStatistics,
    gradient_in_place,
    row_blocks,
    statistics_columns,
    tail_statistics,
    top_entropy,
)
from ..rules.scoring_rules import Objective, score_rows, tail_threshold

# Two blocks of this many float32 entries fit into a CPU's cache; other devices run fewer, larger operations faster.
_CPU_BLOCK_ENTRIES = 2**20
_DEVICE_BLOCK_ENTRIES = 2**26


def device_scalar(value: Tensor | float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a number as a 0-d tensor on the device, by a fill: a copy from the host would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)


def row_pass(
    logits: Tensor, labels: Tensor, objective: Objective | None, post: PostOps, *,
    weight: Tensor | float = 1.0, entropy: bool = False, varentropy: bool = False, gradient: bool = True,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Score each row of a chunk and overwrite the chunk with the gradient of ``sum(weight * value)``.

    Equivalent plain torch: ``score_tokens(post(logits.float()), labels, objective)`` and its backward.

    Args:
        logits: the head's output before the post-ops, ``[n, V]``, each row contiguous; overwritten if ``gradient``.
        labels: ``[n]`` int64, every one in ``[0, V)``; the caller has dropped the ignored rows.
        objective: the scoring rule; None computes the statistics only.
        post: the model's post-ops.
        weight: what each row's gradient is multiplied by: one for each row, ``[n]``, or one for all.
        entropy: also compute the entropy of each row, which reads the logits once more.
        varentropy: with entropy, also compute the variance of ``log p_j`` under p, in a buffer of its own.
        gradient: write the gradient.

    Returns:
        The value of each row ``[n]`` in float32 (None without objective), and the statistics ``[n, 5]``, with
        entropy ``[n, 6]`` and with varentropy ``[n, 7]``, whose columns `STATISTICS` names.
    """
    rows, vocab_size = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entries = _CPU_BLOCK_ENTRIES if logits.device.type == "cpu" else _DEVICE_BLOCK_ENTRIES
    size = max(1, min(rows, entries // vocab_size))  # the rows of a block, as `row_blocks` cuts them
    varentropy = varentropy and entropy
    work = torch.empty(2 if post.softcap is None else 3, size, vocab_size, dtype=dtype, device=logits.device)
    values, columns = [], []
    for part in row_blocks(logits, entries):
        block, target = logits[part], labels[part].unsqueeze(-1)
        row, p, total, spare = _reduce(block, target, post, objective, entropy, varentropy, work)
        columns.append(statistics_columns(row, entropy))
        if objective is None:
            continue
        threshold = tail_threshold(objective, vocab_size)
        tail = None if threshold is None else tail_statistics(post(block.to(dtype)), row, threshold)
        score = score_rows(row, objective, vocab_size, tail)
        values.append(score.value)
        if gradient:
            block_weight = weight[part] if isinstance(weight, Tensor) and weight.dim() else weight
            exponent = objective.needs.exponent
            scaled = _for_sums_of(total, score.scaled(block_weight * post.scale), exponent)
            least = None if threshold is None else threshold * total.unsqueeze(-1)
            slope = gradient_in_place(p, target, scaled, least, spare, exponent)
            if post.softcap is not None:
                slope.mul_(work[2, : len(block)].square_().neg_().add_(1.0))
            block.copy_(slope)
    return torch.cat(values) if values else None, torch.cat(columns)


def _for_sums_of(total: Tensor, score: RowScore, exponent: float) -> RowScore:
    """Return a score whose gradient is to be computed from probabilities that add up to ``total`` in place of 1."""
    a, b, f = score.a / total, score.b, score.f
    if isinstance(b, Tensor) or b:
        b = b / total.pow(exponent)
    if isinstance(f, Tensor) or f:  # p log p with p = p' / total
        f = f / total
        a = a - f * total.log()
    return RowScore(score.value, a, b, score.d, score.e, score.target, f)


def _reduce(
    block: Tensor, target: Tensor, post: PostOps, objective: Objective | None, entropy: bool, varentropy: bool,
    work: Tensor,
) -> tuple[RowStatistics, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the statistics of a block, its probabilities, what those add up to, and a free buffer.

    PyTorch's float32 softmax adds up its normalizer one after the other: for a large vocabulary on a CPU that is wrong
    by up to 3e-5, and so is every probability. ``sum`` adds in pairs, so their sum tells the error to rounding. The
    statistics are free of it; the probabilities, whose target is set to 0, still have to be divided by their sum.
    """
    n = len(block)
    p, spare = work[0, :n], work[1, :n]
    if post.softcap is not None:
        work[2, :n].copy_(block).mul_(post.scale / post.softcap).tanh_()

    def logits() -> Tensor:  # in the free buffer, unless the block holds them as they are
        if post.softcap is not None:
            return torch.mul(work[2, :n], post.softcap, out=spare)
        return block if post.scale == 1.0 else torch.mul(spare.copy_(block), post.scale, out=spare)

    def below_largest(z: Tensor) -> Tensor:
        return torch.sub(z, z_max, out=spare) if z.dtype == p.dtype else spare.copy_(z).sub_(z_max)

    z = logits()
    z_max = z.amax(-1, keepdim=True)
    z_target = z.gather(-1, target)
    needs = RowNeeds() if objective is None else objective.needs
    smoothed = objective is not None and objective.label_smoothing > 0
    top = top_entropy(z) if needs.top_entropy else None
    mean = z.mean(-1, dtype=p.dtype) if smoothed else z_max.squeeze(-1).to(p.dtype)
    torch.softmax(z, -1, dtype=p.dtype, out=p)
    largest = p.amax(-1)
    p_target = p.gather(-1, target).squeeze(-1)
    shifted = (z_target.to(p.dtype) - z_max.to(p.dtype)).squeeze(-1)
    entropy_sum = torch.zeros_like(largest)
    spread: Tensor | None = None
    if entropy or needs.entropy:
        # a masked logit is -inf with p = 0, and 0 * -inf would be NaN
        entropy_sum = below_largest(z).clamp_min_(torch.finfo(p.dtype).min).mul_(p).sum(-1)
    if varentropy:  # log p_j is the shifted logit less a constant of the row, so the variances are equal
        distance = below_largest(logits()).clamp_min_(LEAST_SHIFTED).sub_(entropy_sum.unsqueeze(-1))
        spread = distance.square_().mul_(p).sum(-1)
    p.scatter_(-1, target, 0.0)
    others = p.sum(-1)
    total = others + p_target
    confidence, miss = largest / total, others / total
    off_norm = torch.mul(p, p, out=spare).sum(-1) / total.square()  # vector_norm has a hundred times its error
    k = needs.exponent
    # k = 1.5, the power score's default, is a square root so, which is much faster than a power
    other_power = off_norm if k == 2.0 else torch.pow(p, k - 1.0, out=spare).mul_(p).sum(-1) / total.pow(k)
    correct = shifted >= 0
    # log S = log1p(sum of the others' exp) where y is the largest: exact for p_y -> 1, where log(S) loses digits
    log_normalizer = torch.where(correct, torch.log1p(others / largest), -confidence.log())
    row = RowStatistics(
        row_max=z_max.squeeze(-1).to(p.dtype),
        normalizer=1.0 / confidence,
        p_target=p_target / total,
        miss=miss,
        off_norm=off_norm,
        nll=log_normalizer - shifted,
        correct=correct,
        mean_logit=mean,
        entropy=log_normalizer - entropy_sum / total,
        other_power=other_power,
        top_entropy=top,
        # taken about a mean that is off by 3e-5 of it, whose square is below rounding
        varentropy=None if spread is None else spread / total,
    )
    return row, p, total, spare
