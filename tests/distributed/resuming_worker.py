"""Run by test_going_on_processes.py: going on from a damaged checkpoint, and a gradient that one process spoils."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn

from dpsm_hf import DPSMConfig, DPSMTrainer
from tests import cases
from tests.distributed.processes import save_results
from tests.tiny import make_data, make_model

COMMON = dict(max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, dropout=0.1)


class Spoiled(nn.Module):
    """The third gradient of the second process is NaN."""

    def __init__(self, inner: nn.Module, rank: int) -> None:
        super().__init__()
        self.inner, self.rank, self.calls = inner, rank, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(hidden)
        if hidden.requires_grad:
            hidden.register_hook(self.spoil)
        return hidden

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return gradient * float("nan") if (self.calls, self.rank) == (3, 1) else gradient


def train(folder: Path, resume: Any = None, **arguments: Any) -> Any:
    trainer = cases.build("gpt2", output_dir=str(folder), **{**COMMON, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def stream(folder: Path, resume: Any = None) -> list[torch.Tensor]:
    """Train eight steps on a stream of three batches a pass."""
    data = IterableDataset.from_generator(lambda: iter(make_data("gpt2", 12)))
    args = DPSMConfig(output_dir=str(folder), max_steps=8, per_device_train_batch_size=2, use_cpu=True, save_steps=5,
                      disable_tqdm=True, learning_rate=1e-2, report_to="none")  # fmt: skip
    trainer = DPSMTrainer(model=make_model("gpt2", 0.1), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return parameters(trainer)


def main(folder: Path) -> None:
    """Run everything and save what came of it."""
    results: dict[str, Any] = {}
    whole = train(folder / "run")
    rank = whole.args.process_index
    results["facts"] = (folder / "run" / "checkpoint-4" / "run_facts.json").read_text()
    if rank == 0:
        shutil.rmtree(folder / "run" / "checkpoint-6")
        (folder / "run" / "checkpoint-4" / "rng_state_1.pth").write_bytes(b"")
    whole.accelerator.wait_for_everyone()
    results["whole"], results["resumed"] = parameters(whole), parameters(train(folder / "run", True))

    def spoiled() -> str:
        trainer = cases.build("gpt2", output_dir=str(folder / "spoiled"), **{**COMMON, "save_steps": 1})
        trainer.model.transformer.ln_f = Spoiled(trainer.model.transformer.ln_f, rank)
        try:
            trainer.train()
        except FloatingPointError as error:
            finite = all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
            return f"{error} weights finite: {finite}"
        return "no error"

    said: list[Any] = [None] * 2
    torch.distributed.all_gather_object(said, spoiled())
    results["said"] = said
    results["straight"] = stream(folder / "stream")
    results["again"] = stream(folder / "stream", str(folder / "stream" / "checkpoint-5"))
    save_results(results, sys.argv[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]).parent)
