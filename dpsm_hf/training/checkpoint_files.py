"""Check whether training can resume from a checkpoint, by examining each of its files before loading any."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .digests import differing

STATE_NAME = "trainer_state.json"
#: What a run says of itself in its checkpoints; see `run_facts`.
FACTS_NAME = "run_facts.json"

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "rank*-of-*-optimizer.pt")
_STATES = (*_OPTIMIZERS, "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model_fsdp*.bin")
_RNG = re.compile(r"rng_state_(\d+)\.pth")
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Checkpoint:
    """What there is of a checkpoint.

    Args:
        folder: of it.
        step: optimizer steps done; None if its trainer state cannot be read.
        missing: parts that are not there, in words.
        damaged: files that cannot be read, and why.
    """

    folder: Path
    step: int | None
    missing: tuple[str, ...]
    damaged: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Return whether training goes on from it exactly."""
        return self.step is not None and not self.missing and not self.damaged

    @property
    def has_weights(self) -> bool:
        """Return whether its weights and step can be read, though other parts may be missing."""
        return (
            self.step is not None
            and not self.damaged
            and not any(part.startswith(_NO_WEIGHTS) for part in self.missing)
        )

    def describe(self) -> str:
        """Return what is wrong with it, in a sentence without its end."""
        if self.step is None and not self.damaged:
            return f"it has no {STATE_NAME}, the last file of a checkpoint: writing it was interrupted"
        parts = [f"it lacks {', '.join(self.missing)}"] if self.missing else []
        return "; ".join([*self.damaged, *parts])


_NO_WEIGHTS = "the weights"
_EXCHANGED = f"is another than was saved there (if that is on purpose, delete {FACTS_NAME} beside it)"


