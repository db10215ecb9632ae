"""Resume from a checkpoint: exactly from a sound one, otherwise with a warning that names the differences."""

from __future__ import annotations

import errno
import math
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..runtime.distributed import process_number
from .arguments import DPSMArguments
from .checkpoint_files import STATE_NAME, Checkpoint, checkpoint_folders, examine, read_object
from .run_facts import RunFacts, kind_of, model_facts, saved_facts, saved_parts

logger = logging.get_logger(__name__)

# What torch says where it could not write; it does not pass on why.
_TORCH_WRITING = ("PytorchStreamWriter", "inline_container", "iostream error", "unexpected pos")
_LITTLE_SPACE = 2**20
# Raised where a file of a checkpoint can be read but holds something else.
_OTHER_CONTENT = (ValueError, KeyError, IndexError, AttributeError, TypeError)


class UnwritableError(OSError):
    """A checkpoint or model could not be written; what was there before still is."""


@dataclass(frozen=True)
class Choice:
    """What there is to go on from in an output folder.

    Args:
        sound: the newest sound checkpoint.
        passed_over: newer ones that are not, the newest first.
    """

    sound: Checkpoint | None
    passed_over: tuple[Checkpoint, ...]

    def describe(self) -> str:
        """Return what is wrong with those that were passed over, and what is taken instead; empty if none was."""
        if not self.passed_over:
            return ""
        wrong = ". ".join(f"{found.folder} is incomplete or damaged: {found.describe()}" for found in self.passed_over)
        taken = "There is no older sound one" if self.sound is None else f"The newest sound one is {self.sound.folder}"
        return f"{wrong}. {taken}."


def newest_sound(output_dir: str, processes: int = 1) -> Choice:
    """Look for the newest checkpoint that can be gone on from exactly.

    Args:
        output_dir: folder that holds checkpoints; may be absent.
        processes: that are about to train.
    """
    passed_over: list[Checkpoint] = []
    for folder in checkpoint_folders(output_dir):
        found = examine(folder, processes)
        if found.sound:
            return Choice(found, tuple(passed_over))
        passed_over.append(found)
    return Choice(None, tuple(passed_over))


def agreed(result: Any) -> Any:
    """Return what the main process has found, on every process.

    Args:
        result: on the main process; can be pickled.
    """
    if process_number() == 1:
        return result
    held = [result]
    broadcast_object_list(held)
    return held[0]


def position_in_stream(state: dict[str, Any], gradient_accumulation_steps: int) -> tuple[int, int]:
    """Return the passes over a stream that were finished, and the micro-batches of the one that was not.

    A stream has no length, so Trainer counts in its epoch the passes and, behind the point, micro-batches as a share
    of all that ``max_steps`` has.

    Args:
        state: of the checkpoint, as its JSON has it.
        gradient_accumulation_steps: that it was trained with.
    """
    epoch, steps = float(state.get("epoch") or 0.0), int(state["max_steps"])
    passes = math.floor(epoch)
    return passes, round((epoch - passes) * steps * gradient_accumulation_steps)


