"""Files of settings, YAML or JSON: the values by name, each with the line it stands in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.yaml_lines import Located, Place, Problems, located, read_yaml

CONFIG_FILE_SUFFIXES = (".json", ".yaml", ".yml")


def read_settings(path: Path) -> dict[str, Located]:
    """Read a file of settings.

    Args:
        path: Of a file that ends in .json, .yaml or .yml.

    Returns:
        The values by name.

    Raises:
        ValueError: The file is not UTF-8, not valid, or no mapping of argument names to values.
        FileNotFoundError: There is no such file.
    """
    shown = f"The configuration file {str(path)!r}"
    if path.suffix not in CONFIG_FILE_SUFFIXES:
        raise ValueError(f"{shown} must end in {', '.join(CONFIG_FILE_SUFFIXES)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{shown} does not exist." if not path.exists() else f"{shown} is a folder.")
    mapping = "must hold a mapping of argument names to values"
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if kind == "JSON":
            given = json.loads(text, object_pairs_hook=_each_once)
            if not isinstance(given, dict):
                raise ValueError(f"{shown} {mapping}.")
            return {name: located(value, Place(str(path), _line(text, name))) for name, value in given.items()}
        problems = Problems()
        read = read_yaml(text, str(path), problems, f"the file {mapping}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown} is not UTF-8: {error}.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{shown} is not valid {kind}: {error}") from error
    if problems.found or read is None:
        raise ValueError(f"{shown} is not valid YAML: " + "; ".join(problems.found))
    values: dict[str, Located] = read.value
    return values


def as_written(item: Located) -> Any:
    """Return the text behind a value that YAML reads as another kind: ``no`` of False, ``2024`` of a number.

    Args:
        item: A value of a file.

    Returns:
        The text, or the list of texts; None where it says no more than the value.
    """
    if isinstance(item.value, list):
        return [as_written(each) or each.plain() for each in item.value]
    if isinstance(item.value, int) and not isinstance(item.value, bool) and item.written is None:  # of JSON
        return str(item.value)
    return None if item.value is None else item.written


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is given twice, as {found[name]!r} and {value!r}: keep one of the two.")
        found[name] = value
    return found


def _line(text: str, name: str) -> int:
    """Return the line of a key in a JSON text."""
    match = re.search(rf"{re.escape(json.dumps(name))}\s*:", text)
    return 1 + text.count("\n", 0, match.start() if match else 0)
