"""Options of the command line, as fields of the dataclasses that `transformers.HfArgumentParser` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import Any


def option(help_text: str, default: Any = None, *, choices: Iterable[str] | None = None) -> Any:
    """Return a field with its text for --help and, where only a few values are allowed, those."""
    metadata = {"help": help_text} if choices is None else {"help": help_text, "choices": list(choices)}
    return field(default=default, metadata=metadata)
