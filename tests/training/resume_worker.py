"""Run by test_resume.py: train with every schedule, uninterrupted and killed, each run in a forked process.

    python tests/training/resume_worker.py FOLDER

Forking after the imports saves a start-up of torch and transformers for each of the runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests import cases

torch.set_num_threads(1)

STEPS, KILL_AFTER = 8, 5
RUNS: dict[str, dict[str, Any]] = {
    "linear": {"alpha_schedule": "linear", "alpha_warmup_steps": 6},
    "cosine": {"alpha_schedule": "cosine", "alpha_warmup_steps": 0.8},
    "constant": {"alpha_schedule": "constant", "alpha_end": 0.25},
    "late_linear": {"alpha_schedule": "late_linear", "alpha_hold": 0.25, "alpha_warmup_steps": 4},
    "step": {"alpha_schedule": "step", "alpha_hold": 6},
    "triangle": {"alpha_schedule": "triangle", "alpha_warmup_steps": 3},
    "feedback": {"alpha_schedule": "feedback", "alpha_start": 0.3, "alpha_feedback_gain": -3.0},
    "ce": {"scoring_rule": "ce"},
    "knobs": {
        "scoring_rule": "focal",
        "knob_schedules": {
            "focal_gamma": {
                "schedule": "feedback",
                "low": 0,
                "high": 5,
                "start": 1,
                "gain": -40,
                "limit": 0.3,
                "relative_to": "grad_norm",
            },
            "label_smoothing_factor": "linear 0 -> 0.1 over 6",
        },
    },
}


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def train(name: str, folder: Path, *, kill: bool = False, resume: bool = False) -> None:
    """Train one run in this process and save its final parameters and its logged alphas."""
    trainer = cases.build(
        "gpt2", dropout=0.1, output_dir=str(folder / ("whole" if not (kill or resume) else "killed") / name),
        max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=1, lr_scheduler_type="cosine", **RUNS[name],
    )  # fmt: skip
    if kill:
        trainer.add_callback(_Kill())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir) if resume else None)
    result = {
        "parameters": [p.detach().clone() for p in trainer.model.parameters()],
        "alpha": [(e["step"], e.get("alpha")) for e in trainer.state.log_history if "loss" in e],
        "gamma": [(e["step"], e.get("focal_gamma")) for e in trainer.state.log_history if "loss" in e],
    }
    torch.save(result, folder / f"{'resumed' if resume else 'whole'}-{name}.pt")


def forked(function: Callable[[], None]) -> int:
    """Run a function in a forked process and return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """Run everything."""
    for name in RUNS:
        assert forked(lambda: train(name, folder)) == 0  # noqa: B023 - called before the loop goes on
        assert forked(lambda: train(name, folder, kill=True)) == -signal.SIGKILL  # noqa: B023
        assert forked(lambda: train(name, folder, resume=True)) == 0  # noqa: B023


if __name__ == "__main__":
    main(Path(sys.argv[1]))
