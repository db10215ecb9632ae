"""Compile the Triton kernel ahead of time and print its registers, spills and shared memory; no GPU is needed.

python -m dpsm_hf.measuring.kernel_report
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..head.kernels import constants, launch_options
from ..rules.post_ops import PostOps
from ..rules.scoring_rules import SCORING_RULES, Objective

#: Compute capability of A100 and of H100.
ARCHITECTURES = (80, 90)
DTYPES = ("fp32", "bf16", "fp16")
VARIANTS: dict[str, tuple[Objective | None, PostOps]] = {
    "statistics": (None, PostOps()),
    **{name: (Objective(name), PostOps()) for name in SCORING_RULES},
    "dpsm, label smoothing": (Objective("dpsm", label_smoothing=0.1), PostOps()),
    "dpsm, score smoothing": (Objective("dpsm", score_smoothing=0.1), PostOps()),
    "dpsm, z-loss": (Objective("dpsm", z_loss=1e-4), PostOps()),
    "dpsm, entropy bonus": (Objective("dpsm", entropy_weight=0.1), PostOps()),
    "dpsm, softcap": (Objective("dpsm"), PostOps(softcap=30.0)),
}


@dataclass(frozen=True)
class CompiledKernel:
    """The resources of one compiled kernel, as reported by the assembler.

    Args:
        registers: registers of each thread.
        spill_bytes: bytes stored to and loaded from local memory because registers ran out.
        shared_bytes: shared memory of each program.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_ahead(
    architecture: int, dtype: str, objective: Objective | None, post: PostOps, vocab_size: int = 50257
) -> CompiledKernel:
    """Compile the kernel for a GPU architecture, without such a GPU.

    Args:
        architecture: compute capability times ten: 80, 90.
        dtype: of the logits: "fp32", "bf16" or "fp16".
        objective: the scoring rule; None computes the statistics only.
        post: the model's post-ops.
        vocab_size: V, which determines block size and warps.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..head.triton_kernel import row_kernel

    options = launch_options(vocab_size)
    fixed: dict[str, Any] = constants(objective, post, row_weight=False, entropy=objective is None, gradient=True)
    fixed["BLOCK"] = options["BLOCK"]
    signature = {
        "logits": f"*{dtype}", "labels": "*i64", "values": "*fp32", "statistics": "*fp32", "alpha": "*fp32",
        "weight": "*fp32", "top_entropy": "*fp32", "stride": "i32", "vocab_size": "i32", "scale": "fp32",
        "softcap": "fp32", "epsilon": "fp32", "z_loss": "fp32", "entropy_weight": "fp32", "exponent": "fp32",
        "parameters": ("fp32",) * len(objective.parameters if objective is not None else ()),
        **dict.fromkeys(fixed, "constexpr"),
    }  # fmt: skip
    # as at run time: pointers and the stride of a row (a multiple of 64 entries) are multiples of 16
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(8)}
    source = ASTSource(row_kernel, signature, constexprs=fixed, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": options["num_warps"]})
    registers, spill = _assembler_report(kernel.asm["ptx"], architecture)
    return CompiledKernel(registers, spill, int(kernel.metadata.shared))


def _assembler_report(ptx: str, architecture: int) -> tuple[int, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        gpu = f"--gpu-name=sm_{architecture}" + ("a" if architecture == 90 else "")
        command = [get_ptxas(architecture).path, "-v", gpu, str(path), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stderr + done.stdout
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", text))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text))
    return registers, spills


def main() -> None:
    """Print one line for each architecture, dtype and variant."""
    print(f"{'':8}{'logits':8}{'variant':24}{'registers':>10}{'spills':>8}{'shared':>8}")
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            for name, (objective, post) in VARIANTS.items():
                k = compile_ahead(architecture, dtype, objective, post)
                print(f"sm_{architecture:<5}{dtype:8}{name:24}{k.registers:10}{k.spill_bytes:8}{k.shared_bytes:8}")


if __name__ == "__main__":
    main()
