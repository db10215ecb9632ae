"""Check the arguments of the training scripts in a campaign's file: names, types, and whether the script takes them.

In all functions, ``task`` is a key of `tasks.TASKS`, and ``arguments`` are those of a run, with checked names and
types.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import logging
import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from ...runtime import typed_values
from ...runtime.typed_values import describe, options_of, words_of
from ...runtime.yaml_lines import Located, suggestion
from ...tasks import TASKS, get_task
from ...tasks.command_line import ELSEWHERE, REMOVED_ARGUMENTS

#: Arguments that the campaign itself sets for every run, and why a file may not.
RESERVED = {
    "output_dir": "every run has a folder of its own",
    "seed": "list seeds under seeds",
    "run_name": "the campaign names its runs",
    "report_to": "name trackers under track",
    "resume_from_checkpoint": "an interrupted run is resumed by itself",
    "push_to_hub": "the runs of a campaign stay where they are",
    "stop_at_step": "the budget says where runs are compared",
    "load_best_model_at_end": "evaluate_best reports the best checkpoint beside the last one",
}


@functools.cache
def argument_classes(task: str) -> tuple[type, ...]:
    """Return the dataclasses of a task's arguments, the training arguments last, in a form that needs no device."""
    *others, training = get_task(task).argument_classes()
    return (*others, type(training.__name__, (training,), {"device": property(lambda self: torch.device("cpu"))}))


@functools.cache
def argument_fields(task: str) -> Mapping[str, tuple[Any, dataclasses.Field[Any]]]:
    """Return type and dataclass field of every argument of a task's script, by name."""
    found = {}
    for kind in argument_classes(task):
        hints = typing.get_type_hints(kind)
        found.update({field.name: (hints[field.name], field) for field in dataclasses.fields(kind) if field.init})
    return found


def check_name(task: str, name: str) -> str | None:
    """Return what is wrong with the name of an argument, with the remedy; None if nothing is."""
    if name in RESERVED:
        return f"the campaign sets this argument itself; leave it out: {RESERVED[name]}"
    if name in REMOVED_ARGUMENTS:
        return f"this argument is gone from transformers 5; {REMOVED_ARGUMENTS[name]}"
    if name not in argument_fields(task) and name in ELSEWHERE:
        return f"{name} {ELSEWHERE[name]}"
    if name not in argument_fields(task):
        lists = f"dpsm {TASKS[task].command} --help lists them"
        known = suggestion(name, argument_fields(task)).replace("look it up", lists)
        return f"{name!r} is not an argument of the script; {known}"
    return None


def typed_value(task: str, name: str, given: Located) -> Any:
    """Convert the value of an argument to the script's type, so that equal values give equal run ids.

    Raises:
        ValueError: if it cannot be converted, or is not among the allowed values.
    """
    hint, field = argument_fields(task)[name]
    value, choices = given.plain(), [str(choice) for choice in field.metadata.get("choices", ())] or words_of(hint)
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(f"{value!r} is not allowed; {suggestion(value, choices)}")
    try:
        return typed_values.typed_value(name, hint, value, text=False)
    except ValueError as error:
        quotes = isinstance(value, bool) and (choices or str in options_of(hint))
        raise ValueError(
            f"{given.kind} ({value!r}) where the script takes {describe(hint, choices)}"
            + ("; YAML reads a bare word such as no, off or yes as this: put it in quotes" if quotes else "")
            + (f": it {error}" if isinstance(value, (int, float, str)) and not isinstance(value, bool) else "")
        ) from None


def refusals(task: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the messages with which the script would refuse a run's arguments; needs no device, file or network."""
    kind, built, found = get_task(task), [], []
    # the run may be for another machine, whose precision and sharding this one need not support
    elsewhere = {"output_dir": "unused", "report_to": "none", "use_cpu": True}
    given = {k: v for k, v in arguments.items() if k not in ("tf32", "fsdp", "fsdp_config", "deepspeed")}
    with quiet():
        for arguments_class in argument_classes(task):
            names = {field.name for field in dataclasses.fields(arguments_class) if field.init}
            values = {**given, **elsewhere} if issubclass(arguments_class, kind.training_class) else given
            try:
                built.append(arguments_class(**{name: value for name, value in values.items() if name in names}))
            except (ValueError, TypeError) as error:
                found.append(str(error))
        if not found:
            run = kind(*built)
            try:
                run.check()
                if run.model_args.model_type is not None and run.model_args.model_name_or_path is None:
                    run.scratch_config(None)
            except ValueError as error:
                found.append(str(error))
    return [" ".join(message.split()) for message in found]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logging, warnings and output of configurations and dataclasses: a plan builds thousands of them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def defaults_among(task: str, arguments: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the arguments whose value is the script's own default."""
    fields = argument_fields(task)
    return frozenset(name for name, value in arguments.items() if value == _default(fields[name][1]))


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else value


def effective(task: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that have an effect: without those of alpha, unless ``scoring_rule`` is ``dpsm``."""
    if arguments.get("scoring_rule", "dpsm") == "dpsm":
        return dict(arguments)
    return {name: value for name, value in arguments.items() if not name.startswith("alpha_")}
