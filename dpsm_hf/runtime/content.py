"""Files and folders known by what they hold, wherever they lie."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

# A file that is larger counts by its size, its first and its last part: hashing a whole crawl would take minutes.
_LARGEST, _PART = 256 << 20, 1 << 20


def content_hash(path: Path) -> str:
    """Return a hash of what a file, or all files of a folder, hold; names within the folder count, its own does not.

    A file of more than 256 MB counts by its size and its first and last MB.

    Args:
        path: the file or folder.
    """
    if path.is_file():
        status = path.stat()
        return _file_hash(path, status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256()
    for file in sorted(found for found in path.rglob("*") if found.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{content_hash(file)}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of every byte of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_PART):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    if size <= _LARGEST:
        return f"sha256:{file_sha256(path)}"
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size}\0".encode() + file.read(_PART))
        file.seek(-_PART, os.SEEK_END)
        digest.update(file.read(_PART))
    return f"sha256:{digest.hexdigest()}"
