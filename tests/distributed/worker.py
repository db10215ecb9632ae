"""Run by torchrun in two processes: every distributed case in one start-up; rank 0 saves the results.

torchrun --nproc-per-node 2 tests/distributed/worker.py RESULTS.pt
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


def main(path: str) -> None:
    """Run the cases; micro-batches are per process, so half of what one process takes."""
    results: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name in cases.EXACT_MODELS:
            for loss in cases.EXACT_LOSSES:
                for micro_batch, accumulation in cases.SPLITS:
                    case = cases.one_step(name, loss, micro_batch // 2, accumulation)
                    results[f"exact/{name}/{loss}/{micro_batch}x{accumulation}"] = case
        results["exact-stock/bart"] = cases.one_step("bart", "ce", 8, 1, stock=True)
        for name in ("gpt2", "llama", "llama_lora"):
            for accumulation in (1, 3):
                for stock in (True, False):
                    results[f"equal/{name}/{accumulation}/{stock}"] = cases.parameters_and_logs(
                        name, stock=stock, scoring_rule="ce", fused_head="off", per_device_train_batch_size=2,
                        per_device_eval_batch_size=4, gradient_accumulation_steps=accumulation,
                    )  # fmt: skip
        for name in ("gpt2", "bart"):
            for rows, batch in ((11, 4), (13, 2), (8, 4)):
                results[f"uneven/{name}/{rows}/{batch}"] = cases.evaluate_uneven(name, rows, batch)
        results["trained-after-evaluation"] = cases.trained_after_evaluation("gpt2")
        results["generated"] = cases.generate_uneven(5, 2)
    assert dist.get_world_size() == 2
    save_results(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
