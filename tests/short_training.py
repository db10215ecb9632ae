"""Arguments of a training of three steps, and what it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpsm_hf import DPSMConfig


def train(trainer: Any) -> list[dict[str, Any]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def config(tmp_path: Path, **arguments: Any) -> DPSMConfig:
    defaults = dict(output_dir=str(tmp_path), max_steps=3, use_cpu=True, disable_tqdm=True, save_strategy="no",
                    logging_steps=1, learning_rate=1e-2, calibration_metrics="all")  # fmt: skip
    return DPSMConfig(**{**defaults, **arguments})
