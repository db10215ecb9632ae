"""Local files and folders named in a campaign's file: found from its folder, and known by what they hold."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

#: Arguments of the scripts that always name a local file.
FILE_ARGUMENTS = ("train_file", "validation_file", "test_file", "calibration_file", "deepspeed", "fsdp_config")
#: Arguments that name a local folder where they look like a path, and otherwise something on the hub.
SOURCE_ARGUMENTS = ("dataset_name", "tokenizer_name", "model_name_or_path", "config_name", "bertscore_model")
#: A list of such sources, each with a name of its own and ``=`` before it.
EXTRA_ARGUMENT = "extra_eval_datasets"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_PATH_STARTS = ("/", "./", "../", "~")
# A file that is larger counts by its size, its first and its last part: hashing a whole crawl would take minutes.
_LARGEST, _PART = 256 << 20, 1 << 20


def expand_variables(text: str) -> str:
    """Put the values of environment variables in place of ``${NAME}`` and ``${NAME:-default}``.

    One that is not set and has no default is a ValueError.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(f"the environment variable {name} is not set; set it, or write ${{{name}:-A_DEFAULT}}")
        return found

    return _VARIABLE.sub(value, text)


def local_path(argument: str, text: str, folder: Path) -> Path | None:
    """Return the file or folder that an argument names, None where it names something on the hub or built in.

    Variables in the text are expanded already; relative paths start from the folder.
    """
    is_path = text.startswith(_PATH_STARTS) or text in (".", "..")
    if argument not in FILE_ARGUMENTS and not (argument in (*SOURCE_ARGUMENTS, EXTRA_ARGUMENT) and is_path):
        return None
    return Path(os.path.normpath(folder / Path(text).expanduser()))


def content_hash(path: Path) -> str:
    """Return a hash of what a file, or all files of a folder, hold; names within the folder count, its own does not.

    A file of more than 256 MB counts by its size and its first and last MB.
    """
    if path.is_file():
        status = path.stat()
        return _file_hash(path, status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256()
    for file in sorted(found for found in path.rglob("*") if found.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{content_hash(file)}\0".encode())
    return f"sha256:{digest.hexdigest()}"


@functools.cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _LARGEST:
            while block := file.read(_PART):
                digest.update(block)
        else:
            digest.update(f"{size}\0".encode() + file.read(_PART))
            file.seek(-_PART, os.SEEK_END)
            digest.update(file.read(_PART))
    return f"sha256:{digest.hexdigest()}"
