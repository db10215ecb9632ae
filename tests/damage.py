"""Ways in which a checkpoint is damaged, each a function of its folder, with the file that is to be named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


def emptied(name: str) -> Damage:
    """As a kill leaves a file, or a crash whose blocks were never written."""
    return lambda folder: (folder / name).write_bytes(b"")


def cut(name: str) -> Damage:
    """As a full disk leaves it."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return damage


def zeroed(name: str) -> Damage:
    """The right length, but the end is zeros, as after a loss of power."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        half = len(content) // 2
        (folder / name).write_bytes(content[:half] + bytes(len(content) - half))

    return damage


def flipped(name: str) -> Damage:
    """A bit in the middle is another one."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def exchanged(name: str) -> Damage:
    """Whole, but that of the checkpoint before."""

    def damage(folder: Path) -> None:
        shutil.copy(folder.parent / "checkpoint-2" / name, folder / name)

    return damage


def without_digests(folder: Path) -> None:
    """As an older version wrote it."""
    facts = json.loads((folder / "run_facts.json").read_text(encoding="utf-8"))
    (folder / "run_facts.json").write_text(json.dumps({**facts, "digests": None}), encoding="utf-8")


def lost(name: str) -> Damage:
    """The file is not there."""
    return lambda folder: (folder / name).unlink()


def altered(name: str, **changes: Any) -> Damage:
    """Whole JSON, but somebody's hand or another program has been in it."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return damage


WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.pt"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights cut": (cut(WEIGHTS), WEIGHTS),
    "weights empty": (emptied(WEIGHTS), WEIGHTS),
    "weights lost": (lost(WEIGHTS), WEIGHTS),
    "weights flipped": (flipped(WEIGHTS), f"{WEIGHTS} is another than was saved"),
    "weights exchanged": (exchanged(WEIGHTS), f"{WEIGHTS} is another than was saved"),
    "optimizer exchanged": (exchanged(OPTIMIZER), f"{OPTIMIZER} is another than was saved"),
    "scheduler exchanged": (exchanged("scheduler.pt"), "scheduler.pt is another than was saved"),
    "random state exchanged": (exchanged("rng_state.pth"), "rng_state.pth is another than was saved"),
    "state altered": (altered("trainer_state.json", log_history=[]), "trainer_state.json is another than was saved"),
    "optimizer cut": (cut(OPTIMIZER), OPTIMIZER),
    "optimizer empty": (emptied(OPTIMIZER), OPTIMIZER),
    "optimizer zeroed": (zeroed(OPTIMIZER), OPTIMIZER),
    "optimizer flipped": (flipped(OPTIMIZER), OPTIMIZER),
    "optimizer lost": (lost(OPTIMIZER), OPTIMIZER),
    "scheduler empty": (emptied("scheduler.pt"), "scheduler.pt"),
    "scheduler lost": (lost("scheduler.pt"), "scheduler.pt"),
    "random state cut": (cut("rng_state.pth"), "rng_state.pth"),
    "random state lost": (lost("rng_state.pth"), "rng_state.pth"),
    "state cut": (cut("trainer_state.json"), "trainer_state.json"),
    "state empty": (emptied("trainer_state.json"), "trainer_state.json"),
    "state lost": (lost("trainer_state.json"), "trainer_state.json"),
    "state of another step": (altered("trainer_state.json", global_step=2), "trainer_state.json is of step 2"),
    "state before the start": (altered("trainer_state.json", global_step=-1), "trainer_state.json is of step -1"),
    "state with a strange key": (altered("trainer_state.json", foo=1), "trainer_state.json has a key 'foo'"),
    "state without a log": (altered("trainer_state.json", log_history=None), "trainer_state.json has no log_history"),
    "state without callbacks": (altered("trainer_state.json", stateful_callbacks=[]), "has no stateful_callbacks"),
    "facts cut": (cut("run_facts.json"), "run_facts.json cannot be read"),
    "facts that are none": (altered("run_facts.json", facts=[1]), "run_facts.json cannot be read"),
    "configuration cut": (cut("config.json"), "config.json"),
}
