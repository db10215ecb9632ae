"""The statistics of a row of logits that every scoring rule is computed from, the gradient of a row, and `Rule`.

For logits ``z`` of shape ``[V]``, target ``y`` and ``p = softmax(z)``, the value of every rule here depends on the row
only through a few scalars, the *row statistics*, and its gradient has one form::

    dL/dz_j = a p_j + b p_j**k + d + e [p_j < tail_threshold] + f p_j log p_j    for j != y,        dL/dz_y = target

with ``k = 2`` for all rules but the power score.

So nothing of size ``[N, V]`` is needed except the logits and their gradient: no one-hot, no stored softmax. The sums
``u`` and ``Q`` below leave out the target, so that ``1 - p_y = u / S`` and ``||p||**2 - p_y**2 = Q / S**2`` are
accurate as ``p_y -> 1``, where the textbook forms cancel::

    m = max z    e_j = exp(z_j - m)    u = sum_{j != y} e_j    Q = sum_{j != y} e_j**2    S = u + e_y
    p_y = e_y / S        q = 1 - p_y = u / S        r = Q / S**2        ||p||**2 = p_y**2 + r
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The statistics of every scored token; the last two, entropy and varentropy, are computed only if they are requested.
STATISTICS = ("nll", "brier", "spherical", "confidence", "correct", "entropy", "varentropy")

#: A logit so far below the largest has the probability 0 in float32 and float64; its square must not overflow.
LEAST_SHIFTED = -1e4


#: So many of the most likely tokens are what `RowStatistics.top_entropy` looks at.
TOP_TOKENS = 20


class RowNeeds(NamedTuple):
    """What a training objective needs of a row beside the statistics that every rule gets."""

    exponent: float = 2.0  # k of the gradient's second term
    top_entropy: bool = False
    entropy: bool = False


class RowStatistics(NamedTuple):
    """The scalars of each row that every rule is computed from, each ``[N]``, float32 or float64."""

    row_max: Tensor  # m = max_j z_j
    normalizer: Tensor  # S = sum_j exp(z_j - m)
    p_target: Tensor  # p_y
    miss: Tensor  # q = 1 - p_y
    off_norm: Tensor  # r = sum_{j != y} p_j**2
    nll: Tensor  # -log p_y, in nats
    correct: Tensor  # bool: y attains the maximum
    mean_logit: Tensor  # mean_j z_j
    entropy: Tensor  # -sum_j p_j log p_j, in nats
    other_power: Tensor  # sum_{j != y} p_j**k
    top_entropy: Tensor | None = None  # of the softmax over the largest logits, in nats, where it is needed
    varentropy: Tensor | None = None  # sum_j p_j (log p_j)**2 - entropy**2; None if it was not requested

    @property
    def confidence(self) -> Tensor:
        """Return the largest probability of each row, ``max_j p_j = 1 / S``."""
        return 1.0 / self.normalizer

    @property
    def log_normalizer(self) -> Tensor:
        """Return ``log sum_j exp z_j = m + log S``."""
        return self.row_max + self.normalizer.log()

    @property
    def brier(self) -> Tensor:
        """Return ``sum_j (p_j - [j = y])**2 = q**2 + r``, in [0, 2]."""
        return self.miss.square() + self.off_norm

    @property
    def spherical(self) -> Tensor:
        """Return ``1 - p_y / ||p|| = r / (n (n + p_y))`` with ``n = ||p||``, in [0, 1]."""
        norm = (self.p_target.square() + self.off_norm).sqrt()
        return self.off_norm / (norm * (norm + self.p_target))


def top_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax over the `TOP_TOKENS` largest logits of each row, ``[N]``, in nats.

    Equivalent: ``torch.distributions.Categorical(logits=logits.topk(20).values).entropy()``.
    """
    largest = logits.topk(min(TOP_TOKENS, logits.shape[-1])).values
    wide = largest if largest.dtype == torch.float64 else largest.float()
    shifted = (wide[:, 1:] - wide[:, :1]).clamp_min(torch.finfo(wide.dtype).min)  # a masked logit is -inf
    weight = shifted.exp()
    others = weight.sum(-1)
    return others.log1p() - (weight * shifted).sum(-1) / (1.0 + others)  # accurate as the first becomes certain


_NOTHING_MORE = RowNeeds()


