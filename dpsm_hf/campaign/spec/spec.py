"""`SpecReader`: read a campaign's file at one scale into typed entries.

Every mistake is noted with its line, and reading continues.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...runtime.yaml_lines import Located, Place, Problems, located, suggestion, with_keys
from ...tasks import TASKS
from .design import ROLES, TRACKERS, Budget, Campaign, Variation
from .local_files import CACHE_ARGUMENT, EXTRA_ARGUMENT, NO_CACHE, expand_variables, local_path
from .script_arguments import check_name, typed_value

T = TypeVar("T")

#: Keys of a file; those of `SCALED` may also be given under a scale.
KEYS = ("name", "title", "task", "reference", "brier", "quality", "test_split", "variations", "scales")
SCALED = ("base", "sizes", "data", "seeds", "studies", "budget", "audit", "track")
#: Keys of an entry, by section.
ENTRY_KEYS = {
    "variations": ("title", "role", "arguments", "of"),
    "sizes": ("title", "arguments", "start_from", "processes", "architecture"),
    "data": ("title", "arguments", "train_tokens", "train_examples"),
    "studies": ("title", "variations", "sizes", "data", "seeds", "arguments", "grid", "replaces"),
}
#: Stands for all variations.
ALL = "all"
# Keys of the audit, besides its size, and their smallest values.
_AUDIT = {"tokens": 2, "repeats": 1, "steps": 0, "sequences": 1, "length": 2}


@dataclass(frozen=True)
class Given(Located):
    """The typed value of an argument with its place in the file; None removes it, so that the script's default holds.

    ``paths`` are the local files and folders that it names.
    """

    paths: tuple[Path, ...] = ()


Arguments = Mapping[str, Given]


def values_of(given: Arguments) -> dict[str, Any]:
    """Return the plain values of the arguments, without removed ones."""
    return {name: value.value for name, value in given.items() if value.value is not None}


@dataclass(frozen=True)
class Entry:
    """What all entries of the file share: name, title, the place of the name, and arguments."""

    name: str
    title: str
    place: Place
    arguments: Arguments


@dataclass(frozen=True)
class VariationEntry(Entry):
    """A variation; see `design.Variation`."""

    role: str = "main"
    of: Located | None = None

    @property
    def design(self) -> Variation:
        """Return the variation without places in the file."""
        arguments = values_of(self.arguments)
        return Variation(self.name, self.title, self.role, arguments, self.of.value if self.of else None)


@dataclass(frozen=True)
class StartFrom:
    """A run whose model the runs of a size start from.

    Its arguments are added to those of the base, the size, the data and the reference. Without a seed of its own there
    is one such run for each seed of the runs that start from it.
    """

    title: str
    arguments: Arguments
    seed: int | None


@dataclass(frozen=True)
class SizeEntry(Entry):
    """A size of the model, and how many processes its runs are launched on.

    ``architecture`` has ``model_type`` and ``config_overrides`` of a model on the hub, for the plan, which loads no
    model.
    """

    start_from: StartFrom | None = None
    processes: int = 1
    architecture: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataEntry(Entry):
    """A data set; ``planned`` has the number of tokens or examples of its train split, for the plan."""

    planned: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyEntry(Entry):
    """A part of the campaign: its variations, sizes, data and seeds, and arguments that it changes for all of them.

    Every combination of the values in ``grid`` is a setting. ``replaces`` are the arguments that the study may change
    although a variation sets them.
    """

    variations: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    grid: Mapping[str, tuple[Given, ...]] = field(default_factory=dict)
    replaces: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Spec:
    """A campaign's file at one scale: the design without runs and points, and the entries to expand into these."""

    design: Campaign
    base: Arguments
    variations: Mapping[str, VariationEntry]
    sizes: Mapping[str, SizeEntry]
    data: Mapping[str, DataEntry]
    studies: Mapping[str, StudyEntry]
    places: Mapping[str, Place]


