"""What the training scripts share: arguments, logging, checkpoints, fresh configurations, and a safe Ctrl-C."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .scratch_config import build_config_from_scratch, check_block_size
from .stopping import StopAtStep

logger = logging.getLogger(__name__)

__all__ = [
    "StopOnInterrupt",
    "build_config_from_scratch",
    "check_block_size",
    "detect_checkpoint",
    "last_complete_checkpoint",
    "parse_script_arguments",
    "setup_logging",
    "train_and_save",
]

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

_START_AFRESH = ("none", "false", "no")
_RESUME_LAST = ("true", "yes", "last")


def parse_script_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse a command line, or one JSON or YAML file, into the given argument dataclasses.

    A file is checked as strictly as a command line: unknown keys, wrong choices and numbers that YAML reads
    as text (``5e-5`` without a dot) are handled before any dataclass is built.

    Args:
        dataclass_types: The dataclasses, in the order of the result.
        argv: Arguments without the program's name; ``sys.argv[1:]`` when None.

    Returns:
        One instance per dataclass.

    Raises:
        ValueError: An unknown or removed argument, or a file that is not a mapping of arguments.
        FileNotFoundError: The configuration file does not exist.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(tuple(dataclass_types))  # type: ignore[arg-type]
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
    for name in ("dpsm_hf", "__main__", "run_clm_dpsm", "run_summarization_dpsm"):
        logging.getLogger(name).setLevel(level)
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


def detect_checkpoint(training_args: TrainingArguments) -> str | None:
    """Find the checkpoint a training run has to start from, and say so.

    ``--resume_from_checkpoint PATH`` is used as it is; ``last`` (or ``true``) insists on a checkpoint in
    ``output_dir``; ``none`` starts afresh. Left out, the newest complete checkpoint in ``output_dir`` is
    continued with a warning. A checkpoint that a killed process left half-written is passed over.

    Args:
        training_args: The arguments of the run.

    Returns:
        The path of a checkpoint, or None to start from step 0.

    Raises:
        ValueError: The named checkpoint does not exist or is incomplete, or ``last`` finds none.
    """
    if not training_args.do_train:
        return None
    wanted = training_args.resume_from_checkpoint
    word = str(wanted).lower() if wanted is not None else ""
    if wanted is not None and word in _START_AFRESH:
        return None
    if wanted is not None and word not in _RESUME_LAST:
        path = Path(wanted)
        if not path.is_dir():
            raise ValueError(f"--resume_from_checkpoint {wanted!r}: there is no such folder.")
        if not _is_complete(path):
            raise ValueError(
                f"--resume_from_checkpoint {wanted!r} has no readable trainer_state.json, so it is not a complete "
                "checkpoint. Name another one, or leave the option out to take the newest complete one."
            )
        return str(path)
    output_dir = training_args.output_dir
    if output_dir is None:
        return None
    last = last_complete_checkpoint(output_dir)
    if last is None and wanted is not None:
        raise ValueError(f"--resume_from_checkpoint {wanted}: there is no complete checkpoint in {output_dir!r}.")
    if last is not None and wanted is None:
        logger.warning(
            "Found %s: training continues from there. To start afresh instead, use another --output_dir or "
            "--resume_from_checkpoint none.",
            last,
        )
    return last


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Give the newest checkpoint folder whose trainer state, the last file written, can be read.

    Args:
        output_dir: Folder that holds ``checkpoint-<step>`` folders; may be absent.

    Returns:
        Its path, or None.
    """
    root = Path(output_dir)
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {
        int(path.name[len(prefix) :]): path
        for path in (root.glob(f"{prefix}*") if root.is_dir() else ())
        if path.is_dir() and path.name[len(prefix) :].isdigit()
    }
    for step in sorted(steps, reverse=True):
        if _is_complete(steps[step]):
            return str(steps[step])
        logger.warning("%s is incomplete (interrupted while it was written) and is passed over.", steps[step])
    return None


