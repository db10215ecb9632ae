"""From a command line, or a JSON or YAML file in its place, to the arguments of a run; and its log lines."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from transformers import HfArgumentParser, TrainingArguments

logger = logging.getLogger(__name__)

CONFIG_FILE_SUFFIXES = (".json", ".yaml", ".yml")

# Names that transformers 4 scripts used and transformers 5 dropped, with what to write today.
REMOVED_ARGUMENTS = {
    "overwrite_output_dir": "use another --output_dir, or --resume_from_checkpoint none to start afresh in this one",
    "evaluation_strategy": "write --eval_strategy",
    "warmup_ratio": "write --warmup_steps with a number below 1 (a share of all steps)",
    "torch_dtype": "write --dtype",
    "no_cuda": "write --use_cpu",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "group_by_length": "write --train_sampling_strategy group_by_length",
    "low_cpu_mem_usage": "leave it out: loading always works this way now",
    "use_auth_token": "write --token",
    "fp16_backend": "leave it out: there is one backend",
    "per_gpu_train_batch_size": "write --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "write --per_device_eval_batch_size",
}


def parse_script_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[Any, ...]:
    """Parse a command line, or one JSON or YAML file, into the given argument dataclasses.

    A file is checked as strictly as a command line: unknown keys, wrong choices and numbers that YAML reads
    as text (``5e-5`` without a dot) are handled before any dataclass is built.

    Args:
        dataclass_types: The dataclasses, in the order of the result.
        argv: Arguments without the program's name; ``sys.argv[1:]`` when None.
        prog: The program's name in --help; that of ``sys.argv[0]`` when None.

    Returns:
        One instance per dataclass.

    Raises:
        ValueError: An unknown or removed argument, or a file that is not a mapping of arguments.
        FileNotFoundError: The configuration file does not exist.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(tuple(dataclass_types), prog=prog)  # type: ignore[arg-type]
    if len(arguments) == 1 and arguments[0].endswith(CONFIG_FILE_SUFFIXES):
        return parser.parse_dict(_read_config_file(Path(arguments[0]), dataclass_types))
    parsed = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    unknown = [word for word in parsed[-1] if word.startswith("-")] or parsed[-1]
    if unknown:
        names = [word.lstrip("-").split("=")[0].replace("-", "_") for word in unknown]
        raise ValueError(_explain_unknown(names, _field_names(dataclass_types), "on the command line"))
    return tuple(parsed[:-1])


def _read_config_file(path: Path, dataclass_types: Sequence[type]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"The configuration file {str(path)!r} does not exist.")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ValueError(f"The configuration file {str(path)!r} is not valid {kind}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The configuration file {str(path)!r} must hold a mapping of argument names to values.")
    known = _field_names(dataclass_types)
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ValueError(_explain_unknown(unknown, known, f"in {str(path)!r}"))
    for dataclass_type in dataclass_types:
        hints = typing.get_type_hints(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            if field.name not in values:
                continue
            values[field.name] = _coerce(values[field.name], hints[field.name], field.name, path)
            choices = field.metadata.get("choices")
            if choices is not None and values[field.name] is not None and values[field.name] not in choices:
                allowed = ", ".join(map(str, choices))
                raise ValueError(f"{field.name} = {values[field.name]!r} in {str(path)!r} is not one of {allowed}.")
    return values


def _coerce(value: Any, hint: Any, name: str, path: Path) -> Any:
    """Turn text into a number where the field wants one: YAML 1.1 reads ``5e-5`` and ``1_0`` as text."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, str) and str not in options and (int in options or float in options):
        try:
            number = float(value)
        except ValueError as error:
            raise ValueError(f"{name} = {value!r} in {str(path)!r} should be a number.") from error
        return number if float in options else int(number) if number.is_integer() else number
    return value


def _field_names(dataclass_types: Sequence[type]) -> list[str]:
    return [field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init]


def _explain_unknown(names: Sequence[str], known: Sequence[str], place: str) -> str:
    parts = []
    for name in names:
        close = difflib.get_close_matches(name, known, n=1)
        if name in REMOVED_ARGUMENTS:
            parts.append(f"{name} is gone from transformers 5: {REMOVED_ARGUMENTS[name]}")
        else:
            parts.append(f"{name} is unknown" + (f"; did you mean {close[0]}?" if close else ""))
    return f"Arguments {place} that this script does not have: " + "; ".join(parts)


def setup_logging(training_args: TrainingArguments) -> None:
    """Send log lines of this package, transformers and datasets to stdout at the level the arguments ask for.

    Args:
        training_args: Gives the log level of this process; the main process defaults to INFO.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    if training_args.should_log:
        # "passive" keeps whatever transformers has, so the default of the main process is set first.
        transformers.utils.logging.set_verbosity_info()
    level = training_args.get_process_log_level()
    logging.getLogger("dpsm_hf").setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    logger.info(
        "Process %s of %s on %s; mixed precision: %s.",
        training_args.process_index,
        training_args.world_size,
        training_args.device,
        "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "none",
    )
    logger.info("Training and evaluation arguments: %s", training_args)
