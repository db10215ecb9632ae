"""Where the training scripts are, and which versions of what they need: known without importing any of it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from ..version import __version__

#: Folder of the package.
PACKAGE = Path(__file__).resolve().parents[1]

#: Folder of the clone: the training scripts lie in it, beside the package.
ROOT = PACKAGE.parent


def find_script(name: str) -> Path:
    """Find a training script beside the package, as in a clone or an editable installation.

    Args:
        name: file name of the script.

    Raises:
        FileNotFoundError: if it is not there.
    """
    path = ROOT / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is not in {ROOT}. Only a clone has the scripts: install the package from there with "
            "'pip install -e .'."
        )
    return path


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"dpsm_hf": __version__, "python": sys.version.split()[0], **found}
