"""Training with checkpoints: where a run goes on from, what it saves, and the best checkpoint in place of the last."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..runtime.child_process import RUNNER_VARIABLE, STARTED_NAME
from ..runtime.files import write_json
from ..training.checkpoint_files import STATE_NAME, examine, read_object
from ..training.resuming import agreed, newest_sound
from ..training.trainer import DPSMMixin
from .stopping import StopAtStep, StopOnInterrupt, graceful_interrupt

logger = logging.getLogger(__name__)

_START_AFRESH = ("none", "false", "no")
_RESUME_LAST = ("true", "yes", "last")


def check_output_dir(training_args: TrainingArguments) -> None:
    """Refuse an output folder that is a file, or that nothing can be written into, before anything is loaded.

    Raises:
        NotADirectoryError, PermissionError: naming it.
    """
    folder = Path(str(training_args.output_dir)).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"--output_dir {training_args.output_dir}: {there} is a file, not a folder. Name a folder, which need not "
            "exist yet, or move the file away."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"--output_dir {training_args.output_dir}: {there} cannot be written to. Mend its permissions, or name "
            "another folder."
        )


def detect_checkpoint(training_args: TrainingArguments, *, strict: bool = False) -> str | None:
    """Find the checkpoint a training run has to start from, and say so.

    ``--resume_from_checkpoint PATH`` is used as it is; ``last`` (or ``true``) insists on a checkpoint in
    ``output_dir``; ``none`` starts afresh. Left out, the newest sound checkpoint in ``output_dir`` is continued with a
    warning. One that a killed process left half-written, or that is damaged, is named and passed over.

    Args:
        training_args: The arguments of the run.
        strict: Stop where one would be passed over.

    Returns:
        The path of a checkpoint, or None to start from step 0.

    Raises:
        ValueError: The named checkpoint does not exist or cannot be read, ``last`` finds none, all that there is lacks
            an optimizer's state, or something is wrong and `strict`.
    """
    if not training_args.do_train:
        return None
    found: str | None = None
    error: str | None = None
    if training_args.process_index == 0:
        try:
            found = _detect(training_args, strict)
        except ValueError as problem:
            error = str(problem)
    found, error = agreed((found, error))
    if error is not None:
        raise ValueError(error)
    return found


def _detect(training_args: TrainingArguments, strict: bool) -> str | None:
    wanted, processes = training_args.resume_from_checkpoint, training_args.world_size
    word = str(wanted).lower() if wanted is not None else ""
    if wanted is not None and word in _START_AFRESH:
        return None
    if wanted is not None and word not in _RESUME_LAST:
        path = Path(wanted)
        if not path.is_dir():
            raise ValueError(f"--resume_from_checkpoint {wanted!r}: there is no such folder.")
        found = examine(path, processes)
        if not found.has_weights or (strict and not found.sound):
            raise ValueError(
                f"--resume_from_checkpoint {wanted!r} is not a complete checkpoint: {found.describe()}. Name another "
                "one, or leave the option out to take the newest complete one."
            )
        return str(path)
    output_dir = training_args.output_dir
    if output_dir is None:
        return None
    choice = newest_sound(output_dir, processes)
    if choice.passed_over and strict:
        raise ValueError(
            f"--resume_strict: {choice.describe()} Leave the option out to go on from that, or start afresh with "
            "--resume_from_checkpoint none."
        )
    if choice.sound is None:
        usable = next((found for found in choice.passed_over if found.has_weights), None)
        if usable is not None:
            raise ValueError(
                f"{usable.folder} has weights, but training cannot go on from it exactly: {usable.describe()} "
                "(--save_only_model leaves that out). Go on with new moments and a new learning rate with "
                f"--resume_from_checkpoint {usable.folder}, start afresh with --resume_from_checkpoint none, or use "
                "another --output_dir."
            )
        if wanted is not None:
            why = f" {choice.describe()}" if choice.passed_over else ""
            raise ValueError(
                f"--resume_from_checkpoint {wanted}: there is no complete checkpoint in {output_dir!r}.{why}"
            )
    if choice.passed_over:
        logger.warning("%s", choice.describe())
    if choice.sound is None:
        return None
    last = str(choice.sound.folder)
    if wanted is None:
        logger.warning(
            "Found %s: training continues from there. To start afresh instead, use another --output_dir or "
            "--resume_from_checkpoint none.",
            last,
        )
    return last


def note_start(training_args: TrainingArguments, checkpoint: str | None) -> None:
    """Tell the runner of a campaign, where one has started this process, which step training goes on from.

    Args:
        training_args: The arguments of the run.
        checkpoint: As `detect_checkpoint` returns it.
    """
    if RUNNER_VARIABLE not in os.environ or not training_args.do_train or training_args.process_index != 0:
        return
    state = read_object(Path(checkpoint) / STATE_NAME) if checkpoint is not None else None
    folder = Path(str(training_args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"from_step": (state or {}).get("global_step", 0)}, folder / STARTED_NAME)


def last_complete_checkpoint(output_dir: str | os.PathLike[str], processes: int = 1) -> str | None:
    """Give the newest sound checkpoint folder, of which each part can be read.

    Args:
        output_dir: Folder that holds ``checkpoint-<step>`` folders; may be absent.
        processes: That train.

    Returns:
        Its path, or None.
    """
    found = newest_sound(str(output_dir), processes).sound
    return None if found is None else str(found.folder)


def train_and_save(
    trainer: Trainer,
    checkpoint: str | None,
    train_samples: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train, save the model with its tokenizer, the metrics and the state; Ctrl-C and SIGTERM save a checkpoint first.

    A checkpoint of a run whose training had ended is loaded and saved, not trained on.

    Args:
        trainer: A ready Trainer.
        checkpoint: Path to continue from, or None.
        train_samples: Rows of the training set, reported as ``train_samples``; None when unknown (streaming).
        callbacks: For the training alone, not for the evaluations after it.

    Returns:
        The metrics of the training.

    Raises:
        SystemExit: With code 130 after an interrupt and 143 after SIGTERM, once it has been said how to resume; with
            code 0 where a `StopAtStep` among the callbacks has stopped it.
    """
    if checkpoint is not None:
        # It was evaluated at its start; once more would be one entry too many for a feedback schedule.
        trainer.args.eval_on_start = False
    callback = StopOnInterrupt()
    for added in (callback, *callbacks):
        trainer.add_callback(added)
    try:
        # with enable_jit_checkpoint, Transformers itself saves a checkpoint on SIGTERM
        with graceful_interrupt(callback, terminate=not getattr(trainer.args, "enable_jit_checkpoint", False)):
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
        raise SystemExit(callback.exit_code)
    if any(isinstance(added, StopAtStep) and added.stopped for added in callbacks):
        raise SystemExit(0)
    trainer.save_model()
    metrics = dict(result.metrics)
    if (
        checkpoint is not None
        and (read_object(Path(checkpoint) / STATE_NAME) or {}).get("global_step") == trainer.state.global_step
    ):
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
    last = last_complete_checkpoint(output_dir, trainer.args.world_size) if output_dir is not None else None
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


