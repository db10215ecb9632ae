"""Run by test_kernels.py with TRITON_INTERPRET=1, which Triton reads when it is imported: every case in one process.

python tests/head/kernel_worker.py RESULTS.pt
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from dpsm_hf import linear_scoring_loss
from dpsm_hf.head.kernels import triton_row_pass
from dpsm_hf.rules.post_ops import PostOps
from dpsm_hf.rules.registry import RULES, SCORING_RULES
from dpsm_hf.rules.scoring_rules import Objective

torch.set_num_threads(1)

OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "score_smoothing": {"score_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "entropy_weight": {"entropy_weight": 0.2},
    "norm_weight": {"norm_weight": 1.5},
}
POSTS = {"none": PostOps(), "scaled": PostOps(0.25), "capped": PostOps(0.5, 3.0)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


#: post-op, kind of the logits, vocabulary (of one block and of three)
SPREADS = [(post, kind, 123) for post in POSTS for kind in ("random", "uniform", "certain", "masked")]
SPREADS += [("none", kind, 9001) for kind in ("random", "masked")]

# The interpreter takes a second a case or so: formulas of the label's probability alone have each option once.
SHORT = ("dft", "deft", "eaft", "power")


def rules() -> list[tuple[str, str, str, str]]:
    """Every rule with every option that it takes; those that are not in `SHORT` with every post-op and dtype."""
    found = []
    for rule, option, post, dtype in itertools.product(SCORING_RULES, OPTIONS, POSTS, DTYPES):
        usual = (post, dtype) == ("capped", "bf16" if option == "plain" else "fp32")
        short = rule in SHORT or (option == "entropy_weight" and rule != "dpsm")
        some = {"score_smoothing": RULES[rule].score_smoothing, "norm_weight": rule in ("brier", "dpsm")}
        takes = some.get(option, True)
        if takes and (usual or not short):
            found.append((rule, option, post, dtype))
    return found


def chunk(rows: int, vocab: int, dtype: torch.dtype, kind: str = "random") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in a buffer whose rows begin at multiples of 64 entries, and labels."""
    generator = torch.Generator().manual_seed(rows * 100_003 + vocab)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    columns = -(-vocab // 64) * 64
    buffer = torch.full((rows, columns), 7.0, dtype=dtype)  # what lies between the rows must stay
    logits = buffer[:, :vocab]
    logits.copy_(torch.randn(rows, vocab, generator=generator) * 4)
    if kind == "uniform":
        logits.zero_()
    elif kind == "certain":
        logits.zero_().scatter_(-1, labels.unsqueeze(-1), torch.linspace(8, 24, rows).to(dtype).unsqueeze(-1))
    elif kind == "masked":
        masked = torch.arange(0, vocab, 3)
        logits[:, masked[~torch.isin(masked, labels)]] = float("-inf")
    return buffer, labels


def spread_chunk(kind: str, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; of a masked label the running maximum begins below every logit."""
    buffer, labels = chunk(3, vocab, torch.float32, kind)
    if kind == "masked":
        labels[0] = 0
        buffer[0, 0] = float("-inf")
    return buffer, labels


def case(buffer: torch.Tensor, vocab: int, labels: torch.Tensor, **arguments: Any) -> dict[str, Any]:
    """One launch; the buffer as it stands afterwards."""
    value, statistics = triton_row_pass(buffer[:, :vocab], labels, **arguments)
    return {"value": value, "statistics": statistics, "buffer": buffer}


def main(path: str) -> None:
    """Run every case and save what came out."""
    results: dict[str, Any] = {}
    for loss, option, post, dtype in rules():
        buffer, labels = chunk(5, 123, DTYPES[dtype])
        objective = Objective(loss, 0.3, **OPTIONS[option])
        results[f"rule/{dtype}/{loss}/{option}/{post}"] = case(
            buffer, 123, labels, objective=objective, post=POSTS[post], entropy=True
        )
    for rows, vocab in ((1, 2), (47, 123), (3, 1000), (2, 9001)):
        for loss in ("dpsm", "spherical"):
            buffer, labels = chunk(rows, vocab, torch.float32)
            objective = Objective(loss, 0.3)
            results[f"shape/{rows}/{vocab}/{loss}"] = case(buffer, vocab, labels, objective=objective, post=PostOps())
    for kind in ("uniform", "certain", "masked"):
        for loss in SCORING_RULES:
            buffer, labels = chunk(9, 200, torch.float32, kind)
            objective = Objective(loss, torch.tensor(0.3))
            results[f"kind/{kind}/{loss}"] = case(
                buffer, 200, labels, objective=objective, post=PostOps(), entropy=True
            )
    weights: dict[str, Any] = {"float": 0.5, "scalar": torch.tensor(0.5), "rows": torch.linspace(0.1, 2.0, 7)}
    for name, weight in weights.items():
        buffer, labels = chunk(7, 123, torch.float32)
        results[f"weight/{name}"] = case(
            buffer, 123, labels, objective=Objective("dpsm", 0.3), post=PostOps(), weight=weight
        )
    for name, objective in (("statistics", None), ("value", Objective("dpsm", 0.3))):
        buffer, labels = chunk(7, 123, torch.float32)
        results[f"untouched/{name}"] = case(
            buffer, 123, labels, objective=objective, post=PostOps(), entropy=True, gradient=False
        )
    for post, kind, vocab in SPREADS:
        buffer, labels = spread_chunk(kind, vocab)
        results[f"varentropy/{post}/{kind}/{vocab}"] = case(
            buffer, vocab, labels, objective=None, post=POSTS[post], entropy=True, varentropy=True, gradient=False
        )
    for name, scheduled in (("none", ()), ("z_loss", ("z_loss",)), ("label", ("label_smoothing",)),
                            ("score", ("score_smoothing",))):  # fmt: skip
        buffer, labels = chunk(7, 123, torch.float32)
        objective = Objective("dpsm", 0.3, scheduled=frozenset(scheduled))
        results[f"scheduled/{name}"] = case(buffer, 123, labels, objective=objective, post=PostOps())
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 16, generator=generator), torch.randn(123, 16, generator=generator)
    labels = torch.randint(0, 123, (30,), generator=generator)
    labels[::4] = -100
    for impl in ("triton", "reference"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        scores = linear_scoring_loss(h, w, labels, alpha=0.3, chunk_tokens=8, impl=impl, entropy=True)
        scores.loss.backward()
        results[f"head/{impl}"] = {"loss": scores.loss.detach(), "dX": h.grad, "dW": w.grad, "nll": scores.nll,
                                   "entropy": scores.entropy}  # fmt: skip
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
