"""The --help of a task: its own options under headings; those of TrainingArguments that are used every day, or all."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..training.arguments import DPSMArguments

#: Options of TrainingArguments that --help shows; --help_all shows the others too.
EVERYDAY = (
    "output_dir", "do_train", "do_eval", "do_predict", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "use_cpu", "seed", "logging_steps",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end",
    "metric_for_best_model", "resume_from_checkpoint", "report_to", "run_name", "push_to_hub",
    "predict_with_generate", "generation_max_length", "generation_num_beams",
)  # fmt: skip

_HEADINGS: Mapping[type, str] = {
    DPSMArguments: "The loss, its schedule, and what is measured",
    TrainingArguments: "Training and evaluation, as in transformers",
    Seq2SeqTrainingArguments: "Training and evaluation, as in transformers",
}
_INTRODUCTION = """\
Options can stand on the command line or, by the same names, in a YAML or JSON file; dashes may take the place of
underscores, and an option of true or false may stand alone."""
_ENVIRONMENT = "Mistakes are said in one line; DPSM_HF_TRACEBACK=1 in the environment shows the traceback too."


class Added(NamedTuple):
    """An option as it was added to a parser."""

    flags: tuple[str, ...]
    options: Mapping[str, Any]
    dest: str


def help_text(prog: str, dataclass_types: Sequence[type], added: Iterable[Added], *, everything: bool) -> str:
    """Return what --help or --help_all prints.

    Args:
        prog: name of the program.
        dataclass_types: of the options.
        added: the options, in any order.
        everything: also show the options of transformers that are rarely used.
    """
    by_name: dict[str, list[Added]] = {}
    for option in added:
        by_name.setdefault(option.dest, []).append(option)
    printer = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [FILE.yaml] [--option value ...]", description=_INTRODUCTION, epilog=_ENVIRONMENT,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False,
    )  # fmt: skip
    headings = _by_heading(dataclass_types)
    known = {name for names in headings.values() for name in names}
    sections: dict[str, Sequence[str]] = {"General": [name for name in by_name if name not in known], **headings}
    foreign = {field.name for kind in (TrainingArguments, Seq2SeqTrainingArguments) for field in _fields(kind)}
    rare = [name for name in known if name in foreign and name not in EVERYDAY]
    for heading, names in sections.items():
        group = printer.add_argument_group(heading)
        for name in sorted(names, key=_everyday_first):
            if everything or name not in rare:
                for option in by_name[name]:
                    flags = option.flags if option.flags[0] == "-h" else option.flags[:1]
                    group.add_argument(*flags, dest=name, **_shown(option))
    if not everything:
        printer.epilog = (
            f"--help_all lists {len(rare)} more options of transformers: optimizers, hub, FSDP ... {_ENVIRONMENT}"
        )
    return printer.format_help()


def _by_heading(dataclass_types: Sequence[type]) -> dict[str, list[str]]:
    """Return the names of the options by heading, what this package adds before what is transformers' own."""
    owners: dict[str, list[str]] = {}
    seen: set[str] = set()
    for kind in dataclass_types:
        parts = [part for part in kind.__mro__ if dataclasses.is_dataclass(part)]
        names = {field.name for field in _fields(kind)}
        for part in parts:
            own = [name for name in vars(part).get("__annotations__", {}) if name in names - seen]
            seen.update(own)
            if own:
                said = (part.__doc__ or part.__name__).strip().splitlines()[0].partition(";")[0].rstrip(".")
                owners.setdefault(_HEADINGS.get(part, said), []).extend(own)
    last = _HEADINGS[TrainingArguments]
    first = _HEADINGS[DPSMArguments]
    return dict(sorted(owners.items(), key=lambda item: (item[0] == last, item[0] != first)))


def _fields(kind: Any) -> list[Any]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _everyday_first(name: str) -> int:
    return EVERYDAY.index(name) if name in EVERYDAY else len(EVERYDAY)


def _shown(option: Added) -> dict[str, Any]:
    """Return how an option is shown: without doing anything, its kind of value short, no default that is nothing."""
    given = option.options
    shown: dict[str, Any] = {"help": given.get("help"), "default": given.get("default")}
    if "action" in given and given["action"] != "append":
        if given["action"] == "store_false":
            shown["help"] = f"--{option.dest} false"
        return {**shown, "action": "store_true", "default": argparse.SUPPRESS}
    if shown["default"] is None:
        shown["default"] = argparse.SUPPRESS
    if given.get("choices"):
        shown["choices"] = given["choices"]
    else:
        kind = {int: "N", float: "X", str: "TEXT"}.get(given.get("type"), "VALUE")  # type: ignore[arg-type]
        shown["metavar"] = "BOOL" if given.get("nargs") == "?" else given.get("metavar", kind)
    return {**shown, "nargs": given.get("nargs")}
