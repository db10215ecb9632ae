"""Going on from a checkpoint: from a sound one, exactly, or with a word before training about what is different."""

from __future__ import annotations

import errno
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..runtime.distributed import process_number, sum_over_processes
from .arguments import DPSMArguments
from .checkpoint_files import STATE_NAME, Checkpoint, checkpoint_folders, examine, read_object
from .run_facts import RunFacts, kind_of, model_facts, saved_facts, saved_parts

logger = logging.get_logger(__name__)

# What torch says where it could not write; it does not pass on why.
_TORCH_WRITING = ("PytorchStreamWriter", "inline_container", "iostream error", "unexpected pos")
_LITTLE_SPACE = 2**20
# Raised where a file of a checkpoint can be read but holds something else.
_OTHER_CONTENT = (ValueError, KeyError, IndexError, AttributeError, TypeError)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


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


class ResumingMixin(_Base):
    """What `DPSMMixin` does about checkpoints: look before going on from one, and save finite weights alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: What is written into checkpoints and compared on going on from one.
        self.run_facts = RunFacts()
        self._finite: Tensor | None = None  # whether all gradients were, where nobody waits for the device
        super().__init__(*args, **kwargs)

    if TYPE_CHECKING:

        @property
        def dpsm(self) -> DPSMArguments: ...

    # ---- which checkpoint ------------------------------------------------------------------------------------------

    def settle_checkpoint(self, wanted: str | bool | None) -> str | bool | None:
        """Look at the checkpoint that is asked for, and say before training what is wrong or different.

        Args:
            wanted: as `Trainer.train` takes it: a folder, or True for the newest one in ``output_dir``, of which a
                damaged one is passed over.

        Returns:
            The folder; what was given where there is no checkpoint at all, for `Trainer` to say so.

        Raises:
            ValueError: it is damaged, or ``run_facts.strict`` and it is not that of this very run.
        """
        self._finite = None
        if not wanted:
            return wanted
        found: str | bool = wanted
        error: str | None = None
        if self.is_world_process_zero():
            try:
                found = self._newest() if wanted is True else self._named(Path(str(wanted)))
                if isinstance(found, str) and Path(found).is_dir():
                    self._compare(Path(found))
            except ValueError as problem:
                error = str(problem)
        found, error = agreed((found, error))
        if error is not None:
            raise ValueError(error)
        return found

    def _newest(self) -> str | bool:
        choice = newest_sound(str(self.args.output_dir), self.args.world_size)
        if choice.passed_over and self.run_facts.strict:
            raise ValueError(f"{choice.describe()} Delete what is damaged, or name the checkpoint to go on from.")
        if choice.sound is not None:
            if choice.passed_over:
                logger.warning(choice.describe())
            return str(choice.sound.folder)
        usable = next((found for found in choice.passed_over if found.has_weights), None)
        if usable is not None:
            self._say_what_is_missing(usable)
            return str(usable.folder)
        if any(found.damaged for found in choice.passed_over):
            raise ValueError(f"{choice.describe()} Start afresh with resume_from_checkpoint=None.")
        return True

    def _named(self, folder: Path) -> str:
        if not folder.is_dir():
            return str(folder)
        found = examine(folder, self.args.world_size)
        if not found.has_weights or (not found.sound and self.run_facts.strict):
            older = newest_sound(str(folder.parent), self.args.world_size).sound
            remedy = "start afresh" if older is None else f"take {older.folder}, the newest sound one beside it"
            raise ValueError(
                f"Can't find a valid checkpoint at {folder}: it is incomplete or damaged: {found.describe()}. "
                f"Remedy: {remedy}."
            )
        if found.missing:
            self._say_what_is_missing(found)
        return str(folder)

    def _say_what_is_missing(self, found: Checkpoint) -> None:
        logger.warning(
            f"{found.folder} is not complete: {found.describe()} (save_only_model, perhaps). What is missing begins "
            "anew: moments and learning rate as at step 0, other random numbers. The result will not be that of an "
            "uninterrupted run."
        )

    def _compare(self, folder: Path) -> None:
        found = self.run_facts.differences(folder, self.run_facts.of(self, self.dpsm))
        if not found:
            return
        text = (
            f"{folder} was saved by a run that is different from this one: {'; '.join(found)}. The result will not "
            "be that of either run. Resume with the data and arguments of the first run to go on exactly, or train "
            "into another output_dir."
        )
        if self.run_facts.strict:
            raise ValueError(text)
        logger.warning(text)

    # ---- loading ---------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights as `Trainer` does, unless they are those of another model.

        Raises:
            ValueError: naming both.
        """
        saved = saved_parts(Path(resume_from_checkpoint)).get("model")
        whole = self._whole_model()
        if saved is not None and whole is not None and saved != model_facts(whole):
            raise ValueError(
                f"{resume_from_checkpoint} is of another model: it was {saved} and is {model_facts(whole)}. Use the "
                "model of the first run, or another output_dir."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their states as `Trainer` does, unless they are those of another kind.

        Raises:
            ValueError: naming both, or what the state lacks.
        """
        if checkpoint is None or self.is_deepspeed_enabled or not (Path(checkpoint) / "optimizer.pt").is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = saved_parts(Path(checkpoint))
        now = {"optimizer": kind_of(self.optimizer), "scheduler": kind_of(self.lr_scheduler)}
        remedy = "Use that of the first run (optim, lr_scheduler_type), or another output_dir."
        for part, kind in now.items():
            if saved.get(part, kind) != kind:
                raise ValueError(f"{checkpoint} is of another {part}: it was {saved[part]} and is {kind}. {remedy}")
        assert self.optimizer is not None
        wanted = [set(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except _OTHER_CONTENT as error:
            raise ValueError(
                f"what optimizer.pt or scheduler.pt in {checkpoint} holds does not fit {now['optimizer']} and "
                f"{now['scheduler']} ({type(error).__name__}: {error}). Name an older checkpoint to go on from."
            ) from error
        for names, group in zip(wanted, self.optimizer.param_groups, strict=True):
            if lost := names - set(group):
                raise ValueError(
                    f"{checkpoint} is of another optimizer than {now['optimizer']}: its state has no {min(lost)}. "
                    + remedy
                )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state as `Trainer` does.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            super()._load_rng_state(checkpoint)
        except _OTHER_CONTENT as error:
            raise ValueError(
                f"the random state in {checkpoint} holds something else ({type(error).__name__}: {error}). "
                "Name an older checkpoint to go on from."
            ) from error

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Find the place to go on from as `Trainer` does; in a stream that was read more than once, the right one."""
        found: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        endless = num_train_epochs == sys.maxsize  # Trainer's mark of a stream
        state = read_object(Path(checkpoint) / STATE_NAME) if checkpoint is not None and endless else None
        if state is None:
            return found
        accumulated = saved_facts(Path(checkpoint)).get("gradient_accumulation_steps")
        passes, micro_batches = position_in_stream(state, accumulated or self.args.gradient_accumulation_steps)
        return passes, 0 if self.args.ignore_data_skip else micro_batches

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint as `Trainer` does, of finite weights alone, with the facts of the run.

        Raises:
            FloatingPointError: the weights are not finite.
            UnwritableError: the disk is full, for instance; the checkpoint before is whole.
        """
        self._check_past_gradients()
        self._check_weights()
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._writing(folder):
            if self.args.should_save:
                # what an earlier run has left here is no checkpoint from the first file on that changes
                (folder / STATE_NAME).unlink(missing_ok=True)
                self.run_facts.save(self, self.dpsm, folder, model=self._whole_model())
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `Trainer` does, unless its weights are not finite.

        Raises:
            FloatingPointError: naming the first that is not.
        """
        if not _internal_call:  # a checkpoint's were looked at
            self._check_past_gradients()
            self._check_weights()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model as `Trainer` does, its arguments without the hub's token."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            with self._writing(Path(output_dir or str(self.args.output_dir))):
                super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.hub_token = token

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Say where it was, and what is left to go on from, if something cannot be written.

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
            choice = newest_sound(str(self.args.output_dir), self.args.world_size)
            left = "there is no checkpoint yet" if choice.sound is None else f"{choice.sound.folder} is whole"
            raise UnwritableError(
                code,
                f"{folder} could not be written: {reason}. Nothing older was touched: {left}. Make room or mend the "
                "folder's permissions, then run the same again to go on",
            ) from error

    def _whole_model(self) -> nn.Module | None:
        """Return the model where this process has all of its parameters."""
        return None if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model

    # ---- numbers that are not finite -------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient as `Trainer` does, which asks for it right before the optimizer's step.

        Raises:
            FloatingPointError: it is not finite. With a gradient scaler (fp16) the optimizer leaves such a step out;
                with ``logging_nan_inf_filter=False`` (no waiting for the device) the next log or checkpoint raises.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        scaler = getattr(self.accelerator, "scaler", None)
        if (scaler is not None and scaler.is_enabled()) or self.engine_steps:
            return norm
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.args.logging_nan_inf_filter or not isinstance(whole, Tensor):
            if not math.isfinite(float(whole)):
                raise FloatingPointError(self._describe_gradient(float(whole), model))
        else:
            finite = torch.isfinite(whole)
            self._finite = finite if self._finite is None else self._finite & finite
        return norm

    @property
    def engine_steps(self) -> bool:
        """Return whether the optimizer runs within the backward pass, before anybody can look at the gradient."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _describe_gradient(self, norm: float, model: nn.Module) -> str:
        gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        bad = [name for name, gradient in gradients if not bool(torch.isfinite(gradient).all())]
        # clipping by a norm that is NaN has made all of them NaN
        where = (
            f" It is not finite in {len(bad)} parameters, first in {bad[0]}." if 0 < len(bad) < len(gradients) else ""
        )
        return (
            f"the norm of the gradient is {norm} at optimizer step {self.state.global_step + 1}, under a finite loss."
            f"{where} Nothing was updated with it: the last checkpoint is sound. Usual remedies: a lower learning "
            "rate, bf16 instead of fp16, a look at the samples of that step and at operations whose gradient is "
            "infinite at 0 (sqrt, log, norm)."
        )

    def _check_past_gradients(self) -> None:
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            raise FloatingPointError(
                f"the norm of a gradient was nan or infinite since the last log, up to optimizer step "
                f"{self.state.global_step}. The weights were updated with it, but not saved: the last checkpoint is "
                "sound. Take logging_nan_inf_filter=False back to stop at the very step."
            )

    def _check_weights(self) -> None:
        """Look whether weights that are about to be saved are finite, on all processes.

        Raises:
            FloatingPointError: naming the first that is not.
        """
        assert self.model is not None
        trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        # one wait for the device, not one a parameter
        flags = [_finite(weight).to(self.args.device) for _, weight in trained]
        finite = torch.stack(flags).tolist() if flags else []
        bad = [name for (name, _), whole in zip(trained, finite, strict=True) if not whole]
        if int(sum_over_processes(torch.tensor(len(bad), device=self.args.device))):
            raise FloatingPointError(
                f"{bad[0] if bad else 'a parameter of another process'} is NaN or infinite after optimizer step "
                f"{self.state.global_step}. Nothing was saved: the last checkpoint is sound. Usual remedies: a lower "
                "learning rate, max_grad_norm, bf16 instead of fp16."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, unless a gradient was not finite where nobody waited for it."""
        if "loss" in logs or "train_runtime" in logs:  # the last one may be long past
            self._check_past_gradients()
        super().log(logs, start_time)


def _finite(weight: Tensor) -> Tensor:
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return torch.isfinite(local.detach()).all()