def checkpoint_folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the folders ``checkpoint-<step>``, the newest first.

    Args:
        output_dir: folder that holds them; may be absent.
    """
    root, prefix = Path(output_dir), f"{PREFIX_CHECKPOINT_DIR}-"
    found = {
        int(path.name[len(prefix) :]): path
        for path in (root.glob(f"{prefix}*") if root.is_dir() else ())
        if path.is_dir() and path.name[len(prefix) :].isdecimal()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def examine(folder: str | os.PathLike[str], processes: int = 1) -> Checkpoint:
    """Look at all parts of a checkpoint: weights, optimizer, scheduler, random state and trainer state.

    Files are read as far as it takes to know that they are whole: headers and lengths of safetensors, the checksums
    of files that torch wrote. Where the checkpoint has digests (see `parts_of`), each part is compared with its own.

    Args:
        folder: of the checkpoint.
        processes: that are about to train; those that it was saved by are known from its own files.
    """
    folder = Path(folder)
    state = read_object(folder / STATE_NAME)
    step = state.get("global_step") if state is not None else None
    step = step if isinstance(step, int) and not isinstance(step, bool) else None
    wrong = "cannot be read" if step is None or state is None else _wrong_state(folder, state, step)
    if wrong:
        # whatever else there is was never finished, or belongs to no step
        found = (folder / STATE_NAME).exists()
        return Checkpoint(folder, None, (), (f"{STATE_NAME} {wrong}",) if found else ())
    sharded = _sharded_engine(folder)
    missing = []
    if not _has_weights(folder) and not sharded:
        missing.append(f"{_NO_WEIGHTS} (model.safetensors, its shards, or an adapter)")
    if not sharded and not any(_glob(folder, *_OPTIMIZERS)) and not any(folder.glob("optimizer_*/")):
        missing.append("optimizer.pt")
    if not sharded and not (folder / "scheduler.pt").is_file():
        missing.append("scheduler.pt")
    parts = (read_object(folder / FACTS_NAME) or {}).get("parts")
    if isinstance(parts, dict) and "scaler" in parts and not (folder / "scaler.pt").is_file():
        missing.append("scaler.pt")
    missing += _missing_random_state(folder, processes)
    found_damage = dict(_damage(folder))
    found_damage |= dict.fromkeys(_exchanged(folder, found_damage.keys()), _EXCHANGED)
    damaged = [f"{path.relative_to(folder)} {why}" for path, why in found_damage.items()]
    return Checkpoint(folder, step, tuple(missing), tuple(damaged))


def _wrong_state(folder: Path, state: dict[str, Any], step: int) -> str:
    """Return why a trainer state is not that of its checkpoint, empty if it is."""
    if unknown := state.keys() - {field.name for field in dataclasses.fields(TrainerState)}:
        return f"has a key {min(unknown)!r}, which Trainer does not know"
    for name, kind in (("log_history", list), ("stateful_callbacks", dict)):
        if name in state and not isinstance(state[name], kind):
            return f"has no {name}"
    named = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    if named.isdecimal() and int(named) != step:
        return f"is of step {step}"
    steps = state.get("max_steps")
    if step < 0 or (isinstance(steps, int) and 0 < steps < step):
        return f"is of step {step} of {steps}"
    return ""


def parts_of(folder: Path) -> list[Path]:
    """Return the files that training goes on from and that have a digest: weights, states, random and trainer state.

    Folders in which each process of FSDP or DeepSpeed writes its own shard are left out: nobody sees all of them.

    Args:
        folder: of the checkpoint.
    """
    shards = ("model-*.safetensors", "pytorch_model-*.bin")
    files = [*_glob(folder, *_WEIGHTS, *_INDICES, *shards, *_STATES, STATE_NAME)]
    return files + [path for adapter in _adapter_folders(folder) for path in _glob(adapter, *_ADAPTERS)]


def _exchanged(folder: Path, unreadable: Collection[Path]) -> list[Path]:
    """Return the parts that are whole, but not what was saved there."""
    saved = (read_object(folder / FACTS_NAME) or {}).get("digests")
    if not isinstance(saved, dict):  # of an older version, or a process that was killed before it had them
        return []
    return differing(folder, [path for path in parts_of(folder) if path not in unreadable], saved)


def saving_processes(folder: Path) -> int:
    """Return how many processes have saved a checkpoint: each has its own random state.

    Args:
        folder: of the checkpoint.
    """
    facts = read_object(folder / FACTS_NAME) or {}
    noted = facts.get("facts", {}).get("processes") if isinstance(facts.get("facts"), dict) else None
    if isinstance(noted, int) and noted > 0:
        return noted
    ranks = [int(match[1]) for path in _glob(folder, "rng_state_*.pth") if (match := _RNG.fullmatch(path.name))]
    return max(ranks) + 1 if ranks else 1


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file; None where there is no such file, or none that can be read.

    Args:
        path: of the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _glob(folder: Path, *patterns: str) -> Iterator[Path]:
    return (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())


def _adapter_folders(folder: Path) -> list[Path]:
    return sorted({path.parent for name in _ADAPTERS for path in (*folder.glob(name), *folder.glob(f"*/{name}"))})


def _has_weights(folder: Path) -> bool:
    whole = any((folder / name).is_file() for name in (*_WEIGHTS, *_INDICES))
    return whole or bool(_adapter_folders(folder)) or any(folder.glob("pytorch_model_fsdp*"))


def _sharded_engine(folder: Path) -> bool:
    """Return whether DeepSpeed keeps weights and optimizer, in a folder that ``latest`` names."""
    return (folder / "latest").is_file()


def _missing_random_state(folder: Path, processes: int) -> list[str]:
    saved = saving_processes(folder)
    if saved == 1:
        return [] if (folder / "rng_state.pth").is_file() else ["rng_state.pth"]
    # on several machines without a common disk, each has the files of its own processes
    if int(os.environ.get("LOCAL_WORLD_SIZE", processes)) < processes:
        return []
    names = (f"rng_state_{rank}.pth" for rank in range(saved))
    return [name for name in names if not (folder / name).is_file()]


def _damage(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that cannot be read, with the reason."""
    facts = read_object(folder / FACTS_NAME) or {}
    if (folder / FACTS_NAME).exists() and not all(isinstance(facts.get(part), dict) for part in ("facts", "parts")):
        yield folder / FACTS_NAME, "cannot be read"
    for path in _glob(folder, "config.json", "generation_config.json", "*adapter_config.json"):
        if read_object(path) is None:
            yield path, "is no JSON"
    for path in _glob(folder, *_WEIGHTS):
        if why := _unreadable(path):
            yield path, why
    for path in _glob(folder, *_INDICES):
        yield from _damaged_shards(path)
    for adapter in _adapter_folders(folder):
        for path in _glob(adapter, *_ADAPTERS):
            if why := _unreadable(path):
                yield path, why
        if not (adapter / "adapter_config.json").is_file():
            yield adapter / "adapter_config.json", "is missing"
    for path in _glob(folder, *_STATES):
        if why := _unreadable(path):
            yield path, why
    # torch.distributed.checkpoint: a table of contents, and a file of each process
    for part in (*folder.glob("pytorch_model_fsdp_*/"), *folder.glob("optimizer_*/")):
        if not (part / ".metadata").is_file():
            yield part / ".metadata", "is missing"
        yield from ((path, "is empty") for path in part.glob("*.distcp") if not path.stat().st_size)
    if _sharded_engine(folder):
        part = folder / (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if part == folder or not any(part.glob("*.pt")):
            yield folder / "latest", "names no folder with states"
        for path in part.glob("*.pt"):
            if why := _unreadable(path):
                yield path, why


def _damaged_shards(index: Path) -> Iterator[tuple[Path, str]]:
    content = read_object(index)
    names = content.get("weight_map") if content is not None else None
    if not isinstance(names, dict) or not names:
        yield index, "is no table of shards"
        return
    for name in sorted({str(name) for name in names.values()}):
        path = index.parent / name
        if not path.is_file():
            yield path, "is missing"
        elif why := _unreadable(path, {key for key, shard in names.items() if shard == name}):
            yield path, why


def _unreadable(path: Path, wanted: set[str] | None = None) -> str:
    """Return why a file of tensors cannot be loaded, empty if it can.

    Args:
        path: of the file.
        wanted: names of tensors that have to be in it, where it is a shard.
    """
    try:
        if not path.stat().st_size:
            return "is empty"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                lost = (wanted or set()) - set(file.keys())
            return f"lacks {min(lost)}" if lost else ""
        if not zipfile.is_zipfile(path):  # torch's old format; a cut archive has lost the end that tells
            torch.load(path, map_location="cpu", weights_only=True)
            return ""
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return f"is damaged ({broken})" if broken else ""
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        return f"cannot be read ({type(error).__name__}{': ' if reason else ''}{reason})"
