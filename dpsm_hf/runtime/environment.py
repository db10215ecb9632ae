"""Where the package is, and which versions of what decides a run's numbers: known without importing any of it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from ..version import __version__

#: Folder of the package.
PACKAGE = Path(__file__).resolve().parents[1]

#: Folder that holds the package; in a clone, the clone's.
ROOT = PACKAGE.parent


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"dpsm_hf": __version__, "python": sys.version.split()[0], **found}
