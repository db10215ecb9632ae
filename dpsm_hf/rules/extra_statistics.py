"""Further statistics of each token for an evaluation, computed from a chunk of logits before it is freed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .rows import LEAST_SHIFTED, STATISTICS, row_blocks, row_statistics, statistics_columns

MOMENTS = ("nll", "gradient", "curvature")
BRIER_MOMENTS = ("brier", "gradient", "curvature")
GAP_MOMENTS = ("gap", "gradient")

# Rows are taken in blocks whose float32 copy has at most this many entries (16 MiB).
_BLOCK_ENTRIES = 2**22


@dataclass(frozen=True)
class ExtraColumns:
    """The columns of `ExtraStatistics` by what they are; empty, or None, where they were not asked for."""

    #: for each of the temperatures, the statistics there by name, each ``[N]``
    scaled: tuple[dict[str, Tensor], ...] = ()
    moments: Tensor | None = None  #: ``[N, 3]``, columns `MOMENTS`
    brier_moments: Tensor | None = None  #: ``[N, 3]``, columns `BRIER_MOMENTS`
    gap_moments: Tensor | None = None  #: ``[N, 2]``, columns `GAP_MOMENTS`
    classes: Tensor | None = None  #: ``[N, K]``, probabilities
    groups: Tensor | None = None  #: ``[N, G]``, probabilities


@dataclass(frozen=True)
class ExtraStatistics:
    """Further statistics to compute for each scored token: a few columns per token, never ``[N, V]``.

    Args:
        temperatures: the token is scored again from ``logits / T`` for each T: the columns of `STATISTICS`.
        moments_at: T at which to compute the token's NLL from ``logits / T`` and its first and second derivative with
            respect to log T: the columns of `MOMENTS`.
        brier_moments_at: the same of the token's Brier score: the columns of `BRIER_MOMENTS`.
        gap_moments_at: T at which to compute ``max_j p_j - [the label has the largest logit]`` and its derivative with
            respect to log T: the columns of `GAP_MOMENTS`.
        classes: int64 ``[K]``, token ids whose predicted probabilities are kept at every scored token.
        groups: int64 ``[ids]``, the group of every token, 0 to G - 1; the probability of each group is kept at every
            scored token. Rows of logits may be longer: further tokens belong to the last group.
        number_of_groups: G.
    """

    temperatures: tuple[float, ...] = ()
    moments_at: float | None = None
    brier_moments_at: float | None = None
    gap_moments_at: float | None = None
    classes: Tensor | None = None
    groups: Tensor | None = None
    number_of_groups: int = 0
    _members: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def width(self) -> int:
        """Return the number of columns."""
        return sum(self._widths())

    def _widths(self) -> tuple[int, ...]:
        """Return the number of columns of each field of `ExtraColumns`, in their order."""
        return (
            len(STATISTICS) * len(self.temperatures),
            0 if self.moments_at is None else len(MOMENTS),
            0 if self.brier_moments_at is None else len(BRIER_MOMENTS),
            0 if self.gap_moments_at is None else len(GAP_MOMENTS),
            0 if self.classes is None else len(self.classes),
            self.number_of_groups,
        )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the columns for some rows of logits, ``[n, width]`` in float32 (float64 for float64 logits).

        Args:
            logits: ``[n, V]``, after the model's post-ops; not changed.
            labels: ``[n]`` int64, each in ``[0, V)``.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        found = logits.new_empty(len(logits), self.width, dtype=dtype)
        for rows in row_blocks(logits, _BLOCK_ENTRIES):
            z, y = logits[rows].to(dtype), labels[rows]
            columns: list[Tensor] = []
            for temperature in self.temperatures:
                columns.append(statistics_columns(row_statistics(z / temperature, y, varentropy=True)))
            if self.moments_at is not None:
                columns.append(torch.stack(_moments(z / self.moments_at, y), -1))
            if self.brier_moments_at is not None:
                columns.append(torch.stack(_brier_moments(z / self.brier_moments_at, y), -1))
            if self.gap_moments_at is not None:
                columns.append(torch.stack(_gap_moments(z / self.gap_moments_at, y), -1))
            if self.classes is not None:
                log_normalizer = z.logsumexp(-1, keepdim=True)
                columns.append((z[:, self.classes.to(z.device)] - log_normalizer).exp())
            if self.groups is not None:
                with torch.autocast(z.device.type, enabled=False):  # it would round the probabilities to 16 bits
                    columns.append(torch.softmax(z, -1) @ self._membership(z))
            found[rows] = torch.cat(columns, -1)
        return found

    def _membership(self, z: Tensor) -> Tensor:
        """Return ``[V, G]``, 1 where a token belongs to a group; made once for the logits of a model."""
        assert self.groups is not None
        if not self._members or self._members[0].shape[0] != z.shape[-1] or self._members[0].device != z.device:
            groups = self.groups.to(z.device)[: z.shape[-1]]
            further = groups.new_full((z.shape[-1] - len(groups),), self.number_of_groups - 1)
            members = torch.nn.functional.one_hot(torch.cat([groups, further]), self.number_of_groups)
            self._members[:] = [members.to(z.dtype)]
        return self._members[0].to(z.dtype)

    def split(self, columns: Tensor) -> ExtraColumns:
        """Return the columns ``[N, width]`` by what they are."""
        scaled, *others = columns.split(self._widths(), -1)
        size = len(STATISTICS)
        return ExtraColumns(
            tuple(dict(zip(STATISTICS, part.unbind(-1), strict=True)) for part in scaled.split(size, -1))
            if self.temperatures
            else (),
            *(part if part.shape[-1] else None for part in others),
        )


def _moments(u: Tensor, labels: Tensor) -> list[Tensor]:
    """Return ``nll``, ``d nll / d log T = H - nll`` and ``d2 nll / d log T**2 = nll - H + Var_p(log p)``; ``[n]``.

    ``u = z / T`` are the scaled logits, H is the entropy of ``p = softmax(u)``. They follow from
    ``du / d log T = -u`` and ``E_p[u] = logsumexp(u) - H``.
    """
    log_p = torch.log_softmax(u, -1)
    p = log_p.exp()
    nll = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    log_p = log_p.clamp_min(torch.finfo(u.dtype).min)  # a masked logit is -inf with p = 0, and 0 * -inf would be NaN
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean.unsqueeze(-1)).square().clamp_max(torch.finfo(u.dtype).max)).sum(-1)
    entropy = -mean
    return [nll, entropy - nll, nll - entropy + variance]


def _brier_moments(u: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the Brier score of each row, ``d / d log T`` and ``d2 / d log T**2`` of it; ``[n]`` each.

    With ``c_j = log p_j + H`` and ``v = Var_p(log p)`` it is ``dp_j / d log T = -p_j c_j`` and
    ``dc_j / d log T = v - c_j``, so that ``brier = sum p**2 - 2 p_y + 1`` has the derivatives
    ``2 (p_y c_y - sum p**2 c)`` and ``4 sum p**2 c**2 + 2 sum p**2 c - 2 v sum p**2 + 2 p_y (v - c_y - c_y**2)``.
    """
    index = labels.unsqueeze(-1)
    log_p = torch.log_softmax(u, -1)
    p = log_p.exp()
    # a masked logit is -inf with p = 0; its square would overflow
    centred = log_p.clamp_min_(LEAST_SHIFTED)
    centred = centred.sub_((p * centred).sum(-1, keepdim=True))
    own = centred.gather(-1, index).squeeze(-1)
    p_target = p.gather(-1, index).squeeze(-1)
    others = p.scatter(-1, index, 0.0)  # the label is kept out of sums as in `rows`, where 1 - p_y would cancel
    brier = others.sum(-1).square() + others.square_().sum(-1)
    product = p * centred
    variance = (product * centred).sum(-1)
    first = (product * p).sum(-1)
    second = product.square_().sum(-1)
    norm = p.square_().sum(-1)
    gradient = 2 * (p_target * own - first)
    curvature = 4 * second + 2 * first - 2 * variance * norm + 2 * p_target * (variance - own - own.square())
    return [brier, gradient, curvature]


def _gap_moments(u: Tensor, labels: Tensor) -> list[Tensor]:
    """Return ``p - [u_y = max_j u_j]`` with ``p = max_j p_j``, and its derivative by log T, ``-p (log p + H)``."""
    log_p = torch.log_softmax(u, -1)
    largest = log_p.amax(-1)
    correct = (u.gather(-1, labels.unsqueeze(-1)).squeeze(-1) >= u.amax(-1)).to(u.dtype)
    p = log_p.exp()
    entropy = -log_p.clamp_min_(LEAST_SHIFTED).mul_(p).sum(-1)
    confidence = largest.exp()
    return [confidence - correct, -confidence * (largest + entropy)]
