"""The command ``dpsm``, also ``python -m dpsm_hf``."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from .runtime.mistakes import exit_status
from .tasks import TASKS, get_task
from .version import __version__

_T = TypeVar("_T")

_COMMANDS = {
    "calibrate": (
        "dpsm_hf.tasks.calibrate",
        "fit a temperature for a saved model, report calibration before and after",
    ),
    "campaign": (
        "dpsm_hf.campaign.cli",
        "plan, run and report on a programme of experiments from one YAML file",
    ),
    "demo": ("dpsm_hf.campaign.demo", "train a small model three times on real text and compare"),
    "doctor": ("dpsm_hf.tasks.doctor", "say what is installed here, and which path a model would take"),
    "split": ("dpsm_hf.tasks.split", "divide a file into splits so that no text is in two of them"),
    "report": ("dpsm_hf.campaign.report.side_by_side", "compare finished runs in one HTML page"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its module is only imported then.

    Args:
        argv: the command and its arguments; ``sys.argv[1:]`` when None.

    Returns:
        The exit status: 2 for an unknown command or a mistake of the user, which is said in plain words.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    tasks = {entry.command: name for name, entry in TASKS.items()}
    if words and words[0] in tasks:
        task, prog = _imported(get_task, tasks[words[0]]), f"dpsm {words[0]}"
        return exit_status(lambda: task.main(words[1:], prog=prog), task.__module__.partition(".")[0])
    if words and words[0] in _COMMANDS:
        module, _ = _COMMANDS[words[0]]
        return exit_status(lambda: _imported(importlib.import_module, module).main(words[1:]))
    if words == ["--version"]:
        print(f"dpsm_hf {__version__}")
        return 0
    asked = not words or words[0] in ("-h", "--help")
    commands = {name: what for name, (_, what) in _COMMANDS.items()}
    commands |= {entry.command: entry.summary for entry in TASKS.values()}
    listed = "\n".join(f"  {name:<15}{what}" for name, what in sorted(commands.items()))
    text = f"usage: dpsm COMMAND ...\n\n{listed}\n\ndpsm COMMAND --help says more; dpsm --version gives the version."
    if not asked:
        print(f"dpsm: there is no command {words[0]!r}.\n\n{text}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _imported(importing: Callable[[str], _T], name: str) -> _T:
    """Import something without looking for garbage meanwhile: there is hardly any, and the search takes seconds."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return importing(name)
    finally:
        if collecting:
            gc.enable()


if __name__ == "__main__":
    sys.exit(main())
