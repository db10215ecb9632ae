"""Further statistics of each token for an evaluation, computed from a chunk of logits before it is freed."""

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
    """Further statistics to compute for each scored token: a few columns per token, never ``[N, V]``.

    Args:
        temperature: T at which the token is scored again, from ``logits / T``: the columns of `STATISTICS`.
        moments_at: T at which to compute the token's NLL from ``logits / T`` and its first and second derivative with
            respect to log T: the columns of `MOMENTS`.
        classes: int64 ``[K]``, token ids whose predicted probabilities are kept at every scored token.
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
        """Split the columns ``[N, width]`` into statistics at the temperature, moments, and probabilities ``[N, K]``.

        The first two are by name, and empty where they were not asked for; the last is then None.
        """
        parts = list(columns.unbind(-1))
        scaled = {name: parts.pop(0) for name in STATISTICS} if self.temperature is not None else {}
        moments = {name: parts.pop(0) for name in MOMENTS} if self.moments_at is not None else {}
        return scaled, moments, columns[:, -len(parts) :] if parts else None


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
