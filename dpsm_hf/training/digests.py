"""Digests of a checkpoint's files, by which a file that was exchanged or has a flipped bit is recognised."""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..runtime.content import file_sha256

# What torch writes is an archive that holds a checksum of each tensor already; safetensors hold none.
_ARCHIVES = frozenset({".pt", ".pth", ".bin"})


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the digest of each file by its name within a folder, as POSIX writes it.

    Args:
        folder: of the checkpoint.
        files: within it.
    """
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def differing(folder: Path, files: Iterable[Path], saved: Mapping[str, str]) -> list[Path]:
    """Return the files that are not those whose digests were saved; one without a digest is not compared.

    Args:
        folder: of the checkpoint.
        files: within it, all of them readable.
        saved: as `digests` returns them.
    """
    known = ((path, saved.get(path.relative_to(folder).as_posix())) for path in files)
    return [path for path, wanted in known if wanted is not None and digest(path) != wanted]


def digest(path: Path) -> str:
    """Return the digest of a file; of an archive of torch that of the checksums and names of all that is in it.

    An archive costs no reading of its tensors; of any other file every byte is read, once as long as it is the same.

    Args:
        path: of the file.
    """
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int) -> str:
    if path.suffix in _ARCHIVES and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            table = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
        return f"crc32:{hashlib.sha256(repr(table).encode()).hexdigest()}"
    return f"sha256:{file_sha256(path)}"
