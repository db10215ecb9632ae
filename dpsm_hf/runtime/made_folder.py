"""A folder that is made once and kept: whole or not there, and known by the hashes of its files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from .content import content_hash
from .files import read_json, write_json

logger = logging.getLogger(__name__)

#: File in the folder that says what it was made from, and the hash of every other file.
RECORD_NAME = "made-from.json"


def made_once(folder: Path, source: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Return a folder, after making it where it is missing, damaged or made from something else.

    Files are written to a draft beside it, which is then renamed. Of several processes one makes it and the others
    wait. Files that were added to the folder later are not looked at, and are lost when it is made anew.

    Args:
        folder: that is wanted; its parents are created.
        source: what it is made from, as JSON; a folder made from another source is made anew.
        make: writes the files into an empty folder, which it is given.

    Raises:
        OSError: the folder cannot be written.
    """
    if problem_of(folder, source) is None:  # without the lock: the cache may be read-only
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        problem = problem_of(folder, source)
        if problem is None:  # another process has made it in the meantime
            return folder
        if folder.exists():
            logger.warning("%s is made anew: %s.", folder, problem)
        draft, former = (folder.with_name(f".{folder.name}.{part}") for part in ("draft", "former"))
        for left_over in (draft, former):  # by a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        draft.mkdir()
        try:
            make(draft)
            files = {path.relative_to(draft).as_posix(): content_hash(path) for path in _files(draft)}
            write_json({"source": source, "files": files}, draft / RECORD_NAME)
            if folder.exists():
                folder.rename(former)
            draft.rename(folder)
        finally:
            for left_over in (draft, former):
                shutil.rmtree(left_over, ignore_errors=True)
    return folder


def problem_of(folder: Path, source: Mapping[str, Any]) -> str | None:
    """Say why a folder is not the one that `made_once` makes from a source; None where it is.

    Args:
        folder: that may be missing.
        source: as `made_once` takes it.
    """
    try:
        record = read_json(folder / RECORD_NAME)
        made_from, files = record["source"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{RECORD_NAME} is missing or damaged"
    if made_from != source:
        return f"it was made from {made_from}, not from {dict(source)}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or content_hash(path) != expected:
            return f"{name} is missing or damaged"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
