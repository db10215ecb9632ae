"""The row pass on CUDA: whether the Triton kernel can run, and its launch."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor

from ..rules.post_ops import PostOps
from ..rules.registry import RULES
from ..rules.rows import statistics_names, top_entropy
from ..rules.scoring_rules import Objective
from .row_pass import device_scalar, row_pass

# 4,096 entries over 8 warps are 16 per thread: three or four sums of that size stay in registers, and eight programs
# of 256 threads fill a streaming multiprocessor. Smaller vocabularies take the next power of two.
_MOST_BLOCK = 4096


def why_not(device: torch.device) -> str:
    """Return why the kernel cannot run on a device, with the remedy; "" if it can."""
    if not _installed():
        return "impl='triton' needs Triton, which is not installed: pip install triton, or use impl='torch'."
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"impl='triton' runs on CUDA, but the hidden states are on {device}: move them, or use impl='torch' "
            "(with TRITON_INTERPRET=1 set before Triton is imported, its slow interpreter runs the kernel)."
        )
    return ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def launch_options(vocab_size: int) -> dict[str, int]:
    """Return the block size and the number of warps for a vocabulary."""
    block = min(_MOST_BLOCK, max(32, 1 << (vocab_size - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def constants(
    objective: Objective | None, post: PostOps, *, row_weight: bool, entropy: bool, gradient: bool,
    varentropy: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the compile-time constants of the kernel.

    alpha, the weight and all other numbers are passed at run time, so that changing them compiles nothing.
    """
    found: dict[str, Any] = {
        "HAS_SOFTCAP": post.softcap is not None,
        "HAS_ROW_WEIGHT": row_weight,
        "HAS_ENTROPY": entropy,
        "HAS_VARENTROPY": entropy and varentropy,
    }
    if objective is None:
        off = dict.fromkeys(("HAS_Z_LOSS", "HAS_BONUS", "HAS_POWER", "HAS_TOP", "HAS_GRADIENT"), False)
        return {**found, "RULE": None, "SMOOTHING": 0, **off}
    found["HAS_BONUS"] = objective.uses("entropy_weight")
    found["HAS_POWER"] = objective.rule.exponent is not None
    found["HAS_TOP"] = objective.rule.top_entropy
    found["SMOOTHING"] = _smoothing(objective)
    rule = _triton_functions()[objective.scoring_rule]
    return {**found, "RULE": rule, "HAS_Z_LOSS": objective.uses("z_loss"), "HAS_GRADIENT": gradient}


def _smoothing(objective: Objective) -> int:
    if objective.label_smoothing or objective.score_smoothing:  # at most one of them
        return 1 if objective.label_smoothing else 2
    return 1 if objective.uses("label_smoothing") else 2 if objective.uses("score_smoothing") else 0


@functools.cache
def _triton_functions() -> dict[str, Any]:
    """Return the Triton function of each rule; made at first use, as Triton is slow to import and on Linux only."""
    import triton

    modules: dict[str, Any] = {rule.name: sys.modules[rule.kernel.__module__] for rule in RULES.values()}
    for module in modules.values():
        module.tl = triton.language  # Triton looks up `tl` and the called functions in the module's globals
        for name in [name for name in vars(module) if name.endswith("kernel")]:
            setattr(module, name, triton.jit(getattr(module, name)))
    return {name: module.kernel for name, module in modules.items()}


def triton_row_pass(
    logits: Tensor, labels: Tensor, objective: Objective | None, post: PostOps, *,
    weight: Tensor | float = 1.0, entropy: bool = False, varentropy: bool = False, gradient: bool = True,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Do what `row_pass` does in one kernel launch, without a device synchronisation; float64 goes to `row_pass`."""
    if logits.dtype == torch.float64:
        return row_pass(
            logits, labels, objective, post, weight=weight, entropy=entropy, varentropy=varentropy, gradient=gradient
        )
    from .triton_kernel import row_kernel

    rows, vocab_size = logits.shape
    device = logits.device
    columns = len(statistics_names(entropy, varentropy))
    statistics = torch.empty(rows, columns, dtype=torch.float32, device=device)
    values = torch.empty(rows, dtype=torch.float32, device=device)
    options = objective or Objective("ce")
    row_weight = isinstance(weight, Tensor) and weight.dim() > 0
    factor = device_scalar(weight, device).contiguous()
    needs = options.needs
    if rows:
        top = top_entropy(post(logits.float())).contiguous() if needs.top_entropy else factor
        row_kernel[(rows,)](
            logits, labels, values, statistics, device_scalar(options.alpha, device),
            factor, top, logits.stride(0), vocab_size, post.scale, post.softcap or 1.0,
            options.label_smoothing or options.score_smoothing, options.z_loss, options.entropy_weight, needs.exponent,
            options.parameters,
            **constants(
                objective, post, row_weight=row_weight, entropy=entropy, gradient=gradient, varentropy=varentropy
            ),
            **launch_options(vocab_size),
        )  # fmt: skip
    return None if objective is None else values, statistics
