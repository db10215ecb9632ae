"""Run by torchrun in two processes: training with sharded weights through the trainers; rank 0 saves what was logged.

torchrun --nproc-per-node 2 tests/distributed/sharded_worker.py fsdp2|zero1|zero2|zero3 RESULTS.pt

Accelerate shards only on accelerators, so it is patched to accept gloo on CPUs. Everything else is real: FSDP2 and
DeepSpeed, their wrapping, hooks and collectives.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from tests import cases
from tests.distributed.processes import save_results

torch.set_num_threads(1)

STEPS = 3
# the blocks that FSDP2 shards one by one; the rest is the root's
BLOCKS = {"gpt2": ["GPT2Block"], "llama": ["LlamaDecoderLayer"], "llama_lora": ["LlamaDecoderLayer"]}
MODELS = {
    "fsdp2": ("gpt2", "llama", "llama_lora"),
    "zero1": ("llama",),
    "zero2": ("llama",),
    "zero3": ("gpt2", "llama", "llama_lora", "llama_dora", "llama_saved_head", "llama_prompt", "bart"),
}
# nothing may stay gathered because it is small, or nothing here would ever be sharded
_ZERO3 = {
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}  # fmt: skip


def train(name: str, micro_batch: int, how: str | None = None, **arguments: Any) -> list[dict[str, float]]:
    """Return what three steps on the same 16 examples each, and an evaluation after them, have logged."""
    if how == "fsdp2":
        arguments.update(
            fsdp="full_shard auto_wrap", fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": BLOCKS[name]}
        )
    elif how is not None:
        stage = int(how[-1])
        arguments["deepspeed"] = {
            "zero_optimization": {"stage": stage, **(_ZERO3 if stage == 3 else {})},
            "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
            # the optimizer is Transformers' own
            "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        }  # fmt: skip
    trainer = cases.build(
        name, scoring_rule="dpsm", alpha_schedule="constant", alpha_end=0.5, max_steps=STEPS,
        per_device_train_batch_size=micro_batch, per_device_eval_batch_size=4, use_cpu=how is None, **arguments,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    if how is not None:
        _check_sharded(trainer, how)
    return trainer.state.log_history


def _check_sharded(trainer: Any, how: str) -> None:
    parameters = list(trainer.model.parameters())
    if how == "fsdp2":
        assert any(isinstance(parameter, DTensor) for parameter in parameters)  # the root's stay whole for a while
        return
    assert trainer.model_wrapped.zero_optimization_stage() == int(how[-1])
    if how == "zero3":  # each process has a half of each
        assert all(2 * parameter.ds_tensor.numel() < parameter.ds_numel + 2 for parameter in parameters)


def _shard_on_cpus() -> None:
    def backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = backend
    PartialState.set_device = device


def main(how: str, path: str) -> None:
    """Run every case."""
    _shard_on_cpus()
    results = {name: train(name, 8, how, fused_head="on") for name in MODELS[how]}
    results["llama, accumulated"] = train("llama", 2, how, gradient_accumulation_steps=4, fused_head="on")
    if how == "zero3":
        results["llama, checkpointed"] = train("llama", 8, how, fused_head="on", **{cases.CHECKPOINTING: True})
        results["llama_head_lora, falling back"] = train("llama_head_lora", 8, how, fused_head="auto")
    assert dist.get_world_size() == 2
    save_results(results, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
