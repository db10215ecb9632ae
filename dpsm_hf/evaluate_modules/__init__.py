"""The `evaluate` modules `token_calibration` and `distinct_n`, loaded from a local path without the network.

`evaluate` copies a module's file into its own cache and runs it there, so these files import by absolute name only.
"""

from __future__ import annotations

from pathlib import Path

#: Names of the modules; each is a folder with its file and its card.
MODULES = ("token_calibration", "distinct_n")


def module_path(name: str) -> str:
    """Return the folder of a module, for ``evaluate.load(module_path("token_calibration"))``.

    Raises:
        ValueError: for a name that is not in `MODULES`.
    """
    if name not in MODULES:
        raise ValueError(f"dpsm_hf ships no evaluate module {name!r}; it has {', '.join(MODULES)}.")
    return str(Path(__file__).resolve().parent / name)
