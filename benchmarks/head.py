"""Time and memory of the output layer, forward and backward: ours, Transformers' cross-entropy, and others.

python -m benchmarks.head --dims 256 768 --dtypes fp32 bf16
python -m benchmarks.head --rules --dims 576 --vocab 49152 --dtypes fp32    # every scoring rule against cross-entropy
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, Table, add_options, main, measure, peak_in_own_process
from benchmarks.hidden import hidden_states
from dpsm_hf import linear_scoring_loss
from dpsm_hf.head.matmul import by_onednn, product
from dpsm_hf.measuring.processes import peak_above
from dpsm_hf.rules.registry import RULES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REFERENCE = "transformers CE"
Variant = Callable[[Tensor, Tensor, Tensor], Any]


def transformers_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy from full logits in float32, as Transformers' models compute it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def research_mix(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mix as research code writes it: log-softmax, softmax and a one-hot matrix."""
    logits = F.linear(hidden, weight).float()
    log_p = F.log_softmax(logits, -1)
    one_hot = F.one_hot(labels, logits.shape[-1]).float()
    ce = -(one_hot * log_p).sum(-1)
    brier = (log_p.exp() - one_hot).square().sum(-1)
    return (0.5 * ce + 0.5 * brier).mean()


def tidy_mix(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mix from full logits without a one-hot matrix."""
    logits = F.linear(hidden, weight).float()
    log_p = F.log_softmax(logits, -1)
    own = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    brier = p.square().sum(-1) - 2 * own.exp() + 1
    return (0.5 * -own + 0.5 * brier).mean()


def torch_linear_ce(rows: int | None) -> Variant:
    """PyTorch's chunked linear cross-entropy, at most ``rows`` rows per chunk; None leaves the choice to PyTorch."""

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        if rows is not None:
            options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden, weight, labels, options=options)

    return run


def ours(scoring_rule: str, impl: str = "auto", chunk: int | None = None, **more: Any) -> Variant:
    """The fused head, with alpha as a tensor on the device, so that nothing synchronises with it."""
    alpha: dict[torch.device, Tensor] = {}

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        mixed = alpha.setdefault(hidden.device, torch.full((), 0.5, device=hidden.device))
        options: dict[str, Any] = {"scoring_rule": scoring_rule, "impl": impl, "chunk_tokens": chunk, **more}
        return linear_scoring_loss(hidden, weight, labels, alpha=mixed, **options).loss

    return run


