"""The step from the scores of one evaluation batch to the calibration statistics of the whole set."""

from __future__ import annotations

import torch

from .calibration import SCORES, TokenCalibration
from .distributed import real_rows
from .losses import TokenScores


def add_batch(calibration: TokenCalibration, scores: TokenScores, batch_size: int) -> None:
    """Add the scored tokens of this process's batch, without the rows that only fill up the last batch.

    Args:
        calibration: the accumulator of this process.
        scores: of the batch, flattened to ``[batch_size * length]``.
        batch_size: rows of this process's batch.

    Raises:
        FloatingPointError: if the logits of a scored token are NaN or infinite, with its place in the batch.
    """
    broken = (scores.scored & torch.isnan(scores.confidence)).nonzero()
    if len(broken):
        sample, position = divmod(int(broken[0]), scores.scored.numel() // batch_size)
        raise FloatingPointError(
            f"the logits of {len(broken)} scored tokens are NaN or infinite, first in sample {sample} of the "
            f"evaluation batch at position {position}. The model's weights are broken or it overflows in this dtype."
        )
    rows = real_rows(batch_size, scores.scored.device)
    calibration.update(
        confidence=scores.confidence,
        correct=scores.correct,
        mask=scores.scored & rows.repeat_interleave(scores.scored.numel() // max(1, batch_size)),
        **{name: getattr(scores, name) for name in SCORES},
    )
