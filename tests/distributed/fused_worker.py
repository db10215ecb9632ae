"""Run by torchrun in two processes: the fused head under DDP and FSDP2; rank 0 saves the results.

torchrun --nproc-per-node 2 tests/distributed/fused_worker.py RESULTS.pt
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpsm_hf.head.model_head import FusedHead, ScoringRequest
from dpsm_hf.models.language_model import inputs_without_labels
from dpsm_hf.rules.scoring_rules import Objective
from tests import cases
from tests.distributed.processes import save_results
from tests.tiny import SEQ2SEQ, make_data, make_model

torch.set_num_threads(1)

DDP_CASES = [(name, find) for name in ("gpt2", "llama", "llama_lora", "bart") for find in (True, False)]
DDP_CASES += [(name, True) for name in ("llama_head_lora", "llama_dora", "llama_saved_head", "llama_prompt")]
# which units a model is cut into beside the root: none, its blocks and its head, its blocks alone
FSDP_CASES = [
    ("gpt2", "root"),
    ("llama", "root"),
    ("llama", "head"),
    ("llama", "blocks"),
    ("llama_head_lora", "root"),
    ("llama_head_lora", "head"),
    ("llama_dora", "root"),
    ("llama_dora", "blocks"),
    ("llama_saved_head", "root"),
    ("llama_prompt", "root"),
    ("bart", "root"),
]
PART_CASES = ("gpt2", "llama_lora", "bart")
STEPS = 2  # the first is the one that is checked


def gradients(name: str, units: str | None, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Return the summed losses and the gradients of some batches, each cut into `world` parts, averaged over them."""
    model = make_model(name)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if units is not None:
        mesh = init_device_mesh("cpu", (world,))
        if units in ("head", "blocks"):
            for layer in core.model.layers:
                fully_shard(layer, mesh=mesh)
        if units == "head":
            fully_shard(core.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    head = FusedHead(model)
    losses = []
    for step in range(STEPS):
        rows = make_data(name if name in SEQ2SEQ else "gpt2", 8, seed=step)
        batch = {key: torch.tensor(value) for key, value in rows.to_dict().items()}
        count = int((batch["labels"] != -100).sum())
        mine = {key: value[rank::world] for key, value in batch.items()}
        alignment: Any = "aligned" if name in SEQ2SEQ else "shifted"
        request = ScoringRequest(mine["labels"], alignment, Objective("dpsm", 0.4), count, chunk_tokens=5)
        output = head(model, inputs_without_labels(model, mine), request)
        assert output.loss is not None
        (output.loss * world).backward()  # sharding averages over processes
        losses.append(output.loss.detach())
    total = torch.stack(losses)
    if world > 1:
        dist.all_reduce(total)
    found: dict[str, Tensor] = {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            assert isinstance(grad, DTensor) == (units is not None)
            found[key] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return {"loss": total, "gradients": found}


def main(path: str) -> None:
    """Run every case."""
    results: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name, find in DDP_CASES:
            results[f"ddp/{name}/{find}"] = cases.one_step(
                name, "dpsm", 4, 2, fused_head="on", ddp_find_unused_parameters=find
            )
        for name in PART_CASES:
            results[f"parts/{name}"] = cases.one_step(name, "dpsm", 8, 1, log_component_grad_norms=True)
        rank, world = dist.get_rank(), dist.get_world_size()
        for name, units in FSDP_CASES:
            results[f"fsdp/{name}/{units}"] = gradients(name, units, rank, world)
    assert world == 2
    save_results(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
