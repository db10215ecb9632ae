"""What the frozen lower layers of a model put out for each row of a data set, computed once and kept on disk.

`FrozenStates` is given to a trainer, whose batches then begin above the frozen layers. A row is known by its tokens,
so the order of the rows, the epoch and the process do not matter, and a row that is not kept is computed as ever. The
files are parts of at most 128 MB, each whole or not there and checked by its hash; several processes, and several runs
with the same model, rows and number of frozen layers, share them.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, has_length
from transformers.utils import logging

from ..models.frozen_layers import FrozenLayers, FrozenLayersError
from ..models.language_model import core_model, inputs_without_labels, is_compiled
from ..runtime.distributed import process_index, process_number
from ..runtime.made_folder import made_once, problem_of

logger = logging.get_logger(__name__)

#: Folder in ``output_dir`` for the parts; what begins with an underscore is not pushed to the hub.
FOLDER_NAME = "_frozen_cache"

_PART_BYTES = 128 << 20
_FILE = "states.safetensors"
# Inputs that a row is known by; with any other a batch is computed as a whole.
_KNOWN = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """A row of a batch: the positions that are attended to, and what they hold."""

    key: bytes  # hash of 16 bytes
    start: int
    length: int


def rows_of(inputs: Mapping[str, Any]) -> list[Row] | None:
    """Return the rows of a batch without the padding at both ends; None if it holds more than text.

    Padding on the left counts by its number, since it moves the positions of what follows.

    Args:
        inputs: of a language model, without labels; of ``input_ids`` and what goes with it, each ``[B, T]``.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    if "input_ids" not in given or not given.keys() <= _KNOWN:
        return None
    shape = given["input_ids"].shape
    if len(shape) != 2 or any(not isinstance(v, Tensor) or v.shape != shape for v in given.values()):
        return None
    arrays = {name: given[name].detach().cpu().to(torch.int64).numpy() for name in sorted(given)}
    mask = arrays.get("attention_mask")
    rows = []
    for index in range(shape[0]):
        start, end = 0, int(shape[1])
        if mask is not None:
            real = np.flatnonzero(mask[index])
            start, end = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        digest = hashlib.blake2b(f"{start} {end - start}".encode(), digest_size=16)
        for name, values in arrays.items():
            digest.update(f"\0{name}\0".encode() + values[index, start:end].tobytes())
        rows.append(Row(digest.digest(), start, end - start))
    return rows


@dataclass(frozen=True)
class _Part:
    """Rows of a set whose states are one file."""

    dataset: Any
    size: int  # rows of a batch
    batches: tuple[range, ...]
    source: Mapping[str, Any]
    tokens: int

    @property
    def name(self) -> str:
        return hashlib.sha256(repr(sorted(self.source.items())).encode()).hexdigest()[:32]


