"""The arguments of the training scripts as a campaign's file gives them: known names, right types, accepted values.

A ``task`` is a key of `tasks.TASKS`; ``arguments`` are a run's, known and typed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import logging
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from types import UnionType
from typing import Any, Literal

import torch

from ...tasks import TASKS, get_task
from ...tasks.command_line import REMOVED_ARGUMENTS
from .yaml_lines import Located, suggestion

#: What the campaign itself gives to every run, and why a file cannot.
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
    """Return the dataclasses of a task's arguments, those of training last, checked without looking for a device."""
    *others, training = get_task(task).argument_classes()
    return (*others, type(training.__name__, (training,), {"device": property(lambda self: torch.device("cpu"))}))


@functools.cache
def argument_fields(task: str) -> Mapping[str, tuple[Any, dataclasses.Field[Any]]]:
    """Return the type and the field of every argument of a task's script, by name."""
    found = {}
    for kind in argument_classes(task):
        hints = typing.get_type_hints(kind)
        found.update({field.name: (hints[field.name], field) for field in dataclasses.fields(kind) if field.init})
    return found


def check_name(task: str, name: str) -> str | None:
    """Say what is wrong with the name of an argument, None where nothing is."""
    if name in RESERVED:
        return f"the campaign sets this argument itself; leave it out: {RESERVED[name]}"
    if name in REMOVED_ARGUMENTS:
        return f"this argument is gone from transformers 5; {REMOVED_ARGUMENTS[name]}"
    if name not in argument_fields(task):
        lists = f"dpsm {TASKS[task].command} --help lists them"
        known = suggestion(name, argument_fields(task)).replace("look it up", lists)
        return f"{name!r} is not an argument of the script; {known}"
    return None


def typed_value(task: str, name: str, given: Located) -> Any:
    """Return the value of an argument in the type that the script wants, so that equal values are written equally.

    Raises:
        ValueError: if the value has another type, or is none of the allowed ones.
    """
    hint, field = argument_fields(task)[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    value = _as_option(given.plain(), options)
    if value is _WRONG:
        raise ValueError(f"{given.kind} ({given.plain()!r}) where the script takes {_describe(options)}")
    choices = field.metadata.get("choices") or [word for o in options for word in _words(o)]
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(f"{value!r} is not allowed; {suggestion(value, [str(choice) for choice in choices])}")
    return value


_WRONG = object()


def _as_option(value: Any, options: Sequence[Any]) -> Any:
    if isinstance(value, bool):
        return value if bool in options else _WRONG
    if isinstance(value, (int, float)):
        if float in options:
            return float(value)
        return int(value) if int in options and float(value).is_integer() else _WRONG
    if isinstance(value, str):
        if str in options or any(_words(option) for option in options):
            return value
        # a list of one
        return [value] if any(_item(option) is str for option in options) else _WRONG
    if isinstance(value, list):
        items = [_item(option) for option in options if _item(option) is not None]
        converted = [_as_option(element, items) for element in value]
        return _WRONG if not items or any(element is _WRONG for element in converted) else converted
    accepts = any(option is dict or typing.get_origin(option) is dict for option in options)
    return value if isinstance(value, dict) and accepts else _WRONG


def _item(option: Any) -> Any:
    """Return the type of the items of a list, None for what is no list."""
    if option is list:
        return str
    return typing.get_args(option)[0] if typing.get_origin(option) is list else None


def _words(option: Any) -> list[str]:
    """Return the words that an enumeration allows."""
    if typing.get_origin(option) is Literal:
        return [word for word in typing.get_args(option) if isinstance(word, str)]
    members: list[enum.Enum] = list(option) if isinstance(option, enum.EnumMeta) else []
    return [str(member.value) for member in members]


def _describe(options: Sequence[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "keys with values"}
    found = []
    for option in options:
        if _item(option) is not None:
            found.append("a list")
        elif option is not type(None):
            named = names.get(typing.get_origin(option) or option, getattr(option, "__name__", str(option)))
            found.append(" or ".join(_words(option)) or named)
    return " or ".join(dict.fromkeys(found))


def refusals(task: str, arguments: Mapping[str, Any]) -> list[str]:
    """Say what the script would refuse about a run's arguments; no device, file or hub is looked at."""
    kind, built, found = get_task(task), [], []
    # a run for another machine is checked on this one: precision and sharding are that machine's business
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
    """Keep configurations and dataclasses from logging and warning: a plan builds thousands of them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def defaults_among(task: str, arguments: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of arguments that have the script's own default, which leaving them out would give too."""
    fields = argument_fields(task)
    return frozenset(name for name, value in arguments.items() if value == _default(fields[name][1]))


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else value


def effective(task: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without those that have no effect: alpha's, where the loss mixes nothing."""
    if arguments.get("loss_type", "dpsm") == "dpsm":
        return dict(arguments)
    return {name: value for name, value in arguments.items() if not name.startswith("alpha_")}
