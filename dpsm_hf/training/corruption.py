"""Training on corrupted targets: where a trainer corrupts its batches, and how it counts what it corrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data.corruption import SummarySwaps, TargetFlips, pair_keys
from ..models.language_model import core_model
from ..rules.losses import IGNORE_INDEX
from ..runtime.distributed import process_index, sum_over_processes
from ..runtime.files import write_json
from .scorer import Batch

logger = logging.get_logger(__name__)

#: File of a checkpoint with the counts up to its step.
COUNTS_FILE = "corruption.json"


@dataclass(frozen=True)
class Corruption:
    """What is corrupted in training; evaluation always sees the data as they are.

    Args:
        flips: of target tokens; the model's inputs stay clean, of encoder-decoders also those of the decoder.
        swaps: of the summaries of pairs; the decoder is then fed the summary that it is to write.
    """

    flips: TargetFlips | None = None
    swaps: SummarySwaps | None = None


class Corruptor:
    """Corrupt the training batches of one trainer as a `Corruption` says, and count how many tokens and pairs.

    Done here and not in the data set or the collator, because only the trainer knows the optimizer step and all its
    pairs. What is corrupted is a pure function of seed, step and content: the same over any number of processes and
    accumulation steps, and after a resume.

    Args:
        what: the kinds of corruption to apply.
    """

    def __init__(self, what: Corruption) -> None:
        self.what, self.flips, self.swaps = what, what.flips, what.swaps
        self._forget()

    def _forget(self) -> None:
        self._totals = {"target_tokens": 0, "flipped_tokens": 0, "pairs": 0, "swapped_summaries": 0}
        self._logged = dict(self._totals)
        self._from_step = 0
        self._pending: Tensor | None = None  # of flips: they wait on the device until they are asked for

    @property
    def active(self) -> bool:
        """Return whether anything is corrupted."""
        return self.flips is not None or self.swaps is not None

    def check(self, trainer: Trainer) -> None:
        """Check whether a trainer's batches can be corrupted so.

        Raises:
            ValueError: if the loss, the parallelism or the model leaves no place for it, or a step has a single pair.
        """
        core = core_model(cast(nn.Module, trainer.model))
        if self.flips is not None and trainer.compute_loss_func is not None:
            raise ValueError(
                "flipped targets are put in where DPSM computes the loss, which compute_loss_func would replace: "
                "leave one of them out."
            )
        if self.active and trainer.get_cp_size() * trainer.get_sp_size() > 1:
            raise ValueError(
                "corruption needs whole rows, which context and sequence parallelism cut: use data parallelism."
            )
        if self.swaps is None:
            return
        if not getattr(getattr(core, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"summaries can be swapped in training an encoder-decoder; {type(core).__name__} "
                "reads source and target as one text. Leave swaps out."
            )
        if trainer.get_tp_size() > 1:
            raise ValueError("summaries cannot be swapped under tensor parallelism, whose processes share their rows.")
        micro = trainer.args.train_batch_size * trainer.args.world_size
        if micro * trainer.args.gradient_accumulation_steps < 2:
            raise ValueError(
                "an optimizer step of 1 pair has no summary to swap: raise --per_device_train_batch_size or "
                "--gradient_accumulation_steps."
            )

    # ---- flipped targets -------------------------------------------------------------------------------------------

    def flipped(self, batch: Batch, step: int, *, counted: bool = True) -> Batch:
        """Return a batch whose labels, or shifted ones where the collator made them, have the flips of a step.

        Args:
            batch: of training.
            step: optimizer steps done so far.
            counted: whether the tokens go into the counts.
        """
        if self.flips is None:
            return batch
        labels, shift_labels = batch.labels, batch.shift_labels
        first = 1 if shift_labels is None and batch.alignment == "shifted" else 0  # nothing predicts the first token
        targets = (labels if shift_labels is None else shift_labels)[..., first:]
        flipped, changed = self.flips(targets, step)
        if counted:
            sums = torch.stack([(targets != IGNORE_INDEX).sum(), changed.sum()])
            self._pending = sums if self._pending is None else self._pending + sums
        if shift_labels is not None:
            return replace(batch, shift_labels=flipped)
        return replace(batch, labels=torch.cat([labels[..., :first], flipped], -1) if first else flipped)

    # ---- swapped summaries -----------------------------------------------------------------------------------------

    def swapped(self, batches: Sequence[dict[str, Any]], step: int, trainer: Trainer) -> list[dict[str, Any]]:
        """Return the batches of an optimizer step with summaries swapped between its pairs on all processes.

        Args:
            batches: of this process, with ``input_ids`` and ``labels``.
            step: optimizer steps done so far.
            trainer: whose processes take part; all of them must call this.

        Raises:
            ValueError: if a batch has no pairs, or holds something that was made of the unswapped summary.
        """
        assert self.swaps is not None
        missing = [name for name in ("input_ids", "labels") if any(name not in batch for batch in batches)]
        stale = {name for batch in batches for name in batch if name.startswith("decoder_")} - {"decoder_input_ids"}
        if missing or stale:
            raise ValueError(
                "summaries are swapped in batches of input_ids and labels; the collator's batches "
                + (f"have no {missing[0]}." if missing else f"also have {min(stale)}, made of the unswapped summary.")
            )

        def gathered(tensor: Tensor, fill: int) -> Tensor:
            for dim in reversed(range(tensor.dim())):
                tensor = trainer.accelerator.pad_across_processes(tensor, dim=dim, pad_index=fill)
            return trainer.accelerator.gather(tensor)

        device = trainer.args.device
        width = max(batch["labels"].shape[-1] for batch in batches)
        narrow = (batch["labels"] for batch in batches)
        wide = [F.pad(labels, (0, width - labels.shape[-1]), value=IGNORE_INDEX) for labels in narrow]
        labels = torch.cat(wide).to(device)
        keys = [torch.cat(parts).to(device) for parts in zip(*map(pair_keys, batches), strict=True)]
        everyone = gathered(labels, IGNORE_INDEX)
        pairs, summaries = (gathered(key, 0) for key in keys)
        # rows without a label fill up a process that has fewer
        real = (everyone != IGNORE_INDEX).any(-1).cpu().numpy().nonzero()[0]
        plan = self.swaps.plan(pairs.cpu().numpy()[real], summaries.cpu().numpy()[real], step)
        sources = torch.arange(len(everyone))
        sources[torch.from_numpy(real)] = torch.from_numpy(real[plan])
        self._totals["pairs"] += len(real)
        self._totals["swapped_summaries"] += int((plan != range(len(plan))).sum())
        first = process_index() * (len(everyone) // trainer.args.world_size)
        own = everyone[sources[first : first + len(labels)].to(everyone.device)]
        rows = own.split([len(batch["labels"]) for batch in batches])
        return [
            # without decoder_input_ids, which are then made of the new labels
            {k: v for k, v in batch.items() if k != "decoder_input_ids"} | {"labels": new.to(batch["labels"].device)}
            for batch, new in zip(batches, rows, strict=True)
        ]

    # ---- counts ----------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: str | bool | None, output_dir: str) -> None:
        """Count from the beginning of a training, or go on from the counts of the checkpoint that it resumes.

        A checkpoint without counts was not corrupted; then they begin at its step.
        """
        self._forget()
        checkpoint = get_last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if not checkpoint or not (Path(checkpoint) / "trainer_state.json").is_file():
            return  # Trainer says what is wrong with it
        state, path = Path(checkpoint) / "trainer_state.json", Path(checkpoint) / COUNTS_FILE
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            self._totals, self._logged, self._from_step = saved["totals"], saved["logged"], saved["from_step"]
        except (OSError, ValueError, KeyError):
            self._from_step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
            logger.warning(
                f"{Path(checkpoint)} has no readable {COUNTS_FILE}, so it was trained without corruption: corrupted "
                f"tokens and pairs are counted from step {self._from_step} on."
            )

    def gather(self, device: torch.device) -> None:
        """Bring the totals of all processes up to date; all must call this."""
        pending = self._pending if self._pending is not None else torch.zeros(2, dtype=torch.int64, device=device)
        self._pending = None
        tokens, flipped = sum_over_processes(pending).tolist()
        self._totals["target_tokens"] += tokens
        self._totals["flipped_tokens"] += flipped

    def save(self, checkpoint: Path) -> None:
        """Write the counts into the folder of a checkpoint, which need not exist yet."""
        os.makedirs(checkpoint, exist_ok=True)
        state = {"totals": self._totals, "logged": self._logged, "from_step": self._from_step}
        write_json(state, checkpoint / COUNTS_FILE)

    def entry(self, device: torch.device) -> dict[str, int]:
        """Return what was corrupted since the last entry of the log, over all processes, which must all call this."""
        self.gather(device)
        before, self._logged = self._logged, dict(self._totals)
        return {name: self._totals[name] - before[name] for name in self._counted()}

    def _counted(self) -> list[str]:
        flips = ["target_tokens", "flipped_tokens"] if self.flips is not None else []
        return flips + (["pairs", "swapped_summaries"] if self.swaps is not None else [])

    def record(self, step: int) -> dict[str, int] | None:
        """Return what was corrupted so far, ``step`` optimizer steps; see `DPSMMixin.corruption_record`."""
        if not self.active:
            return None
        record = {name: self._totals[name] for name in self._counted()}
        if self.flips is not None:
            record["flip_steps"] = self.flips.steps_before(step) - self.flips.steps_before(self._from_step)
        if self._from_step:
            record["counted_from_step"] = self._from_step
        return record
