"""The step from the scores of one evaluation batch to the calibration statistics of the whole set."""

from __future__ import annotations

from .calibration import SCORES, TokenCalibration
from .distributed import real_rows
from .losses import TokenScores


def add_batch(calibration: TokenCalibration, scores: TokenScores, batch_size: int) -> None:
    """Add the scored tokens of this process's batch, without the rows that only fill up the last batch.

    Args:
        calibration: the accumulator of this process.
        scores: of the batch, flattened to ``[batch_size * length]``.
        batch_size: rows of this process's batch.
    """
    rows = real_rows(batch_size, scores.scored.device)
    calibration.update(
        confidence=scores.confidence,
        correct=scores.correct,
        mask=scores.scored & rows.repeat_interleave(scores.scored.numel() // max(1, batch_size)),
        **{name: getattr(scores, name) for name in SCORES},
    )
