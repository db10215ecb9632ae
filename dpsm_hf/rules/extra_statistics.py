"""Further numbers of each token for an evaluation, taken from a chunk of logits before it is freed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import STATISTICS, row_blocks, row_statistics, statistics_columns

MOMENTS = ("nll", "gradient", "curvature")

# Rows are taken in blocks whose float32 copy has at most this many entries (16 MiB).
_BLOCK_ENTRIES = 2**22


@dataclass(frozen=True)
class ExtraStatistics:
    """Further columns for each scored token; none of them is ever kept for the vocabulary.

    Args:
        temperature: also score the token from ``logits / temperature``.
        moments_at: the NLL of the token from ``logits / T`` at this T, and its first and second derivative by log T.
        classes: int64 ``[K]``, tokens whose probability is wanted wherever a token is scored.
    """

    temperature: float | None = None
    moments_at: float | None = None
    classes: Tensor | None = None

    @property
    def width(self) -> int:
        """Return the number of columns."""
        scaled = 0 if self.temperature is None else len(STATISTICS)
        moments = 0 if self.moments_at is None else len(MOMENTS)
        return scaled + moments + (0 if self.classes is None else len(self.classes))

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the columns of some rows, ``[n, width]`` in float32 (float64 for float64).

        Args:
            logits: ``[n, V]``, after the model's post-ops; not changed.
            labels: ``[n]`` int64, each in ``[0, V)``.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        found = logits.new_empty(len(logits), self.width, dtype=dtype)
        for rows in row_blocks(logits, _BLOCK_ENTRIES):
            z, y = logits[rows].to(dtype), labels[rows]
            columns: list[Tensor] = []
            if self.temperature is not None:
                columns += statistics_columns(row_statistics(z / self.temperature, y)).unbind(-1)
            if self.moments_at is not None:
                columns += _moments(z / self.moments_at, y)
            if self.classes is not None:
                log_normalizer = z.logsumexp(-1, keepdim=True)
                columns += (z[:, self.classes.to(z.device)] - log_normalizer).exp().unbind(-1)
            found[rows] = torch.stack(columns, -1)
        return found

    def split(self, columns: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Return the columns ``[N, width]`` as scaled statistics, moments, and class probabilities ``[N, K]``."""
        parts = list(columns.unbind(-1))
        scaled = {name: parts.pop(0) for name in STATISTICS} if self.temperature is not None else {}
        moments = {name: parts.pop(0) for name in MOMENTS} if self.moments_at is not None else {}
        return scaled, moments, columns[:, -len(parts) :] if parts else None


def _moments(u: Tensor, labels: Tensor) -> list[Tensor]:
    """Return ``nll``, ``d nll / d log T = H - nll`` and ``d2 nll / d log T**2 = nll - H + Var_p(log p)``.

    With ``u = z / T`` it is ``du / d log T = -u``: the mean of u over p comes in, the normalizer less the entropy H.
    """
    log_p = torch.log_softmax(u, -1)
    p = log_p.exp()
    nll = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    log_p = log_p.clamp_min(torch.finfo(u.dtype).min)  # a masked logit has p = 0, and 0 * -inf is no number
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean.unsqueeze(-1)).square().clamp_max(torch.finfo(u.dtype).max)).sum(-1)
    entropy = -mean
    return [nll, entropy - nll, nll - entropy + variance]
