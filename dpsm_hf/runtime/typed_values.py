"""Values in the types that options want: one conversion for command lines, YAML, JSON, campaigns and Python."""

from __future__ import annotations

import enum
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, InstanceOf, StrictBool, StrictStr, TypeAdapter, ValidationError

#: The least that options can be whose values are looked at late or never, most of them of Transformers.
AT_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(
        ("max_source_length", "max_target_length", "val_max_target_length", "preprocessing_num_workers"), 1
    ),
    "min_source_words": 0,
    "tokenizer_vocab_size": 261,  # the bytes, the special tokens and one merge
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"), 0),
    **dict.fromkeys(("num_train_epochs", "warmup_steps", "eval_delay", "dataloader_num_workers", "seed"), 0),
    **dict.fromkeys(("data_seed", "logging_steps", "eval_steps", "save_steps", "label_smoothing_factor"), 0),
}
# no path may stand for them; with an example
_JSON_ALONE = {"knob_schedules": '{"z_loss": "linear 0 -> 1e-3 over 0.1"}'}
# the norm of gradients is measured without clipping them where this is infinite
_UNBOUNDED = ("max_grad_norm",)


def typed_value(name: str, hint: Any, value: Any, *, text: bool = True, choices: Sequence[Any] = ()) -> Any:
    """Return a value in the type that an option wants.

    Args:
        name: of the option.
        hint: its type.
        value: what was given.
        text: whether a text may stand for a number or for true and false.
        choices: of the option, where its type does not say them.

    Raises:
        ValueError: saying what the value should be; where it was written is for the caller to say.
    """
    options = options_of(hint)
    value = value.item() if isinstance(value, np.generic) else value
    if text and isinstance(value, str) and {bool, str} <= set(options) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(value, str) and dict in map(_plain_type, options):
        _check_json(name, value)
    try:
        found = _adapter(hint, text).validate_python(value)
    except ValidationError:
        without = "; leave it out for the default" if value is None else ""
        raise ValueError(f"should be {describe(hint, choices)}{without}") from None
    if isinstance(found, Mapping) and (flag := _quoted_flag(found)):
        raise ValueError(
            f"has the text {flag!r} inside, which would count as true: write true or false without quotes"
        )
    if isinstance(found, float) and not math.isfinite(found) and (math.isnan(found) or name not in _UNBOUNDED):
        raise ValueError("should be a number that is finite")
    if choices and found is not None and found not in choices:
        raise ValueError(f"is not one of {', '.join(map(str, choices))}")
    if isinstance(found, (int, float)) and found < AT_LEAST.get(name, -math.inf):
        raise ValueError(f"should be at least {AT_LEAST[name]}")
    return found


def _quoted_flag(value: Any) -> str:
    """Return a text anywhere in nested values that means true or false, empty if there is none."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return next(filter(None, map(_quoted_flag, value)), "")
    return value if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off") else ""


def options_of(hint: Any) -> tuple[Any, ...]:
    """Return the types that a hint allows; of ``SomeEnum | str`` not the text, for the words of the enumeration."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    enumerated = any(isinstance(option, enum.EnumMeta) for option in options)
    return tuple(option for option in options if not (enumerated and option is str))


def words_of(hint: Any) -> list[str]:
    """Return the words that a type allows; none where it takes any text, or no text at all."""
    found: list[str] = []
    for option in options_of(hint):
        if typing.get_origin(option) is Literal:
            found += [word for word in typing.get_args(option) if isinstance(word, str)]
        elif isinstance(option, enum.EnumMeta):
            found += [str(member.value) for member in option]  # type: ignore[var-annotated]
    return found


def describe(hint: Any, choices: Sequence[Any] = ()) -> str:
    """Say in a few words what a type takes.

    Args:
        hint: the type.
        choices: where the type does not say them.
    """
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "keys with values"}
    found = [" or ".join(map(str, choices))] if choices else []
    for option in () if choices else options_of(hint):
        kind = _plain_type(option)
        if kind is list:
            found.append("a list")
        elif words := words_of(option):
            found.append(" or ".join(words))
        elif kind is not type(None):
            found.append(names.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(dict.fromkeys(found))


def _plain_type(option: Any) -> Any:
    return typing.get_origin(option) or option


@functools.cache
def _adapter(hint: Any, text: bool) -> TypeAdapter[Any]:
    accepted: Any = tuple(_accepted(option, text) for option in options_of(hint))
    return TypeAdapter(typing.Union[accepted])  # noqa: UP007


def _accepted(option: Any, text: bool) -> Any:
    """Return what pydantic is to accept for a type: Python's own kinds, but neither true for 1 nor 1 for a text."""
    kind = _plain_type(option)
    if kind in (int, float):
        return Annotated[kind, BeforeValidator(functools.partial(_number, text=text))]
    if kind is bool:
        return bool if text else StrictBool
    if kind is str:
        return StrictStr
    if isinstance(option, enum.EnumMeta):
        return Literal[tuple(words_of(option))]
    if kind is list:
        item: Any = _accepted((typing.get_args(option) or (str,))[0], text)
        return Annotated[types.GenericAlias(list, (item,)), BeforeValidator(_as_list)]
    if kind is dict and bool in typing.get_args(option):
        return dict[str, StrictBool]
    if kind in (dict, Literal) or option is type(None):
        return option
    return Annotated[option, InstanceOf()]


def _number(value: Any, *, text: bool) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str) if text else (int, float)):
        raise ValueError("another kind of value")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value  # a list of one


def _check_json(name: str, text: str) -> None:
    """Refuse a text for keys with values that is neither JSON nor, where files are read, possibly the path of one."""
    if not text.startswith("{"):
        if example := _JSON_ALONE.get(name, '{"num_cycles": 2}' if name.endswith("_kwargs") else ""):
            raise ValueError(f"should be keys with values as JSON, for instance '{example}'")
        path = Path(text)  # of another machine, perhaps: it need not be here
        if text and not (path.suffix in (".json", ".yaml", ".yml") or len(path.parts) > 1 or path.is_file()):
            raise ValueError("should be keys with values as JSON, or the path of a JSON file")
        return
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"should be keys with values as JSON ({error})") from None
