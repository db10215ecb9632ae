"""From a command line, or a JSON or YAML file in its place, to the arguments of a run; and its log lines."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import transformers
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..runtime.secrets import without_secrets
from ..runtime.typed_values import typed_value
from ..runtime.yaml_lines import Place
from .option_help import Added, help_text
from .settings_files import CONFIG_FILE_SUFFIXES, as_written, read_settings

logger = logging.getLogger(__name__)

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

# Options of one task alone, with what to say in the others.
ELSEWHERE = dict.fromkeys(
    ("freeze_layers", "frozen_cache", "remove_frozen_cache"),
    "is an option of dpsm clm alone: the lower layers of a decoder-only model can be frozen, not those of an "
    "encoder-decoder. Leave it out",
)


def parse_script_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[Any, ...]:
    """Parse a command line into the given argument dataclasses, with a JSON or YAML file of settings in it or not.

    ``--config FILE``, or a file as the first word, gives settings that the other words override. Values of a file and
    of the command line are checked and converted alike before any dataclass is built.

    Args:
        dataclass_types: The dataclasses, in the order of the result.
        argv: Arguments without the program's name; ``sys.argv[1:]`` when None.
        prog: The program's name in --help; that of ``sys.argv[0]`` when None.

    Returns:
        One instance per dataclass.

    Raises:
        ValueError: An unknown or removed argument, a value that an argument does not take, or a file that is not a
            mapping of arguments; with the file, the line and what is expected.
        FileNotFoundError: The configuration file does not exist.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith(CONFIG_FILE_SUFFIXES) and not words[0].startswith("-"):
        words.insert(0, "--config")
    parser = _Parser(tuple(dataclass_types), prog=prog)  # type: ignore[arg-type]
    # without dataclasses, parsing gives the words; what is not given stays out
    parser.dataclass_types = []
    namespace, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    unknown = [word for word in rest if word.startswith("-")] or rest
    if unknown:
        names = [word.lstrip("-").split("=")[0].replace("-", "_") for word in unknown]
        raise ValueError(_explain_unknown(names, _field_names(dataclass_types), "on the command line"))
    given = {name: value for name, value in vars(namespace).items() if value is not _Parser.ABSENT}
    arguments = _Arguments(dataclass_types)
    for path in given.pop("config") or []:
        arguments.read_file(Path(path))
    for name, value in given.items():
        arguments.add(name, value, Place(f"--{name}"))
    return arguments.build()


class _Parser(HfArgumentParser):
    """HfArgumentParser that leaves values as the words that were typed, and options that were not given out."""

    ABSENT = object()

    def __init__(self, dataclass_types: tuple[type, ...], **options: Any) -> None:
        self.names: list[str] = []
        self.added: list[Added] = []
        self.kinds = dataclass_types
        self.shows_all = False
        super().__init__(dataclass_types, **options)  # type: ignore[arg-type]
        self.add_argument(
            "--help_all", "--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS,
            help="show all options of transformers too, and exit",
        )  # fmt: skip
        self.add_argument(
            "--config",
            action="append",
            metavar="FILE",
            help="dpsm_hf: JSON or YAML file of settings, by the names of these options; options beside it override "
            "it.",
        )
        self.names.remove("config")  # a list to append to begins as nothing

    def format_help(self) -> str:
        """Return the help, with all options of transformers after --help_all."""
        return help_text(self.prog, self.kinds, self.added, everything=self.shows_all)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse says of a command line, without the usage of two hundred options."""
        words = re.sub(r"^argument (--\w+)(/--[\w-]+)?", r"\1", message)
        raise ValueError(f"{words}; --help lists the options.")

    def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
        """Add an option; one of true or false can stand alone, whatever its default is."""
        action = super().add_argument(*flags, **options)
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True
            options["nargs"] = "?"
        self.added.append(Added(flags, options, action.dest))
        action.type, action.required = None, False
        if action.default is not argparse.SUPPRESS:
            self.names.append(action.dest)
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words; what has a value beforehand gets no default."""
        absent = argparse.Namespace(**dict.fromkeys(self.names, self.ABSENT))
        return super().parse_known_args(args, namespace or absent)


