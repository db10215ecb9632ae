"""--extra_eval_datasets: sets that a model is evaluated on beside its own, and never fitted or chosen by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.loading import AnyDataset, load_text_datasets
from ..data.summarization import known_columns, resolve_columns

#: First parts of metric names that have a meaning already.
RESERVED_NAMES = ("eval", "test", "train", "best", "last", "calibration", "predict", "validation")

_OPTION = "--extra_eval_datasets"
_KEYS = ("config", "split", "text", "summary")
_SYNTAX = "NAME=SOURCE, with any of ,config=... ,split=... ,text=COLUMN ,summary=COLUMN behind it"


@dataclass(frozen=True)
class ExtraDataset:
    """One data set to evaluate on beside those of the run.

    Args:
        name: prefix of its metrics.
        source: a hub name, a folder, python-docs, python-docstrings, or a file.
        config: configuration of a named set.
        split: to evaluate on; None takes test, else validation, else the only one there is.
        text_column: column with the texts; None finds it as the script does for its own data.
        summary_column: column with the summaries.
    """

    name: str
    source: str
    config: str | None = None
    split: str | None = None
    text_column: str | None = None
    summary_column: str | None = None

    @property
    def is_file(self) -> bool:
        """Return whether the source is a file."""
        return Path(self.source).is_file()

    def load(self, **options: Any) -> AnyDataset:
        """Load the split with further options of `load_text_datasets`, whose errors then name the option too."""
        try:
            if self.is_file:
                return load_text_datasets(test_file=self.source, required_splits=["test"], **options)["test"]
            given = {"validation_split_percentage": None, **options}
            raw = load_text_datasets(self.source, self.config, required_splits=(), **given)
            only = next(iter(raw)) if len(raw) == 1 else None
            split = self.split or next((name for name in ("test", "validation") if name in raw), only)
            if split not in raw:
                there = ", ".join(map(repr, raw))
                raise ValueError(f"it has the splits {there}; name one with ,split=... behind the source.")
            return raw[split]
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            raise type(error)(f"{_OPTION} {self.name}={self.source}: {error}") from None

    def pair_columns(self, column_names: Sequence[str], own: tuple[str, str]) -> tuple[str, str]:
        """Decide which columns hold texts and summaries: named ones, those of a known set, the run's, the first two.

        Errors are those of `resolve_columns`, and name the option too.
        """
        given = (self.text_column, self.summary_column)
        if given == (None, None) and known_columns(self.source) is None and set(own) <= set(column_names):
            return own
        try:
            return resolve_columns(column_names, self.source, *given)
        except ValueError as error:
            raise ValueError(f"{_OPTION} {self.name}={self.source}: {error}") from None


def parse_extra_datasets(words: Sequence[str]) -> list[ExtraDataset]:
    """Read the values of --extra_eval_datasets, each ``NAME=SOURCE`` with options such as ``,split=test`` behind it.

    Raises:
        ValueError: if one is not of this form, or a name is no identifier, is taken, or means something else.
    """
    found: dict[str, ExtraDataset] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        if not equals or not rest:
            raise ValueError(f"{_OPTION} {word}: write {_SYNTAX}.")
        _check_name(name, word, found)
        source, options = (rest, []) if Path(rest).exists() else (rest.split(",")[0], rest.split(",")[1:])
        values: dict[str, str] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if key not in _KEYS or not equals or not value or key in values:
                raise ValueError(
                    f"{_OPTION} {word}: {option!r} is not understood; write {_SYNTAX}, each at most once."
                )
            values[key] = value
        extra = ExtraDataset(name, source, *map(values.get, _KEYS))
        if extra.is_file and (extra.config or extra.split):
            raise ValueError(f"{_OPTION} {word}: a file has neither configurations nor splits; leave them out.")
        found[name] = extra
    return list(found.values())


def _check_name(name: str, word: str, found: Mapping[str, ExtraDataset]) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(
            f"{_OPTION} {word}: the name {name!r} becomes a prefix of metrics, so it must begin with a letter and "
            "hold letters, digits and underscores alone."
        )
    if name.lower().split("_")[0] in RESERVED_NAMES:
        raise ValueError(
            f"{_OPTION} {word}: metrics that begin with {name!r} would be taken for others; choose a name that does "
            f"not begin with {', '.join(RESERVED_NAMES)}."
        )
    if name in found:
        raise ValueError(f"{_OPTION} {word}: there is a set of the name {name!r} already ({found[name].source}).")
