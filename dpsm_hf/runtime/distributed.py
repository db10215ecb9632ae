"""What evaluation and logging ask of the other processes: sums, and which rows of a padded batch are real."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.state import GradientState
from accelerate.utils import reduce
from torch import Tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the elementwise sum of a tensor over all processes, exact for integers; every process must call it."""
    return reduce(tensor, reduction="sum")


def real_rows(batch_size: int, device: torch.device) -> Tensor:
    """Return which rows of this process's evaluation batch are samples and which only fill up the last batch.

    So that every process gets a batch of one size, accelerate fills the last one with samples from the beginning.
    Over the processes in order, the first ``remainder`` rows are real: the rule of ``Accelerator.gather_for_metrics``,
    without gathering.

    Returns:
        bool ``[batch_size]``.
    """
    gradient_state = GradientState()
    # one process has nothing to fill up, and its collator may make more rows than it was given samples
    alone = PartialState().num_processes == 1
    if alone or not gradient_state.end_of_dataloader or gradient_state.remainder <= 0:
        return torch.ones(batch_size, dtype=torch.bool, device=device)
    first = PartialState().process_index * batch_size
    return torch.arange(first, first + batch_size, device=device) < gradient_state.remainder


def process_index() -> int:
    """Return the number of this process, from 0 on."""
    return int(PartialState().process_index)


def process_number() -> int:
    """Return how many processes there are."""
    return int(PartialState().num_processes)