def _is_complete(checkpoint: Path) -> bool:
    return _step(checkpoint) is not None


def _step(checkpoint: Path) -> int | None:
    """Return the step of a checkpoint; None if it is not complete."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state.get("global_step") if isinstance(state, dict) else None


class StopOnInterrupt(TrainerCallback):
    """Turn the first Ctrl-C into "finish this step, save a checkpoint, stop", so that nothing is lost.

    Across processes the wish is agreed on every ``sync_every`` steps, because ranks that stop at different
    steps would wait for each other for ever.
    """

    sync_every = 10

    def __init__(self) -> None:
        self.requested = False
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the Trainer to save and stop once the wish is known to every process."""
        wanted = self.requested
        if args.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            if state.global_step % self.sync_every:
                return control
            flag = torch.tensor(int(wanted), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            wanted = bool(flag.item())
        if wanted:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control


@contextmanager
def _graceful_interrupt(callback: StopOnInterrupt) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone; elsewhere Ctrl-C stays what it was.
        return

    def handle(number: int, frame: types.FrameType | None) -> None:
        if callback.requested:
            raise KeyboardInterrupt
        callback.requested = True
        logger.warning("Interrupted: finishing this step and saving a checkpoint. Press Ctrl-C again to stop at once.")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def train_and_save(
    trainer: Trainer,
    checkpoint: str | None,
    train_samples: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train, save the model with its tokenizer, the metrics and the state; Ctrl-C saves a checkpoint first.

    A checkpoint of a run whose training had ended is loaded and saved, not trained on.

    Args:
        trainer: A ready Trainer.
        checkpoint: Path to continue from, or None.
        train_samples: Rows of the training set, reported as ``train_samples``; None when unknown (streaming).
        callbacks: For the training alone, not for the evaluations after it.

    Returns:
        The metrics of the training.

    Raises:
        SystemExit: With code 130 after an interrupt, once it has been said how to resume; with code 0 where a
            `StopAtStep` among the callbacks has stopped it.
    """
    if checkpoint is not None:
        # It was evaluated at its start; once more would be one entry too many for a feedback schedule.
        trainer.args.eval_on_start = False
    callback = StopOnInterrupt()
    for added in (callback, *callbacks):
        trainer.add_callback(added)
    try:
        with _graceful_interrupt(callback):
            result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        _say_how_to_resume(trainer)
        raise SystemExit(130) from None
    finally:
        for added in (callback, *callbacks):
            trainer.remove_callback(added)
    if callback.stopped and trainer.state.global_step < trainer.state.max_steps:
        # A launcher ends all processes when the first one fails, and one of them may still be writing.
        trainer.accelerator.wait_for_everyone()
        _say_how_to_resume(trainer)
        raise SystemExit(130)
    if any(isinstance(added, StopAtStep) and added.stopped for added in callbacks):
        raise SystemExit(0)
    trainer.save_model()
    metrics = dict(result.metrics)
    if checkpoint is not None and _step(Path(checkpoint)) == trainer.state.global_step:
        # nothing was left to train: the mean loss and the speed of no step are no figures
        metrics = {name: metrics[name] for name in ("total_flos", "train_seconds", "epoch") if name in metrics}
    if train_samples is not None:
        metrics["train_samples"] = train_samples
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def _say_how_to_resume(trainer: Trainer) -> None:
    if not trainer.is_world_process_zero():
        return
    output_dir = trainer.args.output_dir
    last = last_complete_checkpoint(output_dir) if output_dir is not None else None
    if last is None:
        logger.warning("Training was interrupted at step %s; no checkpoint was saved.", trainer.state.global_step)
        return
    logger.warning(
        "Training was interrupted at step %s of %s. The newest checkpoint is %s: run the same command again to "
        "continue from there.",
        trainer.state.global_step,
        trainer.state.max_steps,
        last,
    )
