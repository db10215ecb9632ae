"""outcome.json: all that a finished run of a script found out, in one file that is whole or not there."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from ..calibration import TokenCalibration
from ..calibration.metrics import SUMMED, in_bins
from ..evaluation.panel import EvaluationPanel
from ..runtime.files import strict, write_arrays, write_json
from ..training.callbacks import CalibrationCallback, calibration_record
from ..training.clock import seconds_trained
from ..training.trainer import DPSMMixin
from .checkpoints import best_step
from .flops import model_flops

logger = logging.getLogger(__name__)

OUTCOME_NAME = "outcome.json"
DOCUMENTS_FOLDER = "documents"

#: Equal-width bins of confidence in the files of sums by block.
DOCUMENT_BINS = 15

#: Scores whose sums by block are written.
DOCUMENT_SCORES = ("nll", "brier", "spherical")

# Batches whose floating-point operations are averaged; in language modelling all are alike.
_BATCHES_COUNTED = 4


def discard_outcome(training_args: TrainingArguments) -> None:
    """Remove the outcome of an earlier run in the same folder: one that is there belongs to a run that ended well."""
    if training_args.should_save:
        (Path(str(training_args.output_dir)) / OUTCOME_NAME).unlink(missing_ok=True)


class Outcome:
    """Collect what a run found out, evaluation by evaluation, and write it when all is done.

    Every process makes one and calls every method; the main process writes.

    Args:
        trainer: The run's. Make this right after training: the peak of memory is read now, before evaluation adds to
            it.
    """

    def __init__(self, trainer: DPSMMixin) -> None:
        self._trainer = trainer
        self._trained = bool(trainer.args.do_train)
        self._steps = trainer.state.global_step
        # then the model has the best weights, and the last ones are gone
        swapped = self._trained and trainer.args.load_best_model_at_end and best_step(trainer) is not None
        self._loaded = "best" if swapped else "last"
        self._device_memory = _peak_device_memory(trainer) if self._trained else None
        self._metrics: dict[str, dict[str, dict[str, Any]]] = {}
        self._calibration: dict[str, Any] = {}
        self._documents: dict[str, str] = {}
        #: Texts that the model wrote: ``prompt``, ``reference``, ``output``.
        self.samples: list[dict[str, str]] = []

    def add(self, checkpoint: str, split: str, metrics: Mapping[str, Any], *, prefix: str, rows: Any = None) -> None:
        """Add the evaluation that has just ended.

        Args:
            checkpoint: ``last`` for the weights at the end of training (with ``load_best_model_at_end`` these are the
                best, and go by that name), or ``best``.
            split: validation, test, or the name of a further set.
            metrics: as the trainer returned them, ``prefix`` before each name.
            rows: the set that was evaluated; its labels' digest tells whether two runs evaluated the same.
        """
        checkpoint = self._loaded if checkpoint == "last" else checkpoint
        numbers = (int, float, np.integer, np.floating)
        named = {key.removeprefix(f"{prefix}_"): v for key, v in metrics.items() if key.startswith(f"{prefix}_")}
        self._metrics.setdefault(checkpoint, {})[split] = {k: v for k, v in named.items() if isinstance(v, numbers)}
        panel = self._trainer.panel
        if panel is None or not panel.tokens.tokens or not self._trainer.is_world_process_zero():
            return
        name = f"{checkpoint}-{split}"
        self._calibration[split if checkpoint == "last" else name] = self._record(panel, prefix)
        folder = Path(str(self._trainer.args.output_dir)) / DOCUMENTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(document_sums(panel, rows), folder / f"{name}.npz")
        self._documents[name] = f"{DOCUMENTS_FOLDER}/{name}.npz"

    def _record(self, panel: EvaluationPanel, prefix: str) -> dict[str, Any]:
        step = self._trainer.state.global_step
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, CalibrationCallback) and callback.record is not None:
                if (callback.record["split"], callback.record["step"]) == (prefix, step):
                    return callback.record  # its intervals take a second or two
        return calibration_record(panel, prefix, step, self._trainer.dpsm.calibration_bins)

    def write(self) -> None:
        """Write ``outcome.json``; there is none before a run has done all that it was asked for."""
        if not self._trainer.is_world_process_zero():
            return
        content: dict[str, Any] = {
            "metrics": self._metrics, "best_step": best_step(self._trainer), "efficiency": self._efficiency(),
            "calibration": self._calibration, "samples": self.samples, "documents": self._documents,
        }  # fmt: skip
        if (corruption := self._trainer.corruption_record()) is not None:
            content["corruption"] = corruption
        path = Path(str(self._trainer.args.output_dir)) / OUTCOME_NAME
        write_json(strict(content), path)
        logger.info("What this run found out is in %s.", path)

    def _efficiency(self) -> dict[str, float | None]:
        history = self._trainer.state.log_history if self._trained else []
        speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
        return {
            "train_seconds": seconds_trained(history),
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "steps": self._steps if self._trained else None,
            "flops_per_step": flops_per_step(self._trainer) if self._trained else None,
            "peak_device_memory_mb": self._device_memory,
        }


def flops_per_step(trainer: DPSMMixin) -> float | None:
    """Return the `model_flops` of an optimizer step over all processes, from the first rows; None without a count."""
    args = trainer.args
    flops = model_flops(trainer.model, _first_batches(trainer))
    return None if flops is None else flops * args.gradient_accumulation_steps * args.world_size


def _first_batches(trainer: DPSMMixin) -> Iterator[Mapping[str, Tensor]]:
    names = {*getattr(trainer.processing_class, "model_input_names", ("input_ids", "attention_mask")), "labels"}
    size = trainer.args.per_device_train_batch_size * max(1, trainer.args.n_gpu)
    rows = iter(trainer.train_dataset)  # type: ignore[arg-type]
    for _ in range(_BATCHES_COUNTED):
        batch = [{name: row[name] for name in row if name in names} for row in islice(rows, size)]
        if not batch:
            return
        yield trainer.data_collator(batch)


def document_sums(panel: EvaluationPanel, rows: Any = None) -> dict[str, np.ndarray]:
    """Return the sums of an evaluation by block of documents, for resampling that pairs two runs.

    A document is an evaluated row; row ``i`` of the set is in block ``i mod 128``, on any number of processes and
    with batches of any size, so that two runs on the same rows have the same blocks.

    Returns:
        ``count``, ``correct``, ``confidence`` ``[128, 15]`` by block and equal-width bin of confidence; ``nll``,
        ``brier``, ``spherical`` ``[128]``, sums by block; the same as ``..._scaled`` after temperature scaling, where
        there is one; ``labels``, the SHA-256 of the rows' labels in order: where it differs, blocks do not belong
        together. It is empty for a stream.
    """
    scaled = {} if panel.scaled is None else _sums(panel.scaled, "_scaled")
    return {**_sums(panel.tokens, ""), **scaled, "labels": np.array(labels_digest(rows))}


def _sums(calibration: TokenCalibration, suffix: str) -> dict[str, np.ndarray]:
    totals = calibration.block_totals()
    binned = {name: in_bins(getattr(totals, name), DOCUMENT_BINS) for name in ("count", "correct", "confidence")}
    summed = {name: totals.sums[:, SUMMED.index(name)] for name in DOCUMENT_SCORES}
    return {f"{name}{suffix}": values for name, values in {**binned, **summed}.items()}


def labels_digest(rows: Any) -> str:
    """Return the SHA-256 of the labels of a set, row by row; empty for None and for a stream."""
    if not isinstance(rows, Dataset):
        return ""
    digest = hashlib.sha256()
    for labels in rows.with_format(None)["labels"]:
        row = np.asarray(labels, dtype=np.int64)
        digest.update(np.int64(row.size).tobytes())
        digest.update(row.tobytes())
    return digest.hexdigest()


def _peak_device_memory(trainer: DPSMMixin) -> float | None:
    """Return the most memory in MB that tensors took on any process's GPU so far; None on anything else."""
    device = trainer.args.device
    if device.type != "cuda":
        return None
    peak = torch.tensor([float(torch.cuda.max_memory_allocated(device))], device=device)
    return float(trainer.accelerator.gather(peak).max()) / 2**20
