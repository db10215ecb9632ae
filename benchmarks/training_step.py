"""Time and peak memory of whole optimizer steps: DPSMTrainer against stock Trainer.

python -m benchmarks.training_step --models gpt2 bart --dtypes fp32 bf16
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
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

from benchmarks.common import Row, Table, add_options, main, measure, peak_in_own_process
from benchmarks.hidden import token_ids
from dpsm_hf import DPSMConfig, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from dpsm_hf.measuring.processes import peak_above

REFERENCE = "Trainer, ce"
FULL_LOGITS = "ours, dpsm, full logits"
VARIANTS = (REFERENCE, "ours, ce", "ours, dpsm", FULL_LOGITS)
# Ways to store fewer activations; without dropout, attention does not store its probabilities.
NO_DROPOUT, CHECKPOINTING = "no dropout", "activation checkpointing"


def make_model(name: str, how: str) -> nn.Module:
    """Return a GPT-2 small or a BART base with random weights; ``how`` is a way to store fewer activations, or ""."""
    torch.manual_seed(0)
    if name == "gpt2":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if how == NO_DROPOUT else {}
        return GPT2LMHeadModel(GPT2Config(**none))
    return BartForConditionalGeneration(
        BartConfig(vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
                   decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072)
    )  # fmt: skip


def make_batch(name: str, sequences: int, length: int) -> dict[str, torch.Tensor]:
    """Return a batch of real text; for BART the first half of each text is its summary."""
    ids = token_ids()[: sequences * length].view(sequences, length)
    return {"input_ids": ids, "labels": ids if name == "gpt2" else ids[:, : length // 2].contiguous()}


def make_step(name: str, variant: str, dtype: str, sequences: int, length: int, how: str) -> Callable[[], Any]:
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
        extra = {"scoring_rule": variant.split(", ")[1], "alpha_warmup_steps": 100,
                 "fused_head": "off" if variant == FULL_LOGITS else "on"}  # fmt: skip
    model = make_model(name, how)
    if how == CHECKPOINTING:
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
    """Return the peak of a step in MiB beyond model and optimizer state, measured in a new process."""
    return peak_in_own_process("benchmarks.training_step", case)


def run(arguments: argparse.Namespace, table: Table, device: torch.device) -> None:
    """Measure every model and dtype."""
    short = (arguments.sequences, arguments.length)
    for name in arguments.models:
        for dtype in arguments.dtypes:
            measure_case(name, dtype, short, "", VARIANTS, arguments, table, device)
            if name == "gpt2" and arguments.memory_length:
                # the length that GPT-2 was trained with; with fewer activations the head's share becomes visible
                long = (arguments.sequences, arguments.memory_length)
                for how in ("", NO_DROPOUT, CHECKPOINTING):
                    measure_case(name, dtype, long, how, (REFERENCE, "ours, dpsm"), None, table, device)


def measure_case(
    name: str, dtype: str, shape: tuple[int, int], how: str, variants: tuple[str, ...],
    arguments: argparse.Namespace | None, table: Table, device: torch.device,
) -> None:  # fmt: skip
    """Add a row for each variant; ``arguments=None`` measures memory only."""
    found: dict[str, dict[str, Any]] = {variant: {} for variant in variants}
    if arguments is not None:
        steps = {variant: make_step(name, variant, dtype, *shape, how) for variant in variants}
        found = measure(steps, REFERENCE, samples=arguments.samples, budget=arguments.budget, device=device,
                        clean=lambda: None, peak=lambda variant: None)  # fmt: skip
        del steps
    peaks = {variant: measure_memory([name, variant, dtype, *shape, how]) for variant in variants}
    base = peaks[REFERENCE]
    label = ", ".join(filter(None, (f"step {name}", how)))
    sequences, length = shape
    tokens, vocabulary = (sequences * length, 50257) if name == "gpt2" else (sequences * (length // 2), 50265)
    for variant in variants:
        columns, peak = found[variant], peaks[variant]
        columns.update(peak_mib=peak, peak_ratio=peak / base if peak and base else None)
        if peak is None and not columns.get("note"):
            columns["note"] = "memory: not measured"
        table.add(Row(label, variant, dtype, tokens, 768, vocabulary, **columns))


def own_peak(device: torch.device, *case: Any) -> float | None:
    """Return the peak of a step of `make_step` in this process."""
    step = make_step(*case)
    for _ in range(2):  # warm-up: the first step creates the optimizer state
        step()
    return peak_above(step, device)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=["gpt2", "bart"], default=["gpt2", "bart"])
    p.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    p.add_argument("--sequences", type=int, default=4, help="sequences of a batch")
    p.add_argument("--length", type=int, default=256, help="tokens of a sequence; BART's summaries have half")
    p.add_argument(
        "--memory-length",
        type=int,
        default=1024,
        help="tokens of a sequence of GPT-2 where memory alone is measured: as it is, without dropout, with "
        "activation checkpointing; 0 leaves that out",
    )
    add_options(p, samples=20, rounds="rounds of one step of each variant", budget=75)
    return p


if __name__ == "__main__":
    main(parser(), run, own_peak)
