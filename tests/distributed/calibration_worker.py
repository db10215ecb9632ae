"""Run by torchrun in two or four processes: evaluations; rank 0 saves their counts and sums.

torchrun --nproc-per-node N tests/distributed/calibration_worker.py RESULTS.pt
"""

from __future__ import annotations

import contextlib
import io
import sys

import torch
import torch.distributed as dist

from tests import cases
from tests.distributed.processes import save_results

torch.set_num_threads(1)

#: model, rows, rows of a batch on each process, from a stream
CASES = (
    ("gpt2", 13, 2, False),
    ("gpt2", 13, 2, True),
    ("gpt2", 7, 4, False),
    ("bart", 11, 2, False),
    ("bart", 11, 2, True),
)


def main(path: str) -> None:
    """Run the cases."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = {case: cases.evaluate_panel(*case[:3], streaming=case[3]) for case in CASES}
    save_results({"processes": dist.get_world_size(), **results}, path)


if __name__ == "__main__":
    main(sys.argv[1])
