"""JSON files that are either whole or not there, and the numbers in them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write JSON so that the file is either whole or not there, whenever the process is killed."""
    text = json.dumps(record, indent=1, allow_nan=False)
    temporary = _temporary(path)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Parse a JSON file; ValueError with its name if it is not JSON in UTF-8."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and repeat the run that wrote it.") from error


def check_folder(path: str | Path, option: str) -> Path:
    """Return the path of a folder that is there or can be made.

    Args:
        path: of the folder.
        option: that names it, for the error.

    Raises:
        ValueError: it, or something above it, is a file.
    """
    folder = Path(path)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{option} {str(path)!r}: {str(place)!r} is a file, not a folder; name another place.")
    return folder


def json_number(value: float) -> float | None:
    """Return a number, or None where it is infinite or NaN, for which JSON has none."""
    return value if math.isfinite(value) else None


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a compressed ``.npz`` so that the file is either whole or not there, whenever the process is killed."""
    temporary = _temporary(path)
    with temporary.open("wb") as file:  # to a name, numpy would add an ending
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def strict(value: Any) -> Any:
    """Replace what JSON cannot hold (NaN, infinity) by null, and NumPy's numbers by Python's, at any depth."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _temporary(path: Path) -> Path:
    # not mkstemp, whose files nobody else may read
    return path.with_name(f"{path.name}.{os.getpid()}.part")
