"""The figures that TRL logs of its batches, in TRL's meaning: ``entropy``, ``mean_token_accuracy``, ``num_tokens``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from ..rules.losses import TokenScores
from ..runtime.devices import widest_float
from ..runtime.distributed import process_number, sum_over_processes

# where a checkpoint tells the tokens: beside the states of callbacks, the one place that others may write to
_SAVED_AS = "SFTTokenCount"

_Rows = list[Tensor]


class BatchMeans:
    """Sum each batch's tokens on the device, without waiting for it, until an entry of the log is written.

    TRL's means are means over batches, each of the mean over its scored tokens on all processes, where DPSM's own
    (``token_accuracy``, ``nll``) are means over tokens. ``num_tokens`` counts every token that was trained on, scored
    or not, since the run began.
    """

    def __init__(self) -> None:
        self._rows: dict[str, _Rows] = {"train": [], "eval": []}
        self._has_aux_loss = False
        self._started = False
        self._tokens = 0  # on all processes, but for those below
        self._uncounted: Tensor | None = None

    def add(self, mode: str, scores: TokenScores, inputs: dict[str, Any], aux_loss: Tensor | None) -> None:
        """Add a batch.

        Args:
            mode: ``train`` or ``eval``.
            scores: of its tokens, with their entropy.
            inputs: of the model.
            aux_loss: the load balancing of experts, if the model has any.
        """
        assert scores.entropy is not None  # the trainer asks for it
        dtype = widest_float(scores.nll.device)
        # all three are zero where a token is not scored
        columns = [column.sum(dtype=dtype) for column in (scores.scored, scores.entropy, scores.correct)]
        self._has_aux_loss |= aux_loss is not None
        columns.append(columns[0].new_zeros(()) if aux_loss is None else aux_loss.detach().to(columns[0]))
        self._rows[mode].append(torch.stack(columns))
        if mode == "train":
            seen = _tokens_in(inputs)
            self._uncounted = seen if self._uncounted is None else self._uncounted + seen

    def forget(self, mode: str) -> None:
        """Forget the batches of an evaluation that nobody logged, or of a training; the next one begins anew."""
        self._rows[mode] = []
        if mode == "train":
            self._started = False

    def start(self, state: TrainerState) -> None:
        """Count on from the tokens that the state of a checkpoint tells, or from 0; only at the first batch."""
        if not self._started:
            callbacks: Any = state.stateful_callbacks
            self._tokens = int(callbacks.get(_SAVED_AS, {}).get("attributes", {}).get("num_tokens", 0))
            self._started, self._uncounted = True, None

    def entry(self, mode: str, device: torch.device) -> dict[str, float]:
        """Return the means over the batches since the last entry; nothing without a batch. Every process calls it."""
        rows, self._rows[mode] = self._rows[mode], []
        if not rows:
            return {}
        summed = sum_over_processes(torch.stack(rows)).double().cpu()
        scored = summed[:, 0].clamp_min(1)  # a batch with every label ignored has means of 0 in TRL
        found = {
            "entropy": float((summed[:, 1] / scored).mean()),
            "num_tokens": float(self._count(device)),
            "mean_token_accuracy": float((summed[:, 2] / scored).mean()),
        }
        if self._has_aux_loss:
            found["aux_loss"] = float(summed[:, 3].mean()) / process_number()
        return found

    def save(self, state: TrainerState, device: torch.device) -> None:
        """Write the tokens trained on into a state that is about to be saved; every process calls it."""
        callbacks: Any = state.stateful_callbacks
        callbacks[_SAVED_AS] = {"args": {}, "attributes": {"num_tokens": self._count(device)}}

    def _count(self, device: torch.device) -> int:
        new = torch.zeros((), dtype=torch.int64, device=device) if self._uncounted is None else self._uncounted
        self._tokens, self._uncounted = self._tokens + int(sum_over_processes(new)), None
        return self._tokens


def _tokens_in(inputs: dict[str, Any]) -> Tensor:
    """Return the tokens of a batch, padding not counted; batches without padding have positions instead of a mask."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.sum(dtype=torch.int64)
    ids = next(inputs[name] for name in ("position_ids", "input_ids") if name in inputs)
    return torch.tensor(ids.shape[1], device=ids.device)
