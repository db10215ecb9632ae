"""Former names: of modules that moved, importable under them still, and of arguments.

Files outside the package import some of them: the ``evaluate`` module ``token_calibration`` lies in users' caches, and
the documentation named others. Both names give the same module.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

#: Former name and today's, of arguments.
ARGUMENTS = {"loss_type": "scoring_rule"}

#: Former name and today's of modules, both without the package.
MOVED = {
    "arguments": "training.arguments",
    "callbacks": "training.callbacks",
    "campaign.running": "campaign.runner.running",
    "campaign.status": "campaign.runner.status",
    "corrupted_training": "training.corruption",
    "depth": "evaluation.depth",
    "files": "runtime.files",
    "losses": "rules.losses",
    "profiling": "measuring.profiling",
    "reliability": "plots.reliability",
    "schedules": "rules.schedules",
    "scoring_rules": "rules.scoring_rules",
    "temperature": "evaluation.temperature",
    "trainer": "training.trainer",
}

_PACKAGE = __name__.partition(".")[0]


class _FormerNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answer an import of a former name with the module of today."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return None if _today(fullname) is None else importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(_today(spec.name)))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # the import has put the former name's in its place
            module.__spec__ = spec.loader_state


def _today(former: str) -> str | None:
    """Return today's name of a module, or of one inside of a package that moved; None if it did not move."""
    package, _, name = former.partition(".")
    if package == _PACKAGE:
        for old, new in MOVED.items():
            if name == old or name.startswith(f"{old}."):
                return f"{_PACKAGE}.{new}{name[len(old) :]}"
    return None


def install() -> None:
    """Let the import system know the former names, once."""
    if not any(isinstance(finder, _FormerNames) for finder in sys.meta_path):
        # first: the files of a package that moved would be found below its former name, as other modules
        sys.meta_path.insert(0, _FormerNames())
