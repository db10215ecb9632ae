"""Whole optimizer steps through the trainers: DPSMTrainer against stock Trainer, time and peak memory.

python -m benchmarks.training_step --models gpt2 bart --dtypes fp32 bf16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from benchmarks.common import HERE, Row, Table, measure, peak_above, slug
from benchmarks.hidden import token_ids
from dpsm_hf import DPSMConfig, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer

REFERENCE = "Trainer, ce"
VARIANTS = (REFERENCE, "ours, ce", "ours, dpsm")
# malloc gives memory of at least this size back at once: then a high-water mark is a sum of live tensors
_EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def make_model(name: str) -> nn.Module:
    """Return a GPT-2 small or a BART base from its configuration, with random weights."""
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config())
    return BartForConditionalGeneration(
        BartConfig(vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
                   decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072)
    )  # fmt: skip


def make_batch(name: str, sequences: int, length: int) -> dict[str, torch.Tensor]:
    """Return sequences of real text; for BART the text is its own summary, half as long."""
    ids = token_ids()[: sequences * length].view(sequences, length)
    return {"input_ids": ids, "labels": ids if name == "gpt2" else ids[:, : length // 2].contiguous()}


def make_step(
    name: str, variant: str, dtype: str, sequences: int, length: int, checkpointing: bool
) -> Callable[[], Any]:
    """Return a function that does one optimizer step of a variant."""
    seq2seq, stock = name != "gpt2", variant == REFERENCE
    trainer_class: Any
    config: Any
    if stock:
        trainer_class, config = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)
        extra = {}
    else:
        trainer_class = DPSMSeq2SeqTrainer if seq2seq else DPSMTrainer
        config = DPSMSeq2SeqConfig if seq2seq else DPSMConfig
        extra = {"loss_type": variant.removeprefix("ours, "), "alpha_warmup_steps": 100, "fused_head": "on"}
    model = make_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    args = config(output_dir=tempfile.gettempdir(), bf16=dtype == "bf16", max_steps=1000, report_to="none",
                  use_cpu=not torch.cuda.is_available(), learning_rate=1e-4, **extra)  # fmt: skip
    trainer = trainer_class(model=model, args=args)
    trainer.create_optimizer()
    wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = wrapped
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = 1000
    batch = make_batch(name, sequences, length)
    count = (batch["labels"] != -100).sum().to(args.device)

    def step() -> None:
        trainer.training_step(wrapped, dict(batch), num_items_in_batch=count)
        trainer.accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm)
        optimizer.step()
        wrapped.zero_grad()
        trainer.state.global_step += 1

    return step


def measure_memory(case: list[Any]) -> float | None:
    """Return the peak of a step above model and optimizer state, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_step", "--memory-of", json.dumps(case)],
        env={**os.environ, **_EXACT_MEMORY}, capture_output=True, text=True, check=False, cwd=HERE.parent,
    )  # fmt: skip
    if done.returncode:
        print(done.stderr[-1000:], file=sys.stderr)
        return None
    value = json.loads(done.stdout.strip().splitlines()[-1])
    return None if value is None else float(value)


def run(arguments: argparse.Namespace, table: Table, device: torch.device) -> None:
    """Measure every model and dtype."""
    shape = (arguments.sequences, arguments.length)
    for name in arguments.models:
        for dtype in arguments.dtypes:
            # with checkpointing the blocks no longer hide the head; one model shows it
            for checkpointing in (False, True) if name == "gpt2" else (False,):
                case = [name, dtype, *shape, checkpointing]
                label = f"step {name}" + (", activation checkpointing" if checkpointing else "")
                found: dict[str, dict[str, Any]] = {variant: {} for variant in VARIANTS}
                if not checkpointing:
                    steps = {v: make_step(name, v, dtype, *shape, checkpointing) for v in VARIANTS}
                    found = measure(steps, REFERENCE, samples=arguments.samples, budget=arguments.budget,
                                    device=device, clean=lambda: None)  # fmt: skip
                    del steps
                peaks = {v: measure_memory([name, v, *case[1:]]) for v in VARIANTS}
                for variant in VARIANTS:
                    columns = found[variant]
                    columns["peak_mib"], base = peaks[variant], peaks[REFERENCE]
                    columns["peak_ratio"] = None if not base or peaks[variant] is None else peaks[variant] / base
                    tokens = shape[0] * (shape[1] if name == "gpt2" else shape[1] // 2)
                    vocabulary = 50257 if name == "gpt2" else 50265
                    table.add(Row(label, variant, dtype, tokens, 768, vocabulary, **columns))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=["gpt2", "bart"], default=["gpt2", "bart"])
    p.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    p.add_argument("--sequences", type=int, default=4, help="sequences of a batch")
    p.add_argument("--length", type=int, default=256, help="tokens of a sequence; BART's summaries have half")
    p.add_argument("--samples", type=int, default=20, help="rounds of one step of each variant")
    p.add_argument("--budget", type=float, default=75, help="seconds a case after which no further round begins")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--output", type=Path, help="CSV (default: benchmarks/results/<device>.csv)")
    p.add_argument("--memory-of", help=argparse.SUPPRESS)
    return p


def main() -> None:
    """Run from the command line."""
    arguments = parser().parse_args()
    device = torch.device(arguments.device)
    if arguments.memory_of:
        step = make_step(*json.loads(arguments.memory_of))
        for _ in range(2):  # the optimizer's state exists after the first
            step()
        print(json.dumps(peak_above(step, device)))
        return
    run(arguments, Table(arguments.output or HERE / "results" / f"{slug(device)}.csv", device), device)


if __name__ == "__main__":
    main()
