"""YAML with the line of every key and value, so that an error can say where it is; and a list of such errors."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import yaml

# More names than this are no help in an error.
_LISTED = 24

Scalar: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True)
class Place:
    """Where something was written: a line of a file, counted from 1, or an option of the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Located:
    """A value of the file, and where it was written; of the entries of a dictionary their keys' places."""

    value: Any  # a scalar, a list of `Located`, or a dictionary of them by key
    place: Place
    key: str = ""  # its dotted path, see `with_keys`; the items of a list have that of the list
    written: str | None = None  # of a scalar, the text as it stands in the file: ``no`` of False, ``007`` of 7

    @property
    def kind(self) -> str:
        """Return the kind of value, for people."""
        names = {dict: "keys with values", list: "a list", bool: "true or false", int: "a whole number"}
        names |= {float: "a number", str: "text", type(None): "nothing"}
        return names[type(self.value)]

    def plain(self) -> Any:
        """Return the value without places, at any depth."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


def located(value: Any, place: Place) -> Located:
    """Return a plain value as if all of it had been written at one place."""
    if isinstance(value, dict):
        return Located({str(key): located(item, place) for key, item in value.items()}, place)
    if isinstance(value, list):
        return Located([located(item, place) for item in value], place)
    return Located(value, place)


def with_keys(given: Located, key: str = "") -> Located:
    """Return a value whose parts, at any depth, know their dotted path."""
    value = given.value
    if isinstance(value, dict):
        value = {name: with_keys(item, f"{key}.{name}" if key else name) for name, item in value.items()}
    elif isinstance(value, list):
        value = [with_keys(item, key) for item in value]
    return replace(given, value=value, key=key)


class SpecError(ValueError):
    """Everything that is wrong with a campaign's file, a line each: ``FILE:LINE: key: what is wrong; remedy``."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class Problems:
    """Collects what is wrong, so that all of it is reported at once."""

    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, place: Place, key: str, what: str) -> None:
        """Note what is wrong at a place and a key's dotted path (empty for the whole file), with the remedy."""
        line = f"{place}: {key}: {what}" if key else f"{place}: {what}"
        self.found.setdefault(line, (place.line or 0, len(self.found)))

    def at(self, given: Located, what: str) -> None:
        """Note what is wrong with a value that knows its path."""
        self.add(given.place, given.key, what)

    def unknown(self, place: Place, key: str, what: str, name: str, known: Iterable[str]) -> None:
        """Note a name that is not ``what`` (``a variation``, say), with those of the known ones that are near."""
        self.add(place, key, f"{name!r} is not {what}; {suggestion(name, known)}")

    def check(self) -> None:
        """Raise what was found, sorted by line, as a SpecError."""
        if self.found:
            raise SpecError(sorted(self.found, key=lambda line: self.found[line]))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return what to write in place of an unknown name: the nearest ones, or the whole list where it is short."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        likeness = [difflib.SequenceMatcher(None, other, name).ratio() for other in close]
        near = [other for other, ratio in zip(close, likeness, strict=True) if ratio > likeness[0] - 0.1]
        return f"did you mean {' or '.join(near)}?"
    if not names:
        return "there is none"
    if len(names) > _LISTED:
        return "look it up"
    return "choose " + (f"one of {', '.join(names)}" if len(names) > 1 else names[0])


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``5e-5`` as a number, as YAML 1.2 does; 1.1 wants a dot."""


_LEADING_ZERO = re.compile(r"[-+]?0[0-7_]+")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(
    text: str,
    name: str,
    problems: Problems,
    wanted: str = "a campaign is keys with values, this is not; see docs/campaigns.md",
) -> Located | None:
    """Read a YAML text whose top level has keys, from a file of this name; None where nothing can be gone on with.

    ``problems`` gets what is wrong: no valid YAML, duplicate keys, keys that are no text, merge keys, tags; ``wanted``
    is said of a file whose top level has no keys.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(name, mark.line + 1 if mark is not None else 1)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "look at this line and the one before (a value with ${NAME} needs quotes within braces)"
        problems.add(place, "", f"this is no valid YAML: {said}; {hint}")
        return None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        problems.add(Place(name, 1), "", f"this is no valid YAML: {' '.join(str(error).split())}; remove them")
        return None
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1 if node is not None else 1
        problems.add(Place(name, line), "", wanted)
        return None
    return _Reader(name, problems).read(node, "")


class _Reader:
    def __init__(self, name: str, problems: Problems) -> None:
        self.name, self.problems = name, problems
        self.constructor = _Loader("")
        self.above: set[int] = set()

    def read(self, node: yaml.Node, path: str, place: Place | None = None) -> Located:
        place = place or self.place(node)
        if isinstance(node, yaml.ScalarNode):
            return Located(self.scalar(node, path), place, written=node.value)
        if id(node) in self.above:
            self.problems.add(place, path, "this alias contains itself; write the values out")
            return Located(None, place)
        self.above.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return Located([self.read(item, f"{path}[{i}]") for i, item in enumerate(node.value)], place)
            return Located(self.mapping(node, path), place)
        finally:
            self.above.remove(id(node))

    def mapping(self, node: yaml.Node, path: str) -> dict[str, Located]:
        found: dict[str, Located] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                self.problems.add(place, path, "merge keys (<<) are not read; put what is shared into base")
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "this"
                self.problems.add(place, path, f"the key {written} is no text; put it in quotes")
                continue
            key = key_node.value
            below = f"{path}.{key}" if path else key
            if key in found:
                first = found[key].place.line
                self.problems.add(place, below, f"this key was given in line {first} already; keep one of the two")
                continue
            found[key] = self.read(value_node, below, place)
        return found

    def scalar(self, node: yaml.ScalarNode, path: str) -> Scalar:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in ("null", "bool", "int", "float", "str"):
            if kind == "timestamp":  # 2026-01-01, as a name
                return str(node.value)
            self.problems.add(self.place(node), path, f"the tag {node.tag} is not read; leave it out")
            return None
        if kind in ("int", "float") and ":" in node.value:  # 12:30, which YAML 1.1 takes for 750
            return str(node.value)
        if kind == "int" and _LEADING_ZERO.fullmatch(node.value):  # 010, which YAML 1.1 takes for 8
            return int(node.value.replace("_", ""), 10)
        try:
            value: Scalar = self.constructor.construct_object(node)
        except (KeyError, ValueError):  # !!bool 'x'
            self.problems.add(self.place(node), path, f"{node.value!r} is no {kind}, as its tag {node.tag} says")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.add(self.place(node), path, f"{node.value} is no number to work with; give a finite one")
            return None
        return value

    def place(self, node: yaml.Node) -> Place:
        return Place(self.name, node.start_mark.line + 1)
