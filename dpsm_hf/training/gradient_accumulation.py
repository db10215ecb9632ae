"""Tell `Trainer` whether a micro-batch's loss is already divided by the tokens of its whole optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

Count = Tensor | int | None


class LossAccumulation:
    """Tell `Trainer` whether to divide a loss by the accumulation steps, whoever computed it.

    The trainer's own loss is divided by the tokens of the whole optimizer step. A subclass may compute another one, or
    call on with or without that number. Without it a loss is the mean of its micro-batch, and is divided.

    Args:
        model_takes_count: whether the model's forward takes ``num_items_in_batch``, which decides in `Trainer`.
    """

    def __init__(self, model_takes_count: bool) -> None:
        #: What the user has set by ``trainer.loss_is_scaled_for_ga = ...``, None where nothing was set.
        self.user_value: bool | None = None
        self._model_takes_count = model_takes_count
        self._count: Count = None  # of the micro-batch in progress
        self._withheld = False
        self._scaled: bool | None = None

    @contextmanager
    def micro_batch(self, count: Count, *, overridden: bool) -> Iterator[Count]:
        """Score a micro-batch within this context, and give it the count that the context yields.

        Args:
            count: tokens of the optimizer step.
            overridden: whether a subclass has a ``compute_loss`` of its own. As in `Trainer` it sees the count only if
                the model's forward takes one.
        """
        self._count, self._scaled = count, None
        self._withheld = overridden and not self._model_takes_count
        try:
            yield None if self._withheld else count
        finally:
            self._count, self._withheld = None, False

    def denominator_for(self, count: Count) -> tuple[Count, bool]:
        """Return the tokens that the trainer's own loss is divided by, given what `compute_loss` was called with.

        The flag says whether the loss is to be multiplied by the accumulation steps, which `Trainer` will divide by: a
        subclass that was given no count may add a mean of its own.
        """
        withheld = count is None and self._withheld and self._count is not None and self.user_value is None
        self._scaled = count is not None
        return (self._count, True) if withheld else (count, False)

    @property
    def scored(self) -> bool:
        """Return whether the trainer's own loss is part of that of the last micro-batch."""
        return self._scaled is not None

    @property
    def loss_is_scaled(self) -> bool:
        """Return whether the loss of the micro-batch in progress is a part of the step's, not a mean of its own."""
        if self.user_value is not None:
            return self.user_value
        return self._model_takes_count and self._count is not None if self._scaled is None else self._scaled
