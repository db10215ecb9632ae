"""JSON files that are either whole or not there, and the numbers in them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write JSON so that the file is either whole or not there, whenever the process is killed."""
    text = json.dumps(record, indent=1, allow_nan=False)
    # not mkstemp, whose files nobody else may read
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def json_number(value: float) -> float | None:
    """Return a number, or None where it is infinite or NaN, for which JSON has none."""
    return value if math.isfinite(value) else None
