"""Training with corruption under torchrun, or killed and resumed in forked processes; rank 0 saves the results.

torchrun --nproc-per-node 2 tests/distributed/corruption_worker.py RESULTS.pt

Every case is run in one go. With a folder instead of a file, each is also killed by SIGKILL and resumed:

python tests/distributed/corruption_worker.py FOLDER
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.corrupted_run import CASES, build, corruption, last_checkpoint, result, run
from tests.distributed.processes import save_results
from tests.training.resume_worker import forked

torch.set_num_threads(1)

#: rows of a micro-batch of each of two processes, accumulation steps
SPLITS = ((4, 1), (2, 2))
KILL_AFTER = 3


def gathered(found: dict[str, Any]) -> dict[str, Any]:
    """Put the rows of all processes together."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found["rows"])
    return {**found, "rows": {step: [row for part in parts for row in part[step]] for step in parts[0]}}


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(case: Any, folder: Path, *, kill: bool) -> None:
    """Train a case until it is killed, or resume it from its last checkpoint and save the result."""
    name, kind = case
    checkpoints = folder / f"{name}-{kind}"
    trainer = build(
        name, corruption(kind), 4, 2, output_dir=str(checkpoints), save_strategy="steps", save_steps=2, logging_steps=1
    )
    if kill:
        trainer.add_callback(_Kill())
    trainer.train(resume_from_checkpoint=None if kill else last_checkpoint(checkpoints))
    torch.save(result(trainer), folder / f"{name}-{kind}.pt")


def main(path: Path) -> None:
    """Run everything."""
    if path.is_dir():
        for case in CASES:
            assert forked(lambda: resumable(case, path, kill=True)) == -signal.SIGKILL  # noqa: B023 - called at once
            assert forked(lambda: resumable(case, path, kill=False)) == 0  # noqa: B023
        return
    results: dict[Any, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for case in CASES:
            for split in SPLITS:
                results[case, split] = gathered(run(*case, *split))
    assert dist.get_world_size() == 2
    save_results(results, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