class _HelpAll(argparse.Action):
    """What --help_all does."""

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print the whole help and exit."""
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class _Arguments:
    """The values of arguments, checked one by one, and the dataclasses that are made of them."""

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        self.dataclass_types = dataclass_types
        self.hints = {name: hint for kind in dataclass_types for name, hint in typing.get_type_hints(kind).items()}
        self.fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind)}
        self.values: dict[str, Any] = {}

    def add(self, name: str, value: Any, place: Place, written: Any = None) -> None:
        """Take a value, in place of an earlier one of the same argument.

        Args:
            name: Of the argument.
            value: As it was read.
            place: Where it was read.
            written: The text of the file behind the value, which is taken where the value itself is of a wrong kind.

        Raises:
            ValueError: naming argument, value, place and what is expected.
        """
        problem = ""
        if name == "report_to" and value is None:  # nothing to report to; TrainingArguments would refuse null
            value = written = "none"
        for candidate in (value,) if written is None else (value, written):
            try:
                self.values[name] = typed_value(
                    name, self.hints[name], candidate, choices=self.fields[name].metadata.get("choices", ())
                )
                if name == "report_to":
                    _check_trackers(self.values[name])
                return
            except ValueError as error:
                problem = problem or str(error)
        if place.line is None:
            raise ValueError(f"{place} {value}: this {problem}.")
        shown = "null" if value is None else str(written) if isinstance(value, bool) and written else repr(value)
        raise ValueError(f"{name} = {without_secrets(shown, name)} in {place} {problem}.")

    def read_file(self, path: Path) -> None:
        """Take the values of a file.

        Raises:
            ValueError, FileNotFoundError: As `read_settings`, and for names and values that there are not.
        """
        given = read_settings(path)
        known = _field_names(self.dataclass_types)
        if unknown := [name for name in given if name not in known]:
            raise ValueError(_explain_unknown(unknown, known, f"in {str(path)!r}"))
        for name, item in given.items():
            self.add(name, item.plain(), item.place, as_written(item))

    def build(self) -> tuple[Any, ...]:
        """Return an instance of each dataclass.

        Raises:
            ValueError: an argument without a default is missing, or a dataclass refuses its values.
        """
        built = []
        for kind in self.dataclass_types:
            fields = [field for field in dataclasses.fields(kind) if field.init]
            for field in fields:
                if field.name not in self.values and field.default is field.default_factory is dataclasses.MISSING:
                    raise ValueError(f"--{field.name} is missing: give it, or {field.name} in a settings file.")
            own = {field.name: self.values[field.name] for field in fields if field.name in self.values}
            try:
                built.append(kind(**own))
            except Exception as error:
                said = str(error)
                meant = _options_meant(said, own)
                if isinstance(error, ValueError) and (not meant or _names_an_option(said, fields)):
                    raise
                raise ValueError(f"{', '.join(meant) or kind.__name__}: {said}") from error
        return tuple(built)


def _check_trackers(given: str | list[str]) -> None:
    """Refuse a name that transformers knows no tracker by; Trainer would, after the data are prepared."""
    known = ("all", "none", *INTEGRATION_TO_CALLBACK)
    if unknown := [name for name in ([given] if isinstance(given, str) else given) if name not in known]:
        raise ValueError(f"has {', '.join(map(repr, unknown))}, which is not one of {', '.join(known)}")


def _names_an_option(said: str, fields: Sequence[dataclasses.Field[Any]]) -> bool:
    """Return whether an error says which option it is about: ``--debug``, ``debug=`` or a name like ``eval_steps``."""
    names = "|".join(field.name for field in fields)
    return any("_" in name or mark for mark, name in re.findall(rf"(--)?\b({names})\b", said)) or bool(
        re.search(rf"\b({names})=", said)
    )


def _options_meant(said: str, values: Mapping[str, Any]) -> list[str]:
    """Return the options whose value or name an error repeats, which does not say what it is about."""
    found = []
    for name, value in values.items():
        words = re.findall(r"[\w./-]+", str(value)) if isinstance(value, (str, dict)) else []
        if any(re.search(rf"(?<![\w/-]){re.escape(word)}(?![\w/-])", said) for word in (name, *words)):
            found.append(f"--{name}")
    return found


def _field_names(dataclass_types: Sequence[type]) -> list[str]:
    return [field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init]


def _explain_unknown(names: Sequence[str], known: Sequence[str], place: str) -> str:
    parts = []
    for name in names:
        alike = [option for option in known if option.partition("_")[0] == name.partition("_")[0]]
        close = difflib.get_close_matches(name, alike, n=1, cutoff=0.5) or difflib.get_close_matches(name, known, n=1)
        if name in REMOVED_ARGUMENTS:
            parts.append(f"{name} is gone from transformers 5: {REMOVED_ARGUMENTS[name]}")
        elif name in ELSEWHERE:
            parts.append(f"{name} {ELSEWHERE[name]}")
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
