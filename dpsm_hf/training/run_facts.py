"""Facts of a run that are saved with each checkpoint, to notice changed data or settings when it is resumed."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..runtime.files import write_json
from .arguments import DPSMArguments
from .checkpoint_files import FACTS_NAME, parts_of, read_object, saving_processes
from .digests import digests

#: Trainer's own arguments that decide what the weights become.
_SETTINGS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "dataloader_drop_last"),
    *("seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha"),
)
#: The optimizer's state brings them with it, whatever is asked for now.
_KEPT = frozenset({"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"})
#: What of the DPSM fields changes no weight.
_WITHOUT_EFFECT = frozenset(
    {"fused_head", "chunk_tokens", "calibration_bins", "classwise_tokens", "fit_temperature", "generated_calibration"}
    | {
        "log_component_grad_norms",
        "expected_depth",
        "calibration_metrics",
        "reliability_diagrams",
        "frequency_buckets",
    }
)
# Rows that stand for all of them: reading every token of a large set would take longer than the first steps.
_ROWS = 64


def settings_of(arguments: Any, dpsm: DPSMArguments) -> dict[str, Any]:
    """Return the arguments that decide what the weights become, as JSON has them.

    Args:
        arguments: `TrainingArguments`.
        dpsm: the DPSM fields in force.
    """
    names = [name for name in _SETTINGS if hasattr(arguments, name)]
    if arguments.max_steps > 0:
        names.remove("num_train_epochs")
    found = {name: _plain(getattr(arguments, name)) for name in names}
    mixes = dpsm.scoring_rule == "dpsm"
    for field in dataclasses.fields(DPSMArguments):
        if field.name not in _WITHOUT_EFFECT and (mixes or not field.name.startswith("alpha_")):
            found[field.name] = _plain(getattr(dpsm, field.name))
    return found


def data_facts(dataset: Any) -> str:
    """Return number and digest of the rows that are trained on; of another kind of set the number alone.

    The digest is of rows from all over the set, and reads nothing through the set's own code, which may draw random
    numbers.

    Args:
        dataset: the training set.
    """
    if not has_length(dataset):
        return "a stream"
    rows = len(dataset)
    if not isinstance(dataset, Dataset) or not rows:
        return f"{rows:,} rows"
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, _ROWS)).astype(int)).tolist()
    table = dataset.with_format("arrow")[chosen]
    content = {name: table.column(name).to_pylist() for name in sorted(table.column_names)}
    digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    return f"{rows:,} rows, sha256 of {len(chosen)} of them {digest[:16]}"


def model_facts(model: nn.Module) -> str:
    """Return the class of a model and the number of its parameters.

    Args:
        model: not sharded.
    """
    return f"{type(model).__name__} with {sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def kind_of(object_: Any) -> str:
    """Return the class of an optimizer or scheduler by its full name, without what Accelerate has put around it.

    Args:
        object_: optimizer or scheduler.
    """
    inner = getattr(object_, "optimizer", object_) if type(object_).__module__.startswith("accelerate") else object_
    return f"{type(inner).__module__}.{type(inner).__qualname__}"


class RunFacts:
    """What is compared where a run goes on from a checkpoint.

    Args:
        own: further facts by name, files for instance.
        strict: refuse a checkpoint that is damaged, incomplete or of another run, instead of a warning.
    """

    def __init__(self, own: Mapping[str, Any] | None = None, *, strict: bool = False) -> None:
        self.own = dict(own or {})
        self.strict = strict
        self._data: tuple[Any, str] | None = None

    def of(self, trainer: Trainer, dpsm: DPSMArguments) -> dict[str, Any]:
        """Return the facts of a trainer that may not have begun yet.

        Args:
            trainer: the trainer.
            dpsm: the DPSM fields in force.
        """
        found: dict[str, Any] = {name: _plain(value) for name, value in self.own.items()}
        dataset = trainer.train_dataset
        if dataset is not None:
            if self._data is None or self._data[0] is not dataset:
                self._data = dataset, data_facts(dataset)
            found["train_data"] = self._data[1]
        return {**found, "processes": trainer.args.world_size, **settings_of(trainer.args, dpsm)}

    def save(self, trainer: Trainer, dpsm: DPSMArguments, folder: Path, *, model: nn.Module | None) -> None:
        """Write the facts into a checkpoint's folder, which need not exist yet.

        Args:
            trainer: in training.
            dpsm: the DPSM fields in force.
            folder: of the checkpoint.
            model: whose parameters are whole here; None where they are sharded.
        """
        parts = {"optimizer": kind_of(trainer.optimizer), "scheduler": kind_of(trainer.lr_scheduler)}
        if model is not None:
            parts["model"] = model_facts(model)
        if getattr(trainer.accelerator, "scaler", None) is not None:
            parts["scaler"] = kind_of(trainer.accelerator.scaler)
        os.makedirs(folder, exist_ok=True)
        write_json({"schema": 1, "facts": self.of(trainer, dpsm), "parts": parts}, folder / FACTS_NAME)

    def seal(self, folder: Path) -> None:
        """Add the digests of the parts of a checkpoint, all of which are written, to its facts.

        Args:
            folder: of the checkpoint.
        """
        facts = read_object(folder / FACTS_NAME)
        if facts is not None:
            write_json({**facts, "digests": digests(folder, parts_of(folder))}, folder / FACTS_NAME)

    def differences(self, folder: Path, now: Mapping[str, Any]) -> list[str]:
        """Return what is different from when a checkpoint was saved, a sentence part each, with both values.

        A checkpoint without facts, of an older version, tells only how many processes it was saved by.

        Args:
            folder: of the checkpoint.
            now: as `of` returns them.
        """
        saved = {**saved_facts(folder), "processes": saving_processes(folder)}
        return [
            f"{name} was {_shown(saved[name])} and is {_shown(value)}"
            + (" (the checkpoint's stays in force)" if name in _KEPT else "")
            for name, value in now.items()
            if name in saved and saved[name] != value
        ]


def saved_facts(folder: Path) -> dict[str, Any]:
    """Return what the run that saved a checkpoint said of itself; nothing in one of an older version.

    Args:
        folder: of the checkpoint.
    """
    found = (read_object(folder / FACTS_NAME) or {}).get("facts")
    return dict(found) if isinstance(found, dict) else {}


def saved_parts(folder: Path) -> dict[str, str]:
    """Return what model, optimizer and scheduler a checkpoint is of, as far as it tells.

    Args:
        folder: of the checkpoint.
    """
    parts = (read_object(folder / FACTS_NAME) or {}).get("parts")
    return {str(name): str(value) for name, value in parts.items()} if isinstance(parts, dict) else {}


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else json.dumps(value, default=str)


def _shown(value: Any) -> str:
    return "left out" if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)
