"""Run by torchrun in two processes: supervised fine-tuning with TRL; rank 0 saves the results.

torchrun --nproc-per-node 2 tests/distributed/trl_worker.py RESULTS.pt
"""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpsm_hf import CalibrationCallback
from tests.distributed.processes import save_results
from tests.trl.sft import DPSMSFTTrainer, SFTTrainer, data, settings, trained
from tests.trl.test_sft_equal import LORA

torch.set_num_threads(1)
gc.freeze()  # Trainer collects garbage when it begins to train: leave the modules imported so far out of that

#: The data, the rows of a micro-batch over all processes, arguments of the configuration, keywords of the trainer.
SETTINGS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "chat": ("messages", 8, {}, {}),
    "prompt-completion, accumulated": ("prompt_text", 4, {"gradient_accumulation_steps": 2}, {}),
    "packing, bfd": ("messages", 4, {"packing": True, "max_length": 64}, {}),
    "packing, wrapped": ("messages", 4, {"packing": True, "packing_strategy": "wrapped", "max_length": 48}, {}),
    "padding-free": ("messages", 8, {"padding_free": True, "max_length": None}, {}),
    "LoRA, checkpointing": ("messages", 8, {"gradient_checkpointing": True}, {"peft_config": LORA}),
}
#: What is trained: TRL's own trainer, and ours at two alphas.
ARMS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "SFTTrainer": (SFTTrainer, {}),
    "alpha 0": (DPSMSFTTrainer, {"alpha_schedule": "constant", "alpha_end": 0.0, "fused_head": "on"}),
    "alpha 0.5": (DPSMSFTTrainer, {"alpha_schedule": "constant", "alpha_end": 0.5, "fused_head": "on"}),
}
#: TRL's own trainer and alpha = 0 in fewer settings, for the time it takes.
CASES = [("SFTTrainer", "chat"), ("SFTTrainer", "padding-free")]
CASES += [("alpha 0", setting) for setting in ("chat", "packing, bfd", "padding-free")]
CASES += [("alpha 0.5", setting) for setting in SETTINGS]
#: Rows for two steps of eight, and rows to evaluate, which do not divide into batches of 4.
TRAINED, EVALUATED = 16, 7


def run(arm: str, setting: str, processes: int = 1) -> dict[str, Any]:
    """Train two steps and evaluate; return what was logged, the gradient norms, the weights and the metrics."""
    kind, own = ARMS[arm]
    texts, rows, given, more = SETTINGS[setting]
    batches = {"per_device_train_batch_size": rows // processes, "per_device_eval_batch_size": 4 // processes}
    with tempfile.TemporaryDirectory() as folder:
        options = settings(Path(folder), **batches, **given, **own)
        trainer, norms = trained(kind, options, data(texts, TRAINED), **deepcopy(more))
        trainer.remove_callback(CalibrationCallback)  # it draws pictures, and has tests of its own
        metrics = trainer.evaluate(data(texts, TRAINED + EVALUATED).select(range(TRAINED, TRAINED + EVALUATED)))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return {"logs": logs, "norms": norms, "weights": weights, "metrics": metrics}


def main(path: str) -> None:
    """Run every case."""
    results: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for arm, setting in CASES:
            results[f"{arm}/{setting}"] = run(arm, setting, 2)
    assert dist.get_world_size() == 2
    save_results(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