class SpecReader:
    """Read a file's keys, with those of a scale applied, into a `Spec`; mistakes go to ``problems``.

    ``folder`` is that of the file, where relative paths start.
    """

    def __init__(self, tree: Located, folder: Path, problems: Problems) -> None:
        self.tree, self.folder, self.problems, self.wrong = with_keys(tree), folder, problems, problems.at
        self.task = "language-modelling"
        self.seeds: tuple[int, ...] = ()
        self.variations: dict[str, VariationEntry] = {}
        self.sizes: dict[str, SizeEntry] = {}
        self.data: dict[str, DataEntry] = {}

    def read(self, scale: str, source: str) -> Spec:
        """Return the file as a `Spec`; valid only if ``problems`` stayed empty.

        Args:
            scale: name of the scale.
            source: text of the file.
        """
        top = self.keys(self.tree, (*KEYS, *SCALED), ("name", "task", "reference", "brier", "variations"))
        self.task = self.choice(top.get("task"), TASKS, self.task)
        if "seeds" in top:
            self.seeds = self.seed_list(top["seeds"])
        else:
            what = "is missing, here and under the scale; give [1, 2, 3] for instance"
            self.problems.add(self.tree.place, "seeds", what)
        base = self.arguments(top.get("base"))
        self.variations = self.entries(top, "variations", self.variation)
        self.sizes = self.entries(top, "sizes", self.size)
        self.data = self.entries(top, "data", self.data_set)
        quality = self.keys(top.get("quality"), ("metric", "better"))
        better = self.choice(quality.get("better"), ("lower", "higher"), "lower")
        studies = self.entries(top, "studies", self.study)
        for section in ENTRY_KEYS:
            if section not in top:
                what = "is missing, here and under the scale; give at least one"
                self.problems.add(self.tree.place, section, what)
        compared = {role: self.text(top.get(role)) for role in ("reference", "brier")}
        for role, name in compared.items():
            if name and name not in self.variations:
                self.unknown(top[role], "a variation", name, self.variations)
        titled: dict[str, Mapping[str, Entry]] = {"study": studies, "size": self.sizes, "data": self.data}
        design = Campaign(
            name=self.folder_name(top.get("name")),
            title=self.text(top.get("title"), self.text(top.get("name"))),
            scale=scale,
            task=self.task,
            variations=tuple(entry.design for entry in self.variations.values()),
            points=(),
            runs={},
            reference=compared["reference"],
            brier=compared["brier"],
            budget=self.budget(top.get("budget")),
            audit=self.audit(top.get("audit")),
            quality=(self.text(quality.get("metric"), "perplexity"), better == "higher"),
            test_split=self.choice(top.get("test_split"), ("test", "validation"), "test"),
            source=source,
            track=tuple(self.choice(item, TRACKERS, "") for item in self.items(top.get("track"), empty=True)),
            titles={kind: {name: entry.title for name, entry in of.items()} for kind, of in titled.items()},
            planned={
                "size": {name: dict(entry.architecture) for name, entry in self.sizes.items()},
                "data": {name: dict(entry.planned) for name, entry in self.data.items()},
            },
        )
        places = {"base": self.tree.place, **{key: entry.place for key, entry in top.items()}}
        return Spec(design, base, self.variations, self.sizes, self.data, studies, places)

    # ---- sections --------------------------------------------------------------------------------------------------

    def entries(self, top: Mapping[str, Located], section: str, read: Callable[[Located, str], T]) -> dict[str, T]:
        given = top.get(section)
        if given is None:
            return {}
        if not isinstance(given.value, dict) or not given.value:
            self.wrong(given, f"has {given.kind} where names with keys belong; give at least one")
            return {}
        found = {}
        for name, entry in given.value.items():
            if section == "variations" and name in (*ROLES, ALL):
                self.wrong(entry, "this name means a group; choose another")
            if not name.strip() or set("/,*") & set(name):
                what = f"the name {name!r} has a character of / , * in it; leave it out"
                self.problems.add(entry.place, section, what)
            found[name] = read(entry, name)
        return found

    def common(self, given: Mapping[str, Located], entry: Located, name: str) -> tuple[str, str, Place, Arguments]:
        """Return what all entries have, in the order of `Entry`."""
        return name, self.text(given.get("title"), name), entry.place, self.arguments(given.get("arguments"))

    def variation(self, entry: Located, name: str) -> VariationEntry:
        given = self.keys(entry, ENTRY_KEYS["variations"])
        if "of" in given and "arguments" in given:
            what = "it reads the figures of another variation's runs and has none; leave one out"
            self.wrong(given["of"], f"contradicts arguments: {what}")
        common = self.common(given, entry, name)
        return VariationEntry(*common, self.choice(given.get("role"), ROLES, "main"), given.get("of"))

    def size(self, entry: Located, name: str) -> SizeEntry:
        given = self.keys(entry, ENTRY_KEYS["sizes"])
        start = None
        if "start_from" in given:
            keys = self.keys(given["start_from"], ("title", "arguments", "seed"))
            start = StartFrom(
                self.text(keys.get("title"), f"the model that {name} starts from"),
                self.arguments(keys.get("arguments")),
                self.integer(keys["seed"], 0) if "seed" in keys else None,
            )
        shape = self.keys(given.get("architecture"), ("model_type", "config_overrides"))
        common = self.common(given, entry, name)
        processes = self.integer(given["processes"], 1) if "processes" in given else 1
        return SizeEntry(*common, start, processes, {key: self.text(item) for key, item in shape.items()})

    def data_set(self, entry: Located, name: str) -> DataEntry:
        given = self.keys(entry, ENTRY_KEYS["data"])
        common = self.common(given, entry, name)
        counts = [key for key in ("train_tokens", "train_examples") if key in given]
        return DataEntry(*common, {key: self.integer(given[key], 1) for key in counts})

    def study(self, entry: Located, name: str) -> StudyEntry:
        given = self.keys(entry, ENTRY_KEYS["studies"], ("variations",))
        replaces = []
        for item in self.items(given.get("replaces"), empty=True):
            replaces.append(self.text(item))
            if wrong := check_name(self.task, replaces[-1]):
                self.wrong(item, wrong)
        return StudyEntry(
            *self.common(given, entry, name),
            variations=self.chosen(given.get("variations")),
            sizes=self.names(given.get("sizes"), "a size", self.sizes),
            data=self.names(given.get("data"), "a data set", self.data),
            seeds=self.seed_list(given["seeds"]) if "seeds" in given else self.seeds,
            grid=self.grid(given.get("grid")),
            replaces=frozenset(replaces),
        )

    def grid(self, given: Located | None) -> dict[str, tuple[Given, ...]]:
        found = {}
        for name, entry in self.keys(given).items():
            values: list[Given] = []
            for item in self.items(entry):
                value = self.argument(name, item)
                if value is None:
                    continue
                if value.value in [other.value for other in values]:
                    self.wrong(item, f"{value.value!r} is there twice; keep one")
                values.append(value)
            found[name] = tuple(values)
        return found

    def budget(self, given: Located | None) -> Budget:
        keys, default = self.keys(given, ("limit", "halving")), Budget()
        limit = self.number(keys.get("limit"), default.limit, 1.0, None)
        if "halving" not in keys:
            return Budget(limit=limit)
        halving = self.keys(keys["halving"], ("metric", "rungs", "keep"), ("metric",))
        rungs = default.halving_rungs
        if "rungs" in halving:
            rungs = tuple(self.number(item, 0.5, 0.0, 1.0) for item in self.items(halving["rungs"]))
        keep = self.number(halving.get("keep"), default.halving_keep, 0.0, 1.0)
        metric = self.text(halving.get("metric")) or None
        try:
            return Budget(limit, metric, rungs, keep)
        except ValueError:  # each rung was checked above, so it is their order
            self.wrong(halving["rungs"], "the shares must rise; sort them and keep each once")
            return default

    def audit(self, given: Located | None) -> dict[str, Any] | None:
        if given is None or given.value is None:
            return None
        keys = self.keys(given, ("size", *_AUDIT))
        return {
            key: self.choice(item, self.sizes, "") if key == "size" else self.integer(item, _AUDIT[key])
            for key, item in keys.items()
        }

    # ---- arguments -------------------------------------------------------------------------------------------------

    def arguments(self, given: Located | None) -> dict[str, Given]:
        found = {name: self.argument(name, item) for name, item in self.keys(given).items()}
        return {name: value for name, value in found.items() if value is not None}

    def argument(self, name: str, given: Located) -> Given | None:
        wrong = check_name(self.task, name)
        if wrong is not None:
            self.wrong(given, wrong)
            return None
        if given.value is None:
            return Given(None, given.place, given.key)
        paths: list[Path] = []
        try:
            resolved = self.resolved(name, given.plain(), given.place, paths)
            value = typed_value(self.task, name, located(resolved, given.place))
        except ValueError as error:
            self.wrong(given, str(error))
            return None
        return Given(value, given.place, given.key, paths=tuple(paths))

    def resolved(self, name: str, value: Any, place: Place, paths: list[Path]) -> Any:
        """Return a value with variables and relative paths resolved; append the paths to ``paths``."""
        if isinstance(value, list):
            return [self.resolved(name, item, place, paths) for item in value]
        if not isinstance(value, str):
            return value
        text = expand_variables(value)
        # paths given on the command line are relative to the working directory
        folder = self.folder if place.line is not None else Path.cwd()
        if name == CACHE_ARGUMENT and text != NO_CACHE:  # nothing that a run reads before it has written it
            return os.path.normpath(folder.absolute() / Path(text).expanduser())
        head, source, tail = "", text, ""
        if name == EXTRA_ARGUMENT:
            head, equals, rest = text.partition("=")
            source, comma, tail = rest.partition(",")
            head, tail = head + equals, comma + tail
        path = local_path(name, source, folder)
        if path is None:
            return text
        paths.append(path)
        return f"{head}{path}{tail}"

    # ---- kinds of values -------------------------------------------------------------------------------------------

    def unknown(self, given: Located, what: str, name: str, known: Iterable[str]) -> None:
        self.problems.unknown(given.place, given.key, what, name, known)

    def keys(
        self, given: Located | None, known: Iterable[str] | None = None, required: Iterable[str] = ()
    ) -> dict[str, Located]:
        """Return the values by key; None for ``known`` accepts any key."""
        if given is None:
            return {}
        if not isinstance(given.value, dict | None):
            self.wrong(given, f"has {given.kind} where keys with values belong")
            return {}
        found: dict[str, Located] = given.value or {}
        for key in [key for key in found if known is not None and key not in known]:
            self.unknown(found[key], "a key that is known here", key, known or ())
        for key in required:
            if key not in found:
                self.problems.add(given.place, f"{given.key}.{key}".lstrip("."), "is missing; give it")
        return {key: item for key, item in found.items() if known is None or key in known}

    def items(self, given: Located | None, empty: bool = False) -> list[Located]:
        if given is None:
            return []
        if not isinstance(given.value, list):
            self.wrong(given, f"has {given.kind} where a list belongs; write [ ... ]")
            return []
        if not given.value and not empty:
            self.wrong(given, "is an empty list; give at least one, or leave the key out")
        return given.value

    def text(self, given: Located | None, default: str = "") -> str:
        if given is None:
            return default
        if not isinstance(given.value, str) or not given.value.strip():
            self.wrong(given, f"has {given.kind} where text belongs; put it in quotes")
            return default
        return given.value

    def folder_name(self, given: Located | None) -> str:
        text = self.text(given)
        if given is not None and text and not re.fullmatch(r"[\w][\w.+-]*", text):
            self.wrong(given, f"{text!r} names the folder of the results; use letters, digits and . _ + - alone")
        return text

    def choice(self, given: Located | None, allowed: Iterable[str], default: str) -> str:
        text = self.text(given, default)
        if given is not None and isinstance(given.value, str) and text not in allowed:
            self.wrong(given, f"{text!r} is not known; {suggestion(text, allowed)}")
            return default
        return text

    def integer(self, given: Located, least: int) -> int:
        if isinstance(given.value, bool) or not isinstance(given.value, int) or given.value < least:
            what = f"has {given.kind} ({given.plain()!r}) where a whole number of at least {least} belongs"
            self.wrong(given, what)
            return least
        return given.value

    def number(self, given: Located | None, default: float, least: float, most: float | None) -> float:
        if given is None:
            return default
        value = given.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.wrong(given, f"has {given.kind} ({given.plain()!r}) where a number belongs")
            return default
        if value < least or (most is not None and not least < value < most):
            bounds = f"of at least {least:g}" if most is None else f"between {least:g} and {most:g}"
            self.wrong(given, f"is {value:g}; give a number {bounds}")
            return default
        return float(value)

    def seed_list(self, given: Located) -> tuple[int, ...]:
        found: list[int] = []
        for item in self.items(given):
            value = self.integer(item, 0)
            if value >= 2**32:
                self.wrong(item, f"the seed {value} is too large; it must be less than 2**32")
            if value in found:
                self.wrong(item, f"the seed {value} is there twice; keep one")
            found.append(value)
        return tuple(dict.fromkeys(found))

    def names(self, given: Located | None, what: str, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names in a list; all known ones if it is left out."""
        if given is None:
            return tuple(known)
        found: dict[str, None] = {}
        for item in self.items(given):
            name = self.text(item)
            if name in known:
                found.setdefault(name)
            elif name:
                self.unknown(item, what, name, known)
        return tuple(found)

    def chosen(self, given: Located | None) -> tuple[str, ...]:
        """Return variations given by name, role, a pattern with ``*``, or ``all``; a single word needs no list."""
        listed = [given] if given is not None and isinstance(given.value, str) else self.items(given)
        known, wanted = self.variations, set()
        for item in listed:
            word = self.text(item)
            matching = {n for n, v in known.items() if word in (ALL, v.role) or fnmatch.fnmatchcase(n, word)}
            if word and not matching:
                self.unknown(item, "a variation, a role or all", word, [*known, *ROLES, ALL])
            wanted |= matching
        return tuple(name for name in known if name in wanted)
