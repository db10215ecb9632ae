"""Evaluation: DPSMTrainer's, with every calibration metric, against stock Trainer's loss alone; and its memory.

python -m benchmarks.evaluation --tokens 16384 --dtypes fp32 bf16
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from benchmarks.common import Row, Table, add_options, main, measure, peak_in_own_process
from benchmarks.hidden import token_ids
from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.measuring.processes import peak_above

REFERENCE = "Trainer, loss alone"
VARIANTS = (REFERENCE, "ours", "ours, temperature and classes")
LENGTH = 256
VOCABULARY = 50257

#: Numbers of tokens at which memory is measured, with a model small enough to evaluate a million.
SIZES = (100_000, 1_000_000)


def make_rows(tokens: int) -> Dataset:
    """Return sequences of real text with so many tokens in all, repeating the text where it is shorter.

    Raises:
        ValueError: for less than one sequence.
    """
    if tokens < LENGTH:
        raise ValueError(f"{tokens} tokens are less than one sequence of {LENGTH}: give --tokens and --sizes more.")
    ids = token_ids()
    ids = ids.repeat(-(-tokens // len(ids)))[: tokens // LENGTH * LENGTH].view(-1, LENGTH).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make_evaluation(variant: str, dtype: str, tokens: int, small: bool = False) -> Callable[[], Any]:
    """Return a function that evaluates a GPT-2 small, or a very small one, on so many tokens."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=1) if small else GPT2Config())
    cuda = torch.cuda.is_available()
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "bf16": dtype == "bf16", "per_device_eval_batch_size": 8,
        "use_cpu": not cuda, "dataloader_pin_memory": cuda, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    rows = make_rows(tokens)
    trainer: Trainer
    if variant == REFERENCE:
        trainer = Trainer(model=model, args=TrainingArguments(prediction_loss_only=True, **common))
    else:
        classes = 50 if variant == VARIANTS[2] else 0
        args = (
            TrainingArguments(**common)
            if not classes
            else DPSMConfig(classwise_tokens=classes, calibration_metrics="all", **common)
        )
        ours = trainer = DPSMTrainer(model=model, args=args)
        if classes:
            ours.callback_handler.callbacks = []  # no pictures: they are not part of the comparison
            ours.use_temperature(1.1)
    trainer.args.prediction_loss_only = True
    trainer.log = lambda *arguments, **keywords: None  # type: ignore[method-assign]
    return lambda: trainer.evaluate(rows)


def measure_memory(case: list[Any]) -> float | None:
    """Return the peak in MiB of an evaluation above its model, measured in a process of its own."""
    return peak_in_own_process("benchmarks.evaluation", case)


def run(arguments: argparse.Namespace, table: Table, device: torch.device) -> None:
    """Measure time for each dtype, and memory for each size of the set."""
    label, width = ("evaluation, small", 64) if arguments.small else ("evaluation", 768)
    for dtype in arguments.dtypes:
        calls = {variant: make_evaluation(variant, dtype, arguments.tokens, arguments.small) for variant in VARIANTS}
        found = measure(calls, REFERENCE, samples=arguments.samples, budget=arguments.budget, device=device,
                        clean=lambda: None, peak=lambda variant: None)  # fmt: skip
        for variant in VARIANTS:
            table.add(Row(label, variant, dtype, arguments.tokens, width, VOCABULARY, **found[variant]))
    base: float | None = None
    for tokens in arguments.sizes if arguments.memory else ():
        peak = measure_memory(["ours", "fp32", tokens, True])
        base = peak if base is None else base
        columns: dict[str, Any] = {"peak_mib": peak, "peak_ratio": peak / base if peak and base else None}
        if peak is None:
            columns["note"] = "memory: not measured"
        table.add(Row("evaluation memory", "ours", "fp32", tokens, 64, VOCABULARY, **columns))


def own_peak(device: torch.device, variant: str, dtype: str, tokens: int, small: bool) -> float | None:
    """Return the peak of an evaluation in this process."""
    make_evaluation(variant, dtype, 8 * LENGTH, small)()  # warm-up: allocations of the first evaluation only
    return peak_above(make_evaluation(variant, dtype, tokens, small), device)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=16384, help="tokens of the set whose evaluation is timed")
    p.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    p.add_argument(
        "--small", action="store_true", help="time a very small model instead of a GPT-2 small: a trial run"
    )
    p.add_argument(
        "--sizes", nargs="+", type=int, default=list(SIZES), help="tokens of the sets whose memory is measured, with "
        "the very small model (default: 100000 1000000)",
    )  # fmt: skip
    p.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory of large sets out")
    add_options(p, samples=5, rounds="rounds of one evaluation of each variant", budget=240)
    return p


if __name__ == "__main__":
    main(parser(), run, own_peak)