def row_statistics(
    logits: Tensor, labels: Tensor, needs: RowNeeds = _NOTHING_MORE, *, varentropy: bool = False
) -> RowStatistics:
    """Reduce each row of logits to the scalars of `RowStatistics`, in float32 (float64 for float64 logits).

    Equivalent plain torch, but accurate near ``p_y = 1``: ``p = logits.float().softmax(-1)``,
    ``p_target = p.gather(-1, labels)``, ``off_norm = (p**2).sum(-1) - p_target**2`` and so on.

    Args:
        logits: ``[N, V]`` of any floating dtype.
        labels: ``[N]`` int64, each in ``[0, V)``.
        needs: what else to compute.
        varentropy: also compute the variance of ``log p_j`` under p.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    index = labels.unsqueeze(-1)
    row_max = z.amax(-1, keepdim=True)
    shifted = z - row_max
    weight = shifted.exp()
    target_shifted = shifted.gather(-1, index).squeeze(-1)
    target_weight = weight.gather(-1, index).squeeze(-1)
    # a masked logit is -inf with weight 0, and 0 * -inf would be NaN
    entropy_sum = (weight * shifted.clamp_min(torch.finfo(z.dtype).min)).sum(-1)
    spread = None
    if varentropy:  # log p_j is the shifted logit less a constant of the row, so the variances are equal
        total = weight.sum(-1, keepdim=True)
        distance = shifted.clamp_min(LEAST_SHIFTED) - entropy_sum.unsqueeze(-1) / total
        spread = (weight * distance.square_()).sum(-1) / total.squeeze(-1)
    weight = weight.scatter_(-1, index, 0.0)
    others = weight.sum(-1)
    normalizer = others + target_weight
    correct = target_shifted >= 0
    log_normalizer = torch.where(correct, others.log1p(), normalizer.log())
    k = needs.exponent
    off_power = None if k == 2.0 else weight.pow(k).sum(-1) / normalizer.pow(k)
    off_norm = weight.square_().sum(-1) / normalizer.square()
    return RowStatistics(
        row_max=row_max.squeeze(-1),
        normalizer=normalizer,
        p_target=target_weight / normalizer,
        miss=others / normalizer,
        off_norm=off_norm,
        nll=log_normalizer - target_shifted,
        correct=correct,
        mean_logit=z.mean(-1),
        entropy=log_normalizer - entropy_sum / normalizer,
        other_power=off_norm if off_power is None else off_power,
        top_entropy=top_entropy(z) if needs.top_entropy else None,
        varentropy=spread,
    )


def statistics_names(entropy: bool, varentropy: bool) -> tuple[str, ...]:
    """Return which of `STATISTICS` are computed; varentropy, the variance about the entropy, only along with it."""
    return STATISTICS[: len(STATISTICS) - 2 + (1 + varentropy if entropy else 0)]


def statistics_columns(row: RowStatistics, entropy: bool = True) -> Tensor:
    """Return the columns named in `STATISTICS`, ``[n, 7]``; ``[n, 6]`` without varentropy, ``[n, 5]`` without both."""
    columns = [row.nll, row.brier, row.spherical, row.confidence, row.correct.to(row.nll.dtype)]
    if entropy:
        columns += [row.entropy] if row.varentropy is None else [row.entropy, row.varentropy]
    return torch.stack(columns, dim=-1)


class RowScore(NamedTuple):
    """The value and the gradient coefficients of a rule for each row; they stand in the module's first formula."""

    value: Tensor
    a: Tensor | float  # times p_j
    b: Tensor | float  # times p_j**k
    d: Tensor | float  # constant over the row
    e: Tensor | float  # added where p_j < tail_threshold
    target: Tensor  # the gradient of the target's logit
    f: Tensor | float = 0.0  # times p_j log p_j

    def scaled(self, weight: float | Tensor) -> RowScore:
        """Return the score of ``weight * rule``; a coefficient of 0 stays a number, which the row pass leaves out."""
        parts = (part if isinstance(part, float) and not part else weight * part for part in self)
        return RowScore(*parts)  # type: ignore[arg-type]

    def plus(self, other: RowScore) -> RowScore:
        """Return the score of the sum of two rules."""
        return RowScore(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))  # type: ignore[arg-type]


def tail_statistics(logits: Tensor, row: RowStatistics, threshold: float) -> tuple[Tensor, Tensor]:
    """Return for each row the number of ``p_j < threshold`` and the sum of their ``-log p_j``; both ``[N]``."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_p = z - row.log_normalizer.unsqueeze(-1)
    masked = log_p.exp() < threshold
    return masked.sum(-1).to(z.dtype), -torch.where(masked, log_p, 0.0).sum(-1)


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    normalizer: Tensor,
    score: RowScore,
    threshold: float | None,
    exponent: float = 2.0,
) -> Tensor:
    """Return the gradient of each row's score with respect to its logits, ``[N, V]``, in float32 or float64."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    p = (z - row_max.unsqueeze(-1)).exp_().div_(normalizer.unsqueeze(-1))
    return gradient_in_place(p, labels.unsqueeze(-1), score, threshold, exponent=exponent)


