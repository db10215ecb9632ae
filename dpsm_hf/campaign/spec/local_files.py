"""Local files and folders named in a campaign's file: their paths are relative to its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: Arguments of the scripts that always name a local file.
FILE_ARGUMENTS = ("train_file", "validation_file", "test_file", "calibration_file", "deepspeed", "fsdp_config")
#: Arguments that name a local folder if their value looks like a path, and otherwise something on the hub.
SOURCE_ARGUMENTS = ("dataset_name", "tokenizer_name", "model_name_or_path", "config_name", "bertscore_model")
#: The argument that names a folder for files that runs write and share, or this word for none.
CACHE_ARGUMENT, NO_CACHE = "frozen_cache", "off"
#: The argument that is a list of such sources, each as ``NAME=SOURCE``.
EXTRA_ARGUMENT = "extra_eval_datasets"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_PATH_STARTS = ("/", "./", "../", "~")


def expand_variables(text: str) -> str:
    """Replace ``${NAME}`` and ``${NAME:-default}`` by the values of environment variables.

    Raises:
        ValueError: naming a variable that is not set and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(f"the environment variable {name} is not set; set it, or write ${{{name}:-A_DEFAULT}}")
        return found

    return _VARIABLE.sub(value, text)


def local_path(argument: str, text: str, folder: Path) -> Path | None:
    """Return the local file or folder that an argument names; None if it names something on the hub or built in.

    Args:
        argument: name of the argument.
        text: its value, with variables expanded.
        folder: where relative paths start.
    """
    is_path = text.startswith(_PATH_STARTS) or text in (".", "..")
    if argument not in FILE_ARGUMENTS and not (argument in (*SOURCE_ARGUMENTS, EXTRA_ARGUMENT) and is_path):
        return None
    return Path(os.path.normpath(folder / Path(text).expanduser()))
