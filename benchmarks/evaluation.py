"""Time and memory of an evaluation: DPSMTrainer with all calibration metrics, against stock Trainer's loss only.

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
VARIANTS = (REFERENCE, "ours", "ours, temperature and classes", "ours, with its picture")
#: Shapes of the timed model: GPT-2 small, the demo's, and a very small one for a trial run.
SHAPES: dict[str, dict[str, int]] = {
    "gpt2": {},
    "demo": {"n_embd": 128, "n_layer": 4, "n_head": 4},
    "tiny": {"n_embd": 64, "n_layer": 1, "n_head": 1},
}
LENGTH = 256
VOCABULARY = 50257
ENTRIES = 4096  # of the tokenizer, where the vocabulary has so many

#: Numbers of tokens for which memory is measured, with a very small model.
SIZES = (100_000, 1_000_000)


def make_rows(tokens: int, vocabulary: int = VOCABULARY) -> Dataset:
    """Return sequences of real text with so many tokens in all; a shorter text is repeated.

    Raises:
        ValueError: for less than one sequence.
    """
    if tokens < LENGTH:
        raise ValueError(f"{tokens} tokens are less than one sequence of {LENGTH}: give larger --tokens and --sizes.")
    ids = token_ids(min(ENTRIES, vocabulary))
    ids = ids.repeat(-(-tokens // len(ids)))[: tokens // LENGTH * LENGTH].view(-1, LENGTH).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make_evaluation(
    variant: str, dtype: str, tokens: int, shape: str = "gpt2", vocabulary: int = VOCABULARY
) -> Callable[[], Any]:
    """Return a function that evaluates a GPT-2 of one of `SHAPES` on so many tokens.

    Ours is what an evaluation in a training does; outside of one it also draws a picture, a variant of its own.
    """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **SHAPES[shape]))
    cuda = torch.cuda.is_available()
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "bf16": dtype == "bf16", "per_device_eval_batch_size": 8,
        "use_cpu": not cuda, "dataloader_pin_memory": cuda, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    rows = make_rows(tokens, vocabulary)
    trainer: Trainer
    if variant == REFERENCE:
        trainer = Trainer(model=model, args=TrainingArguments(prediction_loss_only=True, **common))
    else:
        classes = 50 if variant == VARIANTS[2] else 0
        if classes:
            common |= {"classwise_tokens": classes, "calibration_metrics": "all"}
        drawn = "final" if variant == VARIANTS[3] else "none"
        ours = trainer = DPSMTrainer(model=model, args=DPSMConfig(reliability_diagrams=drawn, **common))
        if classes:
            ours.use_temperature(1.1)
    trainer.args.prediction_loss_only = True
    trainer.log = lambda *arguments, **keywords: None  # type: ignore[method-assign]
    return lambda: trainer.evaluate(rows)


def measure_memory(case: list[Any]) -> float | None:
    """Return the peak of an evaluation in MiB beyond its model, measured in a new process."""
    return peak_in_own_process("benchmarks.evaluation", case)


def run(arguments: argparse.Namespace, table: Table, device: torch.device) -> None:
    """Measure the time for each dtype, and the memory for each size of the evaluation set."""
    label = "evaluation" if arguments.model == "gpt2" else f"evaluation, {arguments.model}"
    width = SHAPES[arguments.model].get("n_embd", 768)
    for dtype in arguments.dtypes:
        how = (dtype, arguments.tokens, arguments.model, arguments.vocabulary)
        calls = {variant: make_evaluation(variant, *how) for variant in VARIANTS}
        found = measure(calls, REFERENCE, samples=arguments.samples, budget=arguments.budget, device=device,
                        clean=lambda: None, peak=lambda variant: None)  # fmt: skip
        for variant in VARIANTS:
            table.add(Row(label, variant, dtype, arguments.tokens, width, arguments.vocabulary, **found[variant]))
    base: float | None = None
    for tokens in arguments.sizes if arguments.memory else ():
        peak = measure_memory(["ours", "fp32", tokens, "tiny"])
        base = peak if base is None else base
        columns: dict[str, Any] = {"peak_mib": peak, "peak_ratio": peak / base if peak and base else None}
        if peak is None:
            columns["note"] = "memory: not measured"
        table.add(Row("evaluation memory", "ours", "fp32", tokens, 64, VOCABULARY, **columns))


def own_peak(device: torch.device, variant: str, dtype: str, tokens: int, shape: str) -> float | None:
    """Return the peak of an evaluation in this process."""
    make_evaluation(variant, dtype, 8 * LENGTH, shape)()  # warm-up: allocations of the first evaluation only
    return peak_above(make_evaluation(variant, dtype, tokens, shape), device)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=16384, help="tokens of the set whose evaluation is timed")
    p.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    p.add_argument("--model", choices=list(SHAPES), default="gpt2", help="shape of the timed model (%(default)s)")
    p.add_argument("--vocabulary", type=int, default=VOCABULARY, help=f"of the timed model (default: {VOCABULARY})")
    p.add_argument(
        "--sizes", nargs="+", type=int, default=list(SIZES), help="tokens of the sets whose memory is measured, with "
        "the very small model (default: 100000 1000000)",
    )  # fmt: skip
    p.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory of large sets out")
    add_options(p, samples=5, rounds="rounds of one evaluation of each variant", budget=240)
    return p


if __name__ == "__main__":
    main(parser(), run, own_peak)
