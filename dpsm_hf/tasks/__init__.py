"""Training runs from their arguments to their outcome: one file a task, found here by name.

A new task is a file with a subclass of `task.Task` and a line in `TASKS`. This module needs no torch, so that whoever
only starts runs, or lists commands, can read it; a task's own module is imported by `get_task`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from ..runtime.garbage import collector_paused

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .task import Task


class TaskEntry(NamedTuple):
    """Where a task is, and how it is called on the command line.

    Args:
        module: that defines it.
        class_name: the subclass of `task.Task` in there.
        command: word behind ``dpsm``.
        summary: what the command does, for ``dpsm --help``.
    """

    module: str
    class_name: str
    command: str
    summary: str


#: The tasks by the names that campaign files use; a name is part of the id of each of its runs.
TASKS = {
    "language-modelling": TaskEntry(
        f"{__name__}.language_modelling", "LanguageModelling", "clm", "train and evaluate a causal language model"
    ),
    "summarization": TaskEntry(
        f"{__name__}.summarization", "Summarization", "summarization", "train and evaluate an encoder-decoder on pairs"
    ),
}


def get_task(name: str) -> type[Task]:
    """Import a task of `TASKS` and return its class; KeyError if there is none of that name."""
    entry = TASKS[name]
    with collector_paused():
        module = importlib.import_module(entry.module)
    task: type[Task] = getattr(module, entry.class_name)
    return task


def task_of_model(config: PreTrainedConfig) -> type[Task]:
    """Return the first task for models of this kind: language models, or encoder-decoders."""
    return next(task for task in map(get_task, TASKS) if task.encoder_decoder == bool(config.is_encoder_decoder))
