"""Starting a worker in several processes from a test, reading its results, and saving them in the worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def launch(*command: str, timeout: float = 300, **environment: str) -> None:
    """Run Python with these arguments and this checkout first on its path; it must exit with 0."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def results_of(worker: str, folder: Path, *arguments: str, processes: int = 2, **options: Any) -> Any:
    """Return what a worker of this folder saves with `save_results`; the path to save it to is its last argument.

    Args:
        worker: name of the file, without its ending.
        folder: for the results.
        arguments: of the worker, before the path.
        processes: that torchrun starts.
        options: of `launch`.
    """
    path, file = folder / "results.pt", str(Path(__file__).with_name(f"{worker}.py"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    launch(*torchrun, file, *arguments, str(path), **options)
    return torch.load(path, weights_only=False)


def save_results(results: Any, path: str | Path) -> None:
    """Save the results of the first process, and end the process group in all."""
    if dist.get_rank() == 0:
        torch.save(results, path)
    dist.barrier()
    dist.destroy_process_group()
