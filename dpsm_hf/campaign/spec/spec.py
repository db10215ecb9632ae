"""What a campaign's file says at one scale: its keys, and the types that they are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .design import Budget
from .yaml_lines import Located, Place

TRACKERS = ("wandb", "tensorboard", "trackio")
SCALES = ("small", "paper")
#: Keys of a file; those of `SCALED` may stand under a scale too.
KEYS = ("name", "title", "task", "reference", "brier", "quality", "test_split", "variations", "scales")
SCALED = ("base", "sizes", "data", "seeds", "studies", "budget", "audit", "track")
#: Keys of an entry, by section.
ENTRY_KEYS = {
    "variations": ("title", "role", "arguments", "of"),
    "sizes": ("title", "arguments", "start_from", "processes", "architecture"),
    "data": ("title", "arguments", "train_tokens", "train_examples"),
    "studies": ("title", "variations", "sizes", "data", "seeds", "arguments", "grid", "replaces"),
}
#: A word for all variations.
ALL = "all"


@dataclass(frozen=True)
class Given:
    """The value of an argument, and where it was given.

    Args:
        value: typed; None takes the argument back, so that the script's default holds.
        place, key: where, and the dotted path.
        paths: the local files and folders that it names.
    """

    value: Any
    place: Place
    key: str
    paths: tuple[Path, ...] = ()


Arguments = Mapping[str, Given]


@dataclass(frozen=True)
class Entry:
    """What all named entries have: a name, a title, arguments, and the line of the name."""

    name: str
    title: str
    place: Place
    arguments: Arguments


@dataclass(frozen=True)
class VariationEntry(Entry):
    """A variation; see `design.Variation`."""

    role: str = "main"
    of: Located | None = None


@dataclass(frozen=True)
class StartFrom:
    """A run that makes the model which the runs of a size start from.

    Args:
        title: in words.
        arguments: on top of those of the base, the size, the data and the reference.
        seed: of that run; None takes that of the run which starts from it.
    """

    title: str
    arguments: Arguments
    seed: int | None


@dataclass(frozen=True)
class SizeEntry(Entry):
    """A size of the model.

    Args:
        start_from: the run whose model is trained on; None for the script's own choice.
        processes: to launch a run on.
        architecture: ``model_type`` and ``config_overrides`` of a model on the hub, for the plan, which loads none.
    """

    start_from: StartFrom | None = None
    processes: int = 1
    architecture: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataEntry(Entry):
    """A data set; ``planned`` holds how many tokens or examples its train split has, for the plan."""

    planned: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyEntry(Entry):
    """A part of the campaign: which variations on which sizes, data and seeds, and what it changes for all of them.

    Args:
        variations, sizes, data: names.
        seeds: numbers.
        grid: values by argument; every combination is a setting of its own.
        replaces: arguments that the study may change although a variation fixes them.
    """

    variations: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    grid: Mapping[str, tuple[Given, ...]] = field(default_factory=dict)
    replaces: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Spec:
    """A campaign's file at one scale."""

    name: str
    title: str
    task: str
    reference: str
    brier: str
    quality: tuple[str, bool]
    test_split: str
    base: Arguments
    variations: Mapping[str, VariationEntry]
    sizes: Mapping[str, SizeEntry]
    data: Mapping[str, DataEntry]
    studies: Mapping[str, StudyEntry]
    budget: Budget
    audit: Mapping[str, Any] | None
    track: tuple[str, ...]
    places: Mapping[str, Place]
