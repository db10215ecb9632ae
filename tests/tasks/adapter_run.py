"""A small saved language model, and command lines that train an adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tasks.clm_run import real_texts, write
from tests.tasks.saved_models import save_language_model

CALM: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "log_level": "warning"}
LORA: dict[str, Any] = {"lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.1}


def words(**options: Any) -> list[str]:
    """A command line; a list is several words, None is left out."""
    given = []
    for name, value in options.items():
        if value is not None:
            given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return given


def save_base(folder: Path) -> Path:
    """Save a model as ``model`` and a text as ``train.txt`` into a folder, and return that."""
    save_language_model(folder / "model")
    write(folder, "txt", real_texts()[:20])
    return folder


def command(base: Path, out: Path, **options: Any) -> list[str]:
    text = str(base / "train.txt")
    common = {"train_file": text, "validation_file": text, "do_train": True, "do_eval": True, "block_size": 32,
              "max_train_samples": 16, "max_eval_samples": 8, "per_device_train_batch_size": 4, "max_steps": 4,
              "learning_rate": 0.01, "logging_steps": 1, "save_steps": 2}  # fmt: skip
    return words(model_name_or_path=base / "model", output_dir=out, **{**common, **LORA, **CALM, **options})
