"""What a command says when its user made a mistake: one message and exit code 2, while a bug keeps its traceback."""

from __future__ import annotations

import dis
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from .secrets import hidden

#: Environment variable that, set to anything but 0, lets every error show its traceback.
TRACEBACK_VARIABLE = "DPSM_HF_TRACEBACK"

#: Exit code of a command after a mistake; that of argparse too.
EXIT_CODE = 2

#: Kinds of errors that stand for mistakes where a raise statement of the package gives them their words.
_OWN = (ValueError, OSError, ImportError)
_PACKAGE = __name__.partition(".")[0]
# A check in one of these is of something that it was given; torch's may be of what we make of it.
_CHECKING = ("transformers", "accelerate", "datasets", "huggingface_hub", "peft", "tokenizers", "trl")
# Seconds that the other processes of a launcher let the first one say it, which ends them all.
_PATIENCE = 15.0


def exit_status(command: Callable[[], object], package: str = _PACKAGE) -> int:
    """Run a command, and say in plain words what its user did wrong.

    Of several processes under a launcher the first one speaks. Another one that meets the mistake waits to be ended by
    the launcher, and speaks only where that does not happen, since then it is alone with the mistake.

    Args:
        command: without arguments; what it returns counts where it is a whole number.
        package: whose checks speak like those of this package; that of a task that is not in here.

    Returns:
        The exit status: what the command returned, else 0; 2 after a mistake.

    Raises:
        Exception: whatever is no mistake, see `is_mistake`; everything where `TRACEBACK_VARIABLE` is set.
    """
    try:
        result = command()
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0") or not is_mistake(error, package):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE)
        place = _place(error)
        where = f" ({place} says so; {TRACEBACK_VARIABLE}=1 shows where)" if place in _CHECKING else ""
        print(hidden(f"error: {error}{where}"), file=sys.stderr, flush=True)
        return EXIT_CODE
    return result if isinstance(result, int) else 0


def is_mistake(error: BaseException, package: str = _PACKAGE) -> bool:
    """Return whether an error tells of a mistake of the user, in words that are meant for them.

    It does where a raise statement of this package raised a ValueError, an OSError or an ImportError, where one of the
    libraries refused a value that it was given or lacks a package, and where the system refused a named file. An error
    that Python itself raises (``int("x")``), or one of another kind, is a bug and is worth its traceback.

    Args:
        error: as it was caught, with its traceback.
        package: whose checks speak like those of this package.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return True
    place = _place(error)
    if place in (_PACKAGE, package):
        return isinstance(error, _OWN)
    if place not in _CHECKING:
        return False
    lacks = isinstance(error, (ImportError, RuntimeError)) and "install" in str(error)
    return lacks or isinstance(error, (ValueError, OSError))


def _place(error: BaseException) -> str:
    """Return the package whose raise statement an error comes from, empty where Python itself raised it."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] if raised else ""
