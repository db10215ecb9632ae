"""Growth of the output layer's time and memory with tokens, vocabulary and width: ours against Transformers' CE.

python -m benchmarks.growth
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import head
from benchmarks.common import Row, Table, add_options, main, measure
from benchmarks.hidden import hidden_states

TOKENS = (256, 512, 1024, 2048, 4096)
VOCABULARIES = (8192, 32768, 65536, 131072)
WIDTHS = (256, 512, 1024, 2048)


def run(arguments: argparse.Namespace, table: Table, device: torch.device) -> None:
    """Vary one size at a time around 512 tokens of width 256 and a vocabulary of 50,257."""
    cases = [("growth with tokens", n, 256, 50257) for n in arguments.tokens]
    cases += [("growth with vocabulary", 512, 256, v) for v in arguments.vocab]
    cases += [("growth with width", 512, d, 50257) for d in arguments.dims]
    for benchmark, tokens, width, vocabulary in cases:
        hidden, weight, labels = hidden_states(tokens, width, vocabulary, device, head.DTYPES[arguments.dtype])
        hidden.requires_grad_()
        weight.requires_grad_()

        def clean(hidden: torch.Tensor = hidden, weight: torch.Tensor = weight) -> None:
            hidden.grad = weight.grad = None

        variants = {head.REFERENCE: head.transformers_ce, "ours, dpsm": head.ours("dpsm")}
        inputs = (hidden, weight, labels)
        calls = {name: (lambda v=v, inputs=inputs: v(*inputs).backward()) for name, v in variants.items()}
        peak = head.peak_of(arguments.dtype, tokens, width, vocabulary) if device.type == "cpu" else None
        found = measure(calls, head.REFERENCE, samples=arguments.samples, budget=arguments.budget, device=device,
                        clean=clean, peak=peak)  # fmt: skip
        for name in variants:
            table.add(Row(benchmark, name, arguments.dtype, tokens, width, vocabulary, **found[name]))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    p.add_argument("--vocab", type=int, nargs="*", default=list(VOCABULARIES))
    p.add_argument("--dims", type=int, nargs="*", default=list(WIDTHS))
    p.add_argument("--dtype", choices=list(head.DTYPES), default="fp32")
    add_options(p, samples=7, rounds="rounds", budget=30)
    return p


if __name__ == "__main__":
    main(parser(), run)