class CheckpointKeeper:
    """What a trainer does about its checkpoints: look before going on from one, and say where one was not written."""

    def __init__(self) -> None:
        #: What is written into checkpoints and compared on going on from one.
        self.facts = RunFacts()
        self._unsealed: Path | None = None  # the checkpoint whose parts have no digests yet

    # ---- which checkpoint ------------------------------------------------------------------------------------------

    def settle(self, trainer: Trainer, dpsm: DPSMArguments, wanted: str | bool | None) -> str | bool | None:
        """Look at the checkpoint that is asked for, and say before training what is wrong or different.

        Args:
            trainer: that is about to train.
            dpsm: the DPSM fields in force.
            wanted: as `Trainer.train` takes it: a folder, or True for the newest one in ``output_dir``, of which a
                damaged one is passed over.

        Returns:
            The folder; what was given where there is no checkpoint at all, for `Trainer` to say so.

        Raises:
            ValueError: it is damaged, or ``facts.strict`` and it is not that of this very run.
        """
        if not wanted:
            return wanted
        found: str | bool = wanted
        error: str | None = None
        if trainer.is_world_process_zero():
            try:
                found = self._newest(trainer.args) if wanted is True else self._named(trainer.args, Path(str(wanted)))
                if isinstance(found, str) and Path(found).is_dir():
                    self._compare(Path(found), self.facts.of(trainer, dpsm))
            except ValueError as problem:
                error = str(problem)
        found, error = agreed((found, error))
        if error is not None:
            raise ValueError(error)
        return found

    def _newest(self, args: TrainingArguments) -> str | bool:
        choice = newest_sound(str(args.output_dir), args.world_size)
        if choice.passed_over and self.facts.strict:
            raise ValueError(f"{choice.describe()} Delete what is damaged, or name the checkpoint to go on from.")
        if choice.sound is not None:
            if choice.passed_over:
                logger.warning(choice.describe())
            return str(choice.sound.folder)
        usable = next((found for found in choice.passed_over if found.has_weights), None)
        if usable is not None:
            _say_what_is_missing(usable)
            return str(usable.folder)
        if any(found.damaged for found in choice.passed_over):
            raise ValueError(f"{choice.describe()} Start afresh with resume_from_checkpoint=None.")
        return True

    def _named(self, args: TrainingArguments, folder: Path) -> str:
        if not folder.is_dir():
            return str(folder)
        found = examine(folder, args.world_size)
        if not found.has_weights or (not found.sound and self.facts.strict):
            older = newest_sound(str(folder.parent), args.world_size).sound
            remedy = "start afresh" if older is None else f"take {older.folder}, the newest sound one beside it"
            raise ValueError(
                f"Can't find a valid checkpoint at {folder}: it is incomplete or damaged: {found.describe()}. "
                f"Remedy: {remedy}."
            )
        if found.missing:
            _say_what_is_missing(found)
        return str(folder)

    def _compare(self, folder: Path, now: Mapping[str, Any]) -> None:
        found = self.facts.differences(folder, now)
        if not found:
            return
        text = (
            f"{folder} was saved by a run that is different from this one: {'; '.join(found)}. The result will not "
            "be that of either run. Resume with the data and arguments of the first run to go on exactly, or train "
            "into another output_dir."
        )
        if self.facts.strict:
            raise ValueError(text)
        logger.warning(text)

    # ---- loading ---------------------------------------------------------------------------------------------------

    def check_model(self, trainer: Trainer, checkpoint: str) -> None:
        """Check whether the weights that are about to be loaded are those of another model.

        Args:
            trainer: whose model it is.
            checkpoint: its folder.

        Raises:
            ValueError: naming both.
        """
        saved = saved_parts(Path(checkpoint)).get("model")
        whole = _whole_model(trainer)
        if saved is not None and whole is not None and saved != model_facts(whole):
            raise ValueError(
                f"{checkpoint} is of another model: it was {saved} and is {model_facts(whole)}. Use the "
                "model of the first run, or another output_dir."
            )

    @contextmanager
    def loading_optimizer(self, trainer: Trainer, checkpoint: str | None) -> Iterator[None]:
        """Check whether the states of optimizer and scheduler that are loaded meanwhile are those of another kind.

        Args:
            trainer: whose optimizer and scheduler they are.
            checkpoint: its folder; None where nothing is loaded.

        Raises:
            ValueError: naming both, or what the state lacks.
        """
        if checkpoint is None or trainer.is_deepspeed_enabled or not (Path(checkpoint) / "optimizer.pt").is_file():
            yield
            return
        saved = saved_parts(Path(checkpoint))
        now = {"optimizer": kind_of(trainer.optimizer), "scheduler": kind_of(trainer.lr_scheduler)}
        remedy = "Use that of the first run (optim, lr_scheduler_type), or another output_dir."
        for part, kind in now.items():
            if saved.get(part, kind) != kind:
                raise ValueError(f"{checkpoint} is of another {part}: it was {saved[part]} and is {kind}. {remedy}")
        assert trainer.optimizer is not None
        wanted = [set(group) for group in trainer.optimizer.param_groups]
        try:
            yield
        except _OTHER_CONTENT as error:
            frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
            mine = any(frame.f_locals.get("self") is trainer.lr_scheduler for frame in frames)
            loading = "scheduler" if mine else "optimizer"
            raise ValueError(
                f"what {loading}.pt in {checkpoint} holds does not fit {now[loading]} "
                f"({type(error).__name__}: {error}). Name an older checkpoint to go on from."
            ) from error
        for names, group in zip(wanted, trainer.optimizer.param_groups, strict=True):
            if lost := names - set(group):
                raise ValueError(
                    f"{checkpoint} is of another optimizer than {now['optimizer']}: its state has no {min(lost)}. "
                    + remedy
                )

    @contextmanager
    def loading_random_state(self, checkpoint: str | None) -> Iterator[None]:
        """Say which file it was if the random state that is loaded meanwhile is something else.

        Args:
            checkpoint: its folder; None where nothing is loaded.

        Raises:
            ValueError: then.
        """
        try:
            yield
        except _OTHER_CONTENT as error:
            raise ValueError(
                f"the random state in {checkpoint} holds something else ({type(error).__name__}: {error}). "
                "Name an older checkpoint to go on from."
            ) from error

    def place_in_stream(
        self, args: TrainingArguments, checkpoint: str | None, passes: int, found: tuple[int, int]
    ) -> tuple[int, int]:
        """Return the epochs and micro-batches to leave out: in a stream that was read more than once, the right ones.

        Args:
            args: of the trainer.
            checkpoint: its folder; None where training begins.
            passes: over the data that `Trainer` plans.
            found: what `Trainer` would leave out.
        """
        endless = passes == sys.maxsize  # Trainer's mark of a stream
        state = read_object(Path(checkpoint) / STATE_NAME) if checkpoint is not None and endless else None
        if checkpoint is None or state is None:
            return found
        accumulated = saved_facts(Path(checkpoint)).get("gradient_accumulation_steps")
        done, micro_batches = position_in_stream(state, accumulated or args.gradient_accumulation_steps)
        return done, 0 if args.ignore_data_skip else micro_batches

    # ---- saving ----------------------------------------------------------------------------------------------------

    @contextmanager
    def saving(self, trainer: Trainer, dpsm: DPSMArguments, folder: Path) -> Iterator[None]:
        """Write the facts of the run into a checkpoint that is saved meanwhile.

        Args:
            trainer: in training.
            dpsm: the DPSM fields in force.
            folder: of the checkpoint.

        Raises:
            UnwritableError: the disk is full, for instance; the checkpoint before is whole.
        """
        with self.writing(trainer.args, folder):
            if trainer.args.should_save:
                # what an earlier run has left here is no checkpoint from the first file on that changes
                (folder / STATE_NAME).unlink(missing_ok=True)
                self.facts.save(trainer, dpsm, folder, model=_whole_model(trainer))
            yield
        self._unsealed = folder

    def seal(self, trainer: Trainer) -> None:
        """Write the digests of the parts of a checkpoint that was just saved, after what callbacks have written there.

        A kill before that leaves a whole checkpoint without digests. On all processes, which wait for each other.

        Args:
            trainer: in training.

        Raises:
            UnwritableError: the disk is full, for instance.
        """
        folder, self._unsealed = self._unsealed, None
        if folder is None:
            return
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save and folder.is_dir():
            with self.writing(trainer.args, folder):
                self.facts.seal(folder)

    @contextmanager
    def writing(self, args: TrainingArguments, folder: Path) -> Iterator[None]:
        """Say where it was, and what is left to go on from, if something cannot be written.

        Args:
            args: of the trainer.
            folder: that is written into.

        Raises:
            UnwritableError: then.
        """
        try:
            yield
        except UnwritableError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            from_hub = type(error).__module__.startswith(("huggingface_hub", "httpx", "requests"))
            if from_hub or (type(error) is RuntimeError and not any(word in reason for word in _TORCH_WRITING)):
                raise
            there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
            full = shutil.disk_usage(there).free < _LITTLE_SPACE
            code = errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO
            choice = newest_sound(str(args.output_dir), args.world_size)
            left = "there is no checkpoint yet" if choice.sound is None else f"{choice.sound.folder} is whole"
            raise UnwritableError(
                code,
                f"{folder} could not be written: {reason}. Nothing older was touched: {left}. Make room or mend the "
                "folder's permissions, then run the same again to go on",
            ) from error

    @contextmanager
    def writing_model(self, args: TrainingArguments, folder: str | None) -> Iterator[None]:
        """Keep the hub's token out of the arguments that are saved beside a model meanwhile.

        Args:
            args: of the trainer.
            folder: that is written into; ``output_dir`` if left out.

        Raises:
            UnwritableError: as `writing`.
        """
        token, args.hub_token = args.hub_token, None
        try:
            with self.writing(args, Path(folder or str(args.output_dir))):
                yield
        finally:
            args.hub_token = token


def _whole_model(trainer: Trainer) -> nn.Module | None:
    """Return the model where this process has all of its parameters."""
    return None if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled else trainer.model


def _say_what_is_missing(found: Checkpoint) -> None:
    logger.warning(
        f"{found.folder} is not complete: {found.describe()} (save_only_model, perhaps). What is missing begins "
        "anew: moments and learning rate as at step 0, other random numbers. The result will not be that of an "
        "uninterrupted run."
    )