def gradient_in_place(
    p: Tensor,
    labels: Tensor,
    score: RowScore,
    threshold: float | Tensor | None,
    spare: Tensor | None = None,
    exponent: float = 2.0,
) -> Tensor:
    """Overwrite the probabilities ``[n, V]`` of some rows with the gradient of their score, and return it.

    Equivalent: ``a * p + b * p**exponent + d + e * (p < threshold) + f * p * log(p)`` with the entry of the labels,
    ``[n, 1]``, replaced by ``score.target``. ``spare`` is a buffer of the shape of p, which is overwritten.
    """
    tail = None if threshold is None else (p < threshold) * _column(score.e)
    factor = _column(score.a)
    if _used(score.f):
        # 0 * log 0 is 0: a probability that underflowed counts as the smallest number
        smallest = torch.finfo(p.dtype).tiny
        factor = torch.clamp_min(p, smallest, out=spare).log_().mul_(_column(score.f)).add_(factor)
        if _used(score.b):
            factor.addcmul_(p if exponent == 2.0 else p.pow(exponent - 1.0), torch.as_tensor(_column(score.b)))
    elif _used(score.b):
        power = p if exponent == 2.0 else torch.pow(p, exponent - 1.0, out=spare)
        factor = torch.mul(power, _column(score.b), out=spare).add_(factor)
    p.mul_(factor)
    if _used(score.d):
        p.add_(_column(score.d))
    if tail is not None:
        p.add_(tail)
    # the target's entry is replaced, not corrected: adding to what stands there would cancel as p_y -> 1
    return p.scatter_(-1, labels, score.target.unsqueeze(-1))


def _used(coefficient: Tensor | float) -> bool:
    return isinstance(coefficient, Tensor) or bool(coefficient)


def _column(value: Tensor | float) -> Tensor | float:
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() else value


def row_blocks(logits: Tensor, entries: int) -> Iterator[slice]:
    """Return slices that cut the rows into blocks of at most ``entries`` numbers, or of one row.

    An empty batch has one, empty block.
    """
    size = max(1, entries // max(1, logits.shape[-1]))
    return (slice(start, start + size) for start in range(0, max(1, len(logits)), size))


# ---- what a rule consists of ---------------------------------------------------------------------------------------


class RuleOptions(NamedTuple):
    """The options that a rule's ``score`` function gets in addition to the row statistics."""

    vocab_size: int
    alpha: float | Tensor  # weight of the Brier score in the mix
    label_smoothing: float
    score_smoothing: float
    parameters: tuple[float, ...]  # values of the rule's own parameters, in its order
    tail: tuple[Tensor, Tensor] | None  # from `tail_statistics`; None without score smoothing


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rule, such as gamma; it becomes a field of `Objective` and of the training arguments.

    Args:
        name: of the field.
        default: its default.
        help: its description for ``--help``.
        allowed: returns whether a value is in range.
        must: the range in words for the error message after "must": "lie in (0, 1]".
    """

    name: str
    default: float
    help: str
    allowed: Callable[[float], bool]
    must: str


@dataclass(frozen=True)
class Rule:
    """One scoring rule; each file in `dpsm_hf.rules.formulas` makes one.

    Args:
        name: the value of ``scoring_rule`` that selects it.
        score: computes the values and gradient coefficients of rows from their statistics, in torch.
        kernel: the same for one row, in Triton's language. `dpsm_hf.head.kernels` compiles every function whose name
            ends in ``kernel`` in the files of the rules. Arguments: ``weight`` (all results are multiplied by it),
            ``p, q, r, nll, log_sum, norm, mean, power, top`` (of the row: p_y, 1 - p_y, sum of the other p_j**2,
            -log p_y, log sum exp z, ||p||, mean of z, sum of the other p_j**exponent, entropy of the most likely
            tokens), ``size`` (V), ``epsilon`` (of the smoothing), ``share`` (epsilon / V),
            ``parameters`` (a tuple), ``alpha``, and the constant ``SMOOTHING`` (0 none, 1 label smoothing, 2 score
            smoothing). It returns value, a, b, d, the weight of score smoothing's tail, and the target's gradient.
        formula, proper, bounds, source: cells of the table in docs/losses.md.
        order: position in lists; rules of equal order are sorted by name.
        parameters: the rule's own parameters.
        score_smoothing: whether score smoothing is defined for it.
        exponent: returns the power of p_j in the gradient's second term, from the parameters; None is 2.
        top_entropy: whether it reads `RowStatistics.top_entropy`.
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
    exponent: Callable[[tuple[float, ...]], float] | None = None
    top_entropy: bool = False


def with_tail(score: RowScore, row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return a rule's score with the log tail that score smoothing adds; unchanged without score smoothing.

    The tail is ``-(epsilon / V) * sum_{j: p_j < epsilon / V} log p_j``. Source: Shao et al. (ICML 2024).
    """
    if options.tail is None:
        return score
    count, minus_log = options.tail
    share = options.score_smoothing / options.vocab_size
    own = share * (count * row.p_target - (row.p_target < share).to(count.dtype))
    return score.plus(RowScore(share * minus_log, share * count, 0.0, 0.0, -share, own))