def best_step(trainer: Trainer) -> int | None:
    """Return the step of the best checkpoint that there is; None where none was kept track of.

    By step, not by the path that a checkpoint noted: the output folder may have been moved before a resume.
    """
    step = trainer.state.best_global_step
    return step if step and _checkpoint(trainer, step).is_dir() else None


def _checkpoint(trainer: Trainer, step: int) -> Path:
    return Path(str(trainer.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


@contextmanager
def best_weights(trainer: Trainer) -> Iterator[bool]:
    """Put the weights of the best checkpoint into the model and let what is evaluated meanwhile carry its step.

    Afterwards the model keeps them, but ``temperature.json`` in ``output_dir`` is again that of the last weights, the
    ones that are saved there; the best checkpoint's own is in its folder.

    Args:
        trainer: after training, with ``metric_for_best_model``.

    Yields:
        Whether there is a best checkpoint.
    """
    step = best_step(trainer)
    if step is None:
        logger.warning(
            "There is no best checkpoint: no evaluation during training had a finite %s.",
            trainer.args.metric_for_best_model,
        )
        yield False
        return
    scaler = trainer.temperature_scaler if isinstance(trainer, DPSMMixin) else None
    last, folder = trainer.state.global_step, _checkpoint(trainer, step)
    if step != last:  # else these are its weights
        trainer.state.best_model_checkpoint = str(folder)
        trainer._load_best_model()
    trainer.state.global_step = step
    try:
        yield True
    finally:
        trainer.state.global_step = last
    if scaler is not None and trainer.is_world_process_zero():
        assert isinstance(trainer, DPSMMixin)
        if (of_best := trainer.temperature_scaler) is not None:
            of_best.save(folder)
        scaler.save(str(trainer.args.output_dir))