def bare_products(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The three products that every implementation needs: logits, gradient of the hidden states, weight gradient."""
    with torch.no_grad():
        logits = F.linear(hidden, weight)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)


def bare_products_onednn(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The three products by oneDNN, which the fused head uses for float32 on some processors."""
    with torch.no_grad():
        logits = product(hidden, weight)
        product(logits, weight.t())
        product(logits.t().contiguous(), hidden.t().contiguous())


def liger() -> Variant:
    """Liger's fused linear cross-entropy, with its default chunks."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels: liger_fused_linear_cross_entropy(hidden, weight, labels)


def apple_cce() -> Variant:
    """Apple's cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)


def all_variants(device: torch.device, dtype: torch.dtype) -> dict[str, Variant | str]:
    """Return the variants by name; in place of one that cannot run here, the reason as a string."""
    found: dict[str, Variant | str] = {
        REFERENCE: transformers_ce,
        "transformers CE, compiled": torch.compile(transformers_ce),
        "research mix": research_mix,
        "tidy mix": tidy_mix,
        "tidy mix, compiled": torch.compile(tidy_mix),
        **{f"torch linear CE, {n or 'auto'}": torch_linear_ce(n) for n in (None, 256, 512)},
        "three products": bare_products,
        "ours, ce": ours("ce"),
        "ours, dpsm": ours("dpsm"),
    }
    if by_onednn(torch.empty(1024, 1024, device=device, dtype=dtype), 1024):
        found["three products, oneDNN"] = bare_products_onednn
    if device.type == "cuda":
        found["ours, dpsm, torch"] = ours("dpsm", "torch")
        found.update({f"ours, dpsm, chunk {n}": ours("dpsm", chunk=n) for n in (1024, 4096)})
        for name, make in (("Liger", liger), ("apple CCE", apple_cce)):
            try:
                found[name] = make()
            except ImportError as error:
                found[name] = f"not installed: {error}"
    return found


def rule_variants() -> dict[str, Variant | str]:
    """Return the fused head with every scoring rule, and with what can be added to one; cross-entropy first."""
    added: dict[str, tuple[str, dict[str, Any]]] = {
        "ce, label smoothing": ("ce", {"label_smoothing": 0.1}),
        "ce, entropy bonus": ("ce", {"entropy_weight": 0.1}),
        "dpsm, norm weight": ("dpsm", {"rule_parameters": {"norm_weight": 1.5}}),
        "dpsm, entropy bonus": ("dpsm", {"entropy_weight": 0.1}),
        "brier, score smoothing": ("brier", {"score_smoothing": 0.1}),
    }
    plain = {name: (name, dict[str, Any]()) for name in ("ce", *RULES)}
    return {f"ours, {name}": ours(rule, **more) for name, (rule, more) in {**plain, **added}.items()}


def run(arguments: argparse.Namespace, table: Table, device: torch.device) -> None:
    """Measure every combination of width, vocabulary and dtype."""
    for vocabulary in arguments.vocab:
        for width in arguments.dims:
            tokens = arguments.tokens or default_tokens(width, vocabulary, device)
            for dtype in arguments.dtypes:
                torch._dynamo.reset()
                hidden, weight, labels = hidden_states(tokens, width, vocabulary, device, DTYPES[dtype])
                hidden.requires_grad_()
                weight.requires_grad_()
                reference = "ours, ce" if arguments.rules else REFERENCE
                found_here = rule_variants() if arguments.rules else all_variants(device, DTYPES[dtype])
                variants = {
                    name: variant
                    for name, variant in found_here.items()
                    if not arguments.only or name == reference or any(part in name for part in arguments.only)
                }
                inputs = (hidden, weight, labels)
                calls = {name: bound(v, inputs) for name, v in variants.items() if not isinstance(v, str)}

                def clean(hidden: Tensor = hidden, weight: Tensor = weight) -> None:
                    hidden.grad = weight.grad = None

                # on a CPU a call of a wide head takes seconds: take fewer samples (the table shows how many)
                samples = arguments.samples if width <= 1024 or device.type == "cuda" else min(5, arguments.samples)
                peak = peak_of(dtype, tokens, width, vocabulary) if device.type == "cpu" else None
                found = measure(calls, reference, samples=samples, budget=arguments.budget, device=device, clean=clean,
                                peak=peak)  # fmt: skip
                for name, variant in variants.items():
                    columns: dict[str, Any] = found.get(name, {"note": variant})
                    table.add(
                        Row("rules" if arguments.rules else "head", name, dtype, tokens, width, vocabulary, **columns)
                    )
                del hidden, weight, labels, inputs, calls


def bound(variant: Variant, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """Return a function without arguments that runs forward and backward pass of a variant."""

    def call() -> None:
        loss = variant(*inputs)
        if loss is not None:
            loss.backward()

    return call


def peak_of(dtype: str, tokens: int, width: int, vocabulary: int) -> Callable[[str], float | None]:
    """Return a function that measures a variant's peak memory at this size in a new process."""
    return lambda variant: peak_in_own_process("benchmarks.head", [variant, dtype, tokens, width, vocabulary])


def own_peak(name: str, dtype: str, tokens: int, width: int, vocabulary: int) -> float | None:
    """Return a variant's peak memory in MiB, in this process, on random tensors (memory does not depend on values)."""
    hidden = torch.randn(tokens, width).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.02).to(DTYPES[dtype]).requires_grad_()
    cpu = torch.device("cpu")
    variant = (rule_variants() | all_variants(cpu, DTYPES[dtype]))[name]
    assert not isinstance(variant, str)
    call = bound(variant, (hidden, weight, torch.randint(vocabulary, (tokens,))))
    for _ in range(2):  # warm-up: compilation, and buffers that libraries keep
        call()
        hidden.grad = weight.grad = None
    return peak_above(call, cpu)


def default_tokens(width: int, vocabulary: int, device: torch.device) -> int:
    """Return how many tokens to score: fewer for large heads on a CPU, where a call takes seconds."""
    if device.type == "cuda":
        return 8192
    return 256 if width > 1024 or vocabulary > 100_000 else 1024


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dims", type=int, nargs="+", default=[256, 768, 4096], help="widths of the hidden states")
    p.add_argument("--vocab", type=int, nargs="+", default=[50257, 128256], help="rows of the output layer")
    p.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    p.add_argument("--tokens", type=int, help="scored tokens (CPU: 1024, 256 for a wide or tall head; GPU: 8192)")
    p.add_argument("--rules", action="store_true", help="compare the scoring rules with cross-entropy, all fused")
    p.add_argument("--only", nargs="+", help="variants whose name contains one of these, and the reference")
    rounds = "rounds; at most 5 for widths above 1024 on a CPU; 0 measures memory only"
    add_options(p, samples=20, rounds=rounds, budget=240)
    return p


if __name__ == "__main__":
    # for a CPU; on a GPU `measure` reads the allocator's statistics in its own process
    main(parser(), run, lambda _, *case: own_peak(*case))
