"""What a scoring rule consists of: the class that each file in `dpsm_hf.rules.formulas` makes one object of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .rows import RowScore, RowStatistics


class RuleOptions(NamedTuple):
    """What a formula is given beside the statistics of the rows."""

    vocab_size: int
    alpha: float | Tensor  # weight of the Brier score in the mix
    label_smoothing: float
    score_smoothing: float
    parameters: tuple[float, ...]  # values of the rule's own parameters, in its order
    tail: tuple[Tensor, Tensor] | None  # with score smoothing, see `tail_statistics`


@dataclass(frozen=True)
class Parameter:
    """A number of one rule, which becomes a field of `Objective` and of the training arguments.

    Args:
        name: of the field.
        default: its value where nothing is said.
        help: what it is, for ``--help``.
        allowed: tells whether a value is in range.
        must: what an error says of a value that is not: "lie in (0, 1]".
    """

    name: str
    default: float
    help: str
    allowed: Callable[[float], bool]
    must: str


@dataclass(frozen=True)
class Rule:
    """One scoring rule.

    Args:
        name: value of ``loss_type``.
        score: from the statistics of the rows to their values and gradient coefficients.
        kernel: the same for one row, in Triton's language; `dpsm_hf.head.kernels` makes Triton functions of all that
            end in ``kernel`` in the files of the rules. Arguments: ``weight`` (a factor of everything it returns),
            ``p, q, r, nll, log_sum, norm, mean`` (the row: p_y, 1 - p_y, sum of the other p_j**2, -log p_y,
            log sum exp z, ||p||, mean of z), ``size`` (V), ``epsilon`` (of the smoothing), ``share`` (epsilon / V),
            ``parameters`` (a tuple), ``alpha``, and the constant ``SMOOTHING`` (0 none, 1 of the label, 2 of the
            score). It returns value, a, b, d, the weight of score smoothing's tail, and the target's gradient.
        formula, proper, bounds, source: cells of the table in docs/losses.md.
        order: place in lists; rules of one place follow by name.
        parameters: numbers that are this rule's own.
        score_smoothing: whether score smoothing is defined for it.
    """

    name: str
    score: Callable[[RowStatistics, RuleOptions], RowScore]
    kernel: Callable[..., Any]
    formula: str
    proper: str
    bounds: str
    source: str
    order: int = 100
    parameters: tuple[Parameter, ...] = ()
    score_smoothing: bool = False


def with_tail(score: RowScore, row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return a rule with the log tail that score smoothing adds to it."""
    if options.tail is None:
        return score
    count, minus_log = options.tail
    share = options.score_smoothing / options.vocab_size
    own = share * (count * row.p_target - (row.p_target < share).to(count.dtype))
    return score.plus(RowScore(share * minus_log, share * count, 0.0, 0.0, -share, own))
