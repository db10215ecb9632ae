"""Local files and folders named in a campaign's file: found from its folder."""

from __future__ import annotations

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