class FrozenStates:
    """The kept outputs of a model's frozen layers, for one trainer.

    With or without them, the frozen part runs in evaluation mode in training too: without dropout.

    Args:
        layers: the frozen layers of the trainer's model.
        folder: for the files; None keeps nothing, and every batch runs the frozen layers.
    """

    def __init__(self, layers: FrozenLayers, folder: Path | None) -> None:
        self.layers, self.folder = layers, folder
        #: Sets whose states are to be kept too, though they are evaluated after training alone: for other runs.
        self.further: Sequence[Any] = ()
        #: Seconds that the last `prepare` took, and the bytes of the files it needed and of those it wrote.
        self.seconds, self.bytes, self.written = 0.0, 0, 0
        self._where: dict[bytes, tuple[int, int]] = {}  # of a row: file, first token in it
        self._files: list[Any] = []
        self._used: list[Path] = []
        self._dtype = torch.float32
        self._width = 0
        self._digest: str | None = None
        self._changes: Any = None
        self._checked = self._missed = False
        self._autocast: Any = nullcontext

    def check(self, trainer: Trainer) -> None:
        """Refuse a trainer that the frozen layers, or kept outputs of them, do not go with.

        Raises:
            ValueError: naming the argument and the way out.
        """
        args = trainer.args
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        refused = {
            "model_init=, which makes the model anew": trainer.model_init is not None,
            "neftune_noise_alpha, which changes the embeddings at random": bool(args.neftune_noise_alpha),
            "gradient_checkpointing_kwargs use_reentrant, which loses the gradient of layers above frozen ones": (
                args.gradient_checkpointing and bool(checkpointing.get("use_reentrant"))
            ),
        }
        if self.folder is not None:
            refused |= {
                "bf16_full_eval or fp16_full_eval, for which Trainer converts the frozen weights": (
                    args.bf16_full_eval or args.fp16_full_eval
                ),
                "torch_compile": bool(args.torch_compile) or is_compiled(trainer.model_wrapped or self.layers.core),
                "FSDP": trainer.is_fsdp_enabled,
                "DeepSpeed": trainer.is_deepspeed_enabled,
                "tensor, context or sequence parallelism": trainer.get_tp_size() > 1
                or trainer.get_cp_size() * trainer.get_sp_size() > 1,
                "several GPUs in one process (start one process for each)": args.n_gpu > 1,
            }
        for number, (what, found) in enumerate(refused.items()):
            if found:
                way_out = "" if number < 3 else ", or keep no outputs of them (frozen_cache off)"
                raise ValueError(f"frozen lower layers do not go with {what}: leave it out{way_out}.")
        if core_model(trainer.model) is not self.layers.core:  # type: ignore[arg-type]
            raise ValueError("the frozen layers are those of another model than the trainer's: freeze its own.")

    # ---- computing and writing -------------------------------------------------------------------------------------

    def prepare_training(self, trainer: Trainer) -> dict[str, float]:
        """Prepare the sets that a training sees again and again, and those of `further`; return the metrics of that.

        Args:
            trainer: about to train; its ``calibration_dataset`` too is seen where a temperature is fitted.

        Raises:
            ValueError, OSError, FrozenLayersError: as `check` and `prepare`.
        """
        if self.folder is None:
            return {}
        self.check(trainer)
        args, evaluated = trainer.args, trainer.eval_dataset
        sets = [(trainer.train_dataset, args.per_device_train_batch_size)]
        listed = list(self.further)
        if args.eval_strategy != IntervalStrategy.NO or args.eval_on_start:
            listed += evaluated.values() if isinstance(evaluated, dict) else [evaluated]
            listed += [trainer.calibration_dataset] if trainer.dpsm.fit_temperature else []  # type: ignore[attr-defined]
        sets += [(dataset, args.per_device_eval_batch_size) for dataset in {id(d): d for d in listed}.values()]
        self.prepare(trainer, [(dataset, size) for dataset, size in sets if dataset is not None])
        return {"train_frozen_cache_seconds": self.seconds, "train_frozen_cache_mb": self.bytes / 2**20}

    def prepare(self, trainer: Trainer, datasets: Sequence[tuple[Any, int]]) -> None:
        """Compute what is not kept yet of the rows of data sets, and open the files.

        Args:
            trainer: about to train; its collator makes the batches.
            datasets: that the trainer is going to see again and again, each with the rows of its batches, in which
                they are computed, too: rounding depends on that. What is not indexed is passed over.

        Raises:
            OSError: if the disk has no room.
            FrozenLayersError: if the collator does not make the same batch of the same rows each time.
        """
        if self.folder is None:
            return
        begun = time.perf_counter()
        self._autocast = trainer.accelerator.autocast
        self._files, self._used, self._where, self._checked, self._missed = [], [], {}, False, False
        self._note_weights()
        parts: list[_Part] = []
        with torch.random.fork_rng(devices=[]):  # what is drawn after this must not depend on what was kept
            for dataset, size in datasets:
                if not has_length(dataset) or not hasattr(dataset, "__getitem__"):
                    logger.warning("A stream has no rows to know again: its batches run the frozen layers too.")
                else:
                    parts += self._plan(trainer, dataset, size)
            unique = list({part.name: part for part in parts}.values())
            self._make(trainer, unique)
        for part in unique:
            self._open(self.folder / part.name)
        self.bytes = sum(self._bytes(part) for part in unique)
        self.seconds = time.perf_counter() - begun

    def _bytes(self, part: _Part) -> int:
        return part.tokens * self._width * self._dtype.itemsize

    def _plan(self, trainer: Trainer, dataset: Any, size: int) -> list[_Part]:
        """Divide a set into parts, each of whole batches."""
        if isinstance(dataset, Dataset):
            dataset = trainer._remove_unused_columns(dataset)
        batches = [range(first, min(first + size, len(dataset))) for first in range(0, len(dataset), size)]
        parts: list[_Part] = []
        held: list[range] = []
        seen, tokens, digest = set[bytes](), 0, hashlib.sha256()
        for batch in batches:
            inputs = self._collated(trainer, dataset, batch)
            rows = rows_of(inputs)
            if rows is None:
                logger.warning(
                    f"Batches with {', '.join(sorted(inputs.keys() - _KNOWN)) or 'rows of no tokens'} run the frozen "
                    "layers too: outputs are kept for text alone."
                )
                return []
            if not self._width:
                states = self._states(trainer, inputs)
                self._dtype, self._width = states.dtype, states.shape[-1]
            own = {row.key: row.length for row in rows}
            new = sum(length for key, length in own.items() if key not in seen)
            if held and (tokens + new) * self._width * self._dtype.itemsize > _PART_BYTES:
                parts.append(self._part(trainer, (dataset, size), held, tokens, digest))
                held, seen, tokens, digest = [], set(), 0, hashlib.sha256()
                new = sum(own.values())
            held.append(batch)
            seen |= own.keys()
            tokens += new
            digest.update(repr([tuple(inputs["input_ids"].shape), *(row.key for row in rows)]).encode())
        if held:
            parts.append(self._part(trainer, (dataset, size), held, tokens, digest))
        return parts

    def _part(self, trainer: Trainer, data: tuple[Any, int], batches: list[range], tokens: int, digest: Any) -> _Part:
        source = {
            "layers": self._digest, "number": self.layers.number, "rows": digest.hexdigest(),
            "dtype": str(self._dtype), "width": self._width, "precision": str(trainer.accelerator.mixed_precision),
            "device": trainer.args.device.type, "torch": str(torch.__version__), "format": _FORMAT,
        }  # fmt: skip
        return _Part(*data, tuple(batches), source, tokens)

    def _make(self, trainer: Trainer, parts: Sequence[_Part]) -> None:
        """Write the parts that are missing or damaged; several processes share the work."""
        assert self.folder is not None
        folder = self.folder
        missing = [part for part in parts if problem_of(folder / part.name, part.source) is not None]
        self.written = sum(map(self._bytes, missing))
        if not missing:
            logger.info(f"The outputs of the frozen layers are in {folder} already: {len(parts)} part(s).")
            return
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
        tokens, kind = sum(part.tokens for part in missing), str(self._dtype).removeprefix("torch.")
        amount = f"{tokens:,} tokens x {self._width:,} {kind} numbers, {self.written / 2**20:,.1f} MB"
        # some room has to stay for checkpoints and for the part that is being replaced
        if self.written + _PART_BYTES > room:
            raise OSError(
                f"the outputs of the {self.layers.number} frozen layers take {amount}, and the disk of {folder} has "
                f"{room / 2**20:,.1f} MB free: name a folder on another disk (frozen_cache), train on fewer rows, or "
                "compute them anew in each epoch (frozen_cache off)."
            )
        logger.info(f"Computing the outputs of the frozen layers once and keeping them in {folder}: {amount}.")
        first, step = process_index() % len(missing), max(1, process_number())
        # each process begins elsewhere; then all go through all, and wait for what another one is writing
        for part in (*missing[first::step], *missing):
            made_once(folder / part.name, part.source, functools.partial(self._write, trainer, part))

    def _write(self, trainer: Trainer, part: _Part, draft: Path) -> None:
        kept: dict[bytes, Tensor] = {}
        digest = hashlib.sha256()
        for batch in part.batches:
            # filled up to its size, because a smaller batch may be rounded in another way
            filled = [*batch, *([batch[0]] * (part.size - len(batch)))]
            inputs = self._collated(trainer, part.dataset, filled)
            rows = rows_of(inputs) or []
            own = [row.key for row in rows[: len(batch)]]
            digest.update(repr([(len(batch), inputs["input_ids"].shape[1]), *own]).encode())
            found = self._states(trainer, inputs).cpu()
            for index, row in enumerate(rows[: len(batch)]):
                if row.key not in kept:
                    kept[row.key] = found[index, row.start : row.start + row.length].clone()
        if digest.hexdigest() != part.source["rows"]:
            raise FrozenLayersError(
                "the data collator (or the data set) makes another batch of the same rows each time, so the outputs "
                "of the frozen layers cannot be kept: turn the cache off (frozen_cache off)."
            )
        lengths = torch.tensor([len(states) for states in kept.values()])
        content = {
            "states": torch.cat(list(kept.values())),
            "keys": torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8).reshape(-1, 16),
            "firsts": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        }
        save_file(content, draft / _FILE)

    def _collated(self, trainer: Trainer, dataset: Any, indices: Sequence[int]) -> dict[str, Any]:
        batch = trainer.data_collator([dataset[index] for index in indices])
        return inputs_without_labels(self.layers.core, batch)

    def _states(self, trainer: Trainer, inputs: Mapping[str, Any]) -> Tensor:
        device = next(self.layers.core.parameters()).device
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        with trainer.accelerator.autocast():
            return self.layers.outputs(moved)

    def _open(self, folder: Path) -> None:
        file = safe_open(folder / _FILE, framework="pt")
        keys, firsts = file.get_tensor("keys").numpy(), file.get_tensor("firsts").tolist()
        number = len(self._files)
        self._files.append(file.get_slice("states"))
        self._used.append(folder)
        for key, first in zip(keys, firsts[:-1], strict=True):
            self._where.setdefault(key.tobytes(), (number, first))

    def remove(self) -> None:
        """Delete the files that this trainer used, and the folder if nothing else is in it.

        Another run that is using them goes on with what it has opened, and the next one computes them again.
        """
        self._files, self._where = [], {}
        for part in self._used:
            with FileLock(part.with_name(f".{part.name}.lock")):
                shutil.rmtree(part, ignore_errors=True)
            part.with_name(f".{part.name}.lock").unlink(missing_ok=True)
        self._used = []
        if self.folder is not None and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    # ---- batches ---------------------------------------------------------------------------------------------------

    @contextmanager
    def below(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Let a forward of the trainer's model on a batch take the kept outputs, where all its rows have them.

        Args:
            model: that is called, possibly wrapped; another one than the trainer's is left alone.
            inputs: of the batch, without labels, on the device.

        Raises:
            FrozenLayersError: if the first batch shows that kept outputs give other logits than the whole model, or
                if frozen weights were changed.
        """
        if core_model(model) is not self.layers.core:
            yield
            return
        states = self._kept(inputs)
        if states is None:
            with self.layers.evaluating():
                yield
            return
        if not self._checked:
            with self._autocast(), torch.random.fork_rng(devices=[]):
                self.layers.check(inputs, states)
            self._checked = True
        with self.layers.skipped(states):
            yield

    def _kept(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the kept states of a batch, 0 where it is padded, ``[B, T, D]``; None if a row has none."""
        if not self._files or (rows := rows_of(inputs)) is None:
            return None
        places = [self._where.get(row.key) for row in rows]
        if any(place is None for place in places):
            if self.layers.core.training and not self._missed:
                self._missed = True
                logger.warning(
                    "A batch of training has rows whose outputs are not kept (the collator may draw at random, or pad "
                    "on the left): such batches run the frozen layers too."
                )
            return None
        if self.layers.changes() != self._changes:  # moved to a device, or loaded from a checkpoint
            self._note_weights()
        ids = inputs["input_ids"]
        states = torch.zeros(*ids.shape, self._width, dtype=self._dtype)
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            assert place is not None
            file, first = place
            states[index, row.start : row.start + row.length] = self._files[file][first : first + row.length]
        return states.to(ids.device)

    def _note_weights(self) -> None:
        digest = self.layers.digest()
        if self._files and digest != self._digest:
            raise FrozenLayersError(
                "the weights of the frozen layers are others than those whose outputs were kept (a checkpoint of "
                "another model?): train with them from the beginning, or turn the cache off (frozen_cache off)."
            )
        self._digest, self._changes = digest, self.layers.changes()
