"""Add the token metrics of an evaluation to the metrics that `Trainer` returns and logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)


class EvaluationReport:
    """Add the metrics of evaluations to those of `Trainer`, and say once where the two losses differ."""

    def __init__(self) -> None:
        self._loss_explained = False

    def add(
        self,
        found: Mapping[str, float],
        samples: int,
        output: EvalLoopOutput,
        prefix: str,
        *,
        seconds: float | None,
        smoothed: bool,
    ) -> bool:
        """Add what an evaluation saw to the metrics of its loop; one of the user's own keeps its name.

        Args:
            found: the metrics to add, without prefix; empty if no token was scored.
            samples: rows that were evaluated.
            output: of the loop; its metrics are changed.
            prefix: of the names.
            seconds: trained so far; None outside of training.
            smoothed: whether the loss of the loop is one with smoothed labels.

        Returns:
            Whether a token was scored at all.
        """
        assert output.metrics is not None  # the loop always returns a dict
        if found:
            metrics: dict[str, Any] = {f"{prefix}_{name}": value for name, value in found.items()}
            if seconds is not None:
                metrics[f"{prefix}_train_seconds"] = seconds
            if not smoothed:
                self._explain_loss(output.metrics.get(f"{prefix}_loss"), found["nll"], prefix)
            output.metrics.update({k: v for k, v in metrics.items() if k not in output.metrics})
        elif samples and f"{prefix}_loss" in output.metrics:
            # no token, no loss: a 0 would be the best that there ever was
            output.metrics[f"{prefix}_loss"] = math.nan
            logger.warning(f"no token of the data set for {prefix!r} is scored: every label is ignored.")
        return bool(found)

    def _explain_loss(self, loss: float | None, nll: float, prefix: str) -> None:
        """Say once how ``eval_loss`` differs from ``eval_nll``, where it does by more than rounding."""
        if loss is None or abs(loss - nll) <= 1e-3 * abs(nll) or self._loss_explained:
            return
        self._loss_explained = True
        logger.warning(
            f"{prefix}_nll ({nll:.4g}) is the mean over tokens; {prefix}_loss ({loss:.4g}) is what Trainer makes of "
            "it: a mean over batches, and for models like GPT-2 divided by one label too many a row."
        )


def gathered_rows(accelerator: Accelerator, tensors: Any, rows: int) -> Any:
    """Gather from all processes and drop what only fills up the last batch, of several rows a sample too.

    Only what was generated has several, and is ``[rows, T]``. The loss of a batch comes once a row of a full one.

    Args:
        accelerator: of the trainer.
        tensors: of a batch.
        rows: that the batch has.
    """
    if isinstance(tensors, Tensor) and tensors.dim() > 1 and 0 < rows < len(tensors) and not len(tensors) % rows:
        return accelerator.gather_for_metrics(tensors.unflatten(0, (rows, -1))).flatten(0, 1)
    return accelerator.gather_for_metrics(tensors)
