"""The row pass through torch.compile: the formulas of `rules.scoring_rules` as they stand, fused by Inductor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..rules.post_ops import PostOps
from ..rules.rows import logits_gradient, row_statistics, statistics_columns, tail_statistics
from ..rules.scoring_rules import Objective, score_rows, tail_threshold
from .row_pass import device_scalar


def compiled_row_pass(
    logits: Tensor,
    labels: Tensor,
    objective: Objective | None,
    post: PostOps,
    *,
    weight: Tensor | float = 1.0,
    entropy: bool = False,
    gradient: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Do what `row_pass` does; the first call of each kind compiles for some seconds."""
    if objective is not None:
        # as numbers they would be constants of the program, compiled again whenever alpha moves
        objective = replace(objective, alpha=device_scalar(objective.alpha, logits.device))
    factor = device_scalar(weight, logits.device)
    wanted = gradient and objective is not None
    value, columns, result = _program()(logits, labels, objective, post, factor, entropy, wanted)
    if result is not None:
        logits.copy_(result)
    return value, columns


@functools.cache
def _program() -> Callable[..., Any]:
    return torch.compile(_row_pass, dynamic=True)


def _row_pass(
    logits: Tensor,
    labels: Tensor,
    objective: Objective | None,
    post: PostOps,
    weight: Tensor,
    entropy: bool,
    gradient: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    raw = logits if logits.dtype == torch.float64 else logits.float()
    z = post(raw)
    row = row_statistics(z, labels)
    columns = statistics_columns(row, entropy)
    if objective is None:
        return None, columns, None
    threshold = tail_threshold(objective, z.shape[-1])
    tail = None if threshold is None else tail_statistics(z, row, threshold)
    score = score_rows(row, objective, z.shape[-1], tail)
    if not gradient:
        return score.value, columns, None
    result = logits_gradient(z, labels, row.row_max, row.normalizer, score.scaled(weight * post.scale), threshold)
    if post.softcap is not None:
        result = result * (1 - (z / post.softcap).square())
    return score.value, columns, result.to(logits.dtype)
