"""Training on corrupted targets: where a trainer corrupts its batches, and how it counts what it corrupted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint
from transformers.utils import logging

from ..data.corruption import SummarySwaps, TargetFlips, pair_keys
from ..models.language_model import Alignment, core_model
from ..rules.losses import IGNORE_INDEX
from ..runtime.distributed import process_index, sum_over_processes
from ..runtime.files import write_json

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

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


class _Counts:
    """Sums since the training began; those of flips wait on the device until they are asked for."""

    def __init__(self) -> None:
        self.totals = {"target_tokens": 0, "flipped_tokens": 0, "pairs": 0, "swapped_summaries": 0}
        self.logged = dict(self.totals)
        self.from_step = 0
        self._pending: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the totals, those at the last log, and the step they count from."""
        return {"totals": self.totals, "logged": self.logged, "from_step": self.from_step}

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; one without counts was not corrupted, and they begin at its step."""
        try:
            saved = json.loads((checkpoint / COUNTS_FILE).read_text(encoding="utf-8"))
            self.totals, self.logged, self.from_step = saved["totals"], saved["logged"], saved["from_step"]
        except (OSError, ValueError, KeyError):
            self.from_step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            logger.warning(
                f"{checkpoint} has no readable {COUNTS_FILE}, so it was trained without corruption: corrupted tokens "
                f"and pairs are counted from step {self.from_step} on."
            )

    def add_flips(self, targets: Tensor, flipped: Tensor) -> None:
        sums = torch.stack([(targets != IGNORE_INDEX).sum(), flipped.sum()])
        self._pending = sums if self._pending is None else self._pending + sums

    def add_swaps(self, pairs: int, swapped: int) -> None:
        self.totals["pairs"] += pairs
        self.totals["swapped_summaries"] += swapped

    def gather(self, device: torch.device) -> dict[str, int]:
        """Return the totals over all processes, which must all call this."""
        pending = self._pending if self._pending is not None else torch.zeros(2, dtype=torch.int64, device=device)
        self._pending = None
        tokens, flipped = sum_over_processes(pending).tolist()
        self.totals["target_tokens"] += tokens
        self.totals["flipped_tokens"] += flipped
        return self.totals


class CorruptionMixin(_Base):
    """Corrupt the training batches of a `Trainer` as its ``corruption`` says, and log how many tokens and pairs.

    Done here and not in the data set or the collator, because only the trainer knows the optimizer step and all its
    pairs. What is corrupted is a pure function of seed, step and content: the same over any number of processes and
    accumulation steps, and after a resume.
    """

    def __init__(self, *args: Any, corruption: Corruption | None = None, **kwargs: Any) -> None:
        self.corruption = corruption or Corruption()
        self._counts = _Counts()
        super().__init__(*args, **kwargs)
        self._check_corruption()

    def _check_corruption(self) -> None:
        flips, swaps, core = self.corruption.flips, self.corruption.swaps, core_model(cast(nn.Module, self.model))
        if flips is not None and self.compute_loss_func is not None:
            raise ValueError(
                "flipped targets are put in where DPSM computes the loss, which compute_loss_func would replace: "
                "leave one of them out."
            )
        if (flips is not None or swaps is not None) and self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "corruption needs whole rows, which context and sequence parallelism cut: use data parallelism."
            )
        if swaps is None:
            return
        if not getattr(getattr(core, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"summaries can be swapped in training an encoder-decoder; {type(core).__name__} "
                "reads source and target as one text. Leave swaps out."
            )
        if self.get_tp_size() > 1:
            raise ValueError("summaries cannot be swapped under tensor parallelism, whose processes share their rows.")
        micro = self.args.train_batch_size * self.args.world_size
        if micro * self.args.gradient_accumulation_steps < 2:
            raise ValueError(
                "an optimizer step of 1 pair has no summary to swap: raise --per_device_train_batch_size or "
                "--gradient_accumulation_steps."
            )

    # ---- flipped targets -------------------------------------------------------------------------------------------

    def _flipped(
        self, labels: Tensor, shift_labels: Tensor | None, alignment: Alignment, *, counted: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the labels, or the shifted ones, with the flips of this step, counted by default."""
        flips = self.corruption.flips
        if flips is None:
            return labels, shift_labels
        step = self.state.global_step
        first = 1 if shift_labels is None and alignment == "shifted" else 0  # nothing predicts the first token
        targets = (labels if shift_labels is None else shift_labels)[..., first:]
        flipped, changed = flips(targets, step)
        if counted:
            self._counts.add_flips(targets, changed)
        if shift_labels is not None:
            return labels, flipped
        return (torch.cat([labels[..., :first], flipped], -1) if first else flipped), None

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch as `Trainer` does, which cannot be done with flipped targets."""
        if self.corruption.flips is not None and model.training:
            raise ValueError(f"flipped targets need a batch with 'labels'; this one has only {', '.join(inputs)}.")
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ---- swapped summaries -----------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of one optimizer step, with summaries swapped between its pairs on all processes."""
        batches, number = super().get_batch_samples(*args, **kwargs)
        if self.corruption.swaps is None or not batches:
            return batches, number
        batches = self._swapped(batches)
        # of all processes together the number stays, of one it may not
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def _swapped(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        swaps = self.corruption.swaps
        assert swaps is not None
        missing = [name for name in ("input_ids", "labels") if any(name not in batch for batch in batches)]
        stale = {name for batch in batches for name in batch if name.startswith("decoder_")} - {"decoder_input_ids"}
        if missing or stale:
            raise ValueError(
                "summaries are swapped in batches of input_ids and labels; the collator's batches "
                + (f"have no {missing[0]}." if missing else f"also have {min(stale)}, made of the unswapped summary.")
            )
        width = max(batch["labels"].shape[-1] for batch in batches)
        labels = torch.cat([_widened(batch["labels"], width) for batch in batches]).to(self.args.device)
        keys = [torch.cat(parts).to(self.args.device) for parts in zip(*map(pair_keys, batches), strict=True)]
        everyone = self._gathered(labels, IGNORE_INDEX)
        pairs, summaries = (self._gathered(key, 0) for key in keys)
        # rows without a label fill up a process that has fewer
        real = (everyone != IGNORE_INDEX).any(-1).cpu().numpy().nonzero()[0]
        plan = swaps.plan(pairs.cpu().numpy()[real], summaries.cpu().numpy()[real], self.state.global_step)
        sources = torch.arange(len(everyone))
        sources[torch.from_numpy(real)] = torch.from_numpy(real[plan])
        self._counts.add_swaps(len(real), int((plan != range(len(plan))).sum()))
        first = process_index() * (len(everyone) // self.args.world_size)
        own = everyone[sources[first : first + len(labels)].to(everyone.device)]
        rows = own.split([len(batch["labels"]) for batch in batches])
        return [
            # without decoder_input_ids, which are then made of the new labels
            {k: v for k, v in batch.items() if k != "decoder_input_ids"} | {"labels": new.to(batch["labels"].device)}
            for batch, new in zip(batches, rows, strict=True)
        ]

    def _gathered(self, tensor: Tensor, fill: int) -> Tensor:
        for dim in reversed(range(tensor.dim())):
            tensor = self.accelerator.pad_across_processes(tensor, dim=dim, pad_index=fill)
        return self.accelerator.gather(tensor)

    # ---- counts ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; the metrics get the counts of what was corrupted, as ``train_...``."""
        if not self._corrupts():
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
        self._counts = _Counts()
        if checkpoint and (Path(checkpoint) / "trainer_state.json").is_file():  # else Trainer says what is wrong
            self._counts.restore(Path(checkpoint))
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._counts.gather(self.args.device)
        record = self.corruption_record() or {}
        output.metrics.update({f"train_{name}": value for name, value in record.items()})
        return output

    def _corrupts(self) -> bool:
        return self.corruption.flips is not None or self.corruption.swaps is not None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._corrupts():
            self._counts.gather(self.args.device)
            if self.args.should_save:
                name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                folder = Path(self._get_output_dir(trial=trial)) / name
                # before the others: a checkpoint is complete with its trainer_state.json, the last
                os.makedirs(folder, exist_ok=True)
                write_json(self._counts.state(), folder / COUNTS_FILE)
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does; training entries also get how much was corrupted since the last one."""
        if "loss" in logs and self._corrupts():
            totals, before = self._counts.gather(self.args.device), self._counts.logged
            self._counts.logged = dict(totals)
            for name in self._counted():
                if name in totals:
                    logs[name] = totals[name] - before[name]
        super().log(logs, start_time)

    def _counted(self) -> list[str]:
        flips = ["target_tokens", "flipped_tokens"] if self.corruption.flips is not None else []
        return flips + (["pairs", "swapped_summaries"] if self.corruption.swaps is not None else [])

    def corruption_record(self) -> dict[str, int] | None:
        """Return what was corrupted up to the last log, checkpoint or end of the training; None for clean training.

        Returns:
            ``target_tokens``, ``flipped_tokens`` and ``flip_steps`` (optimizer steps with flips) where targets are
            flipped, ``pairs`` and ``swapped_summaries`` where summaries are swapped; over all processes and, after a
            resume, all parts of the run. ``counted_from_step`` is there only if they begin later than at step 0.
        """
        if not self._corrupts():
            return None
        record = {name: self._counts.totals[name] for name in self._counted()}
        if (flips := self.corruption.flips) is not None:
            before = flips.steps_before(self._counts.from_step)
            record["flip_steps"] = flips.steps_before(self.state.global_step) - before
        if self._counts.from_step:
            record["counted_from_step"] = self._counts.from_step
        return record


def _widened(labels: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(labels, (0, width - labels.shape[-1]), value=IGNORE_INDEX)
