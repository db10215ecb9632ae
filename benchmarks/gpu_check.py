"""Check the fused head on a GPU, which CI does not have: accuracy, synchronisation, memory, and a training run.

python -m benchmarks.gpu_check --output gpu_check.json                # on a GPU: about two minutes
python -m benchmarks.gpu_check --device cpu --small                   # on a CPU, without the CUDA-only checks

Errors against float64 are compared with those of the unfused path in the same dtype, as tests/head does on a CPU. The
exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsm_hf import linear_scoring_loss
from dpsm_hf.head.kernels import why_not
from dpsm_hf.head.options import HeadOptions, LinearHead
from dpsm_hf.head.scoring_loss import ScoredRows, TokenLabels, score_hidden
from dpsm_hf.measuring.processes import MIB, device_name, peak_above
from dpsm_hf.rules.losses import score_tokens
from dpsm_hf.rules.scoring_rules import SCORING_RULES, Objective
from tests.reference import reference_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RULES: dict[str, dict[str, Any]] = {
    **{name: {"scoring_rule": name} for name in SCORING_RULES if name != "dpsm"},
    "dpsm .3": {"scoring_rule": "dpsm", "alpha": 0.3},
    "dpsm 1": {"scoring_rule": "dpsm", "alpha": 1.0},
    "dpsm smoothed": {"scoring_rule": "dpsm", "alpha": 0.7, "label_smoothing": 0.1, "z_loss": 0.001},
    "brier tail": {"scoring_rule": "brier", "score_smoothing": 0.1},
}
POST_OPS: dict[str, dict[str, Any]] = {"": {}, "scaled, capped": {"logit_scale": 0.5, "logit_softcap": 4.0}}
# relative rounding error that any float32 sum may have
SLACK = 16 * torch.finfo(torch.float32).eps


@dataclass
class Check:
    """The result of one check."""

    name: str
    passed: bool
    detail: str
    seconds: float = 0.0


class Case(NamedTuple):
    """The inputs of the head: hidden states ``[N, D]``, weight ``[V, D]``, bias ``[V]``, labels ``[N]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return copies of hidden states, weight and bias that require gradients."""
        return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in self[:3]]


def make_case(n: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Return random inputs: logits near unit size, every tenth token nearly certain, every seventh ignored."""
    g = torch.Generator().manual_seed(n)
    weight, bias = torch.randn(vocab, width, generator=g) / width**0.5, torch.randn(vocab, generator=g)
    hidden, labels = torch.randn(n, width, generator=g), torch.randint(vocab, (n,), generator=g)
    hidden[::10] = 20 * F.normalize(weight[labels[::10]], dim=-1)
    labels[6::7] = -100
    return Case(hidden.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype), labels.to(device))


def unfused(case: Case, rule: dict[str, Any], post: dict[str, Any], dtype: torch.dtype | None) -> list[Tensor]:
    """Return loss and gradients from full logits by autograd; ``dtype`` of None is that of the case."""
    inputs = case.leaves(dtype)
    keep = case.labels != -100
    z = F.linear(*inputs)[keep]
    z = (z if dtype == torch.float64 else z.float()) * post.get("logit_scale", 1.0)
    cap = post.get("logit_softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    loss = reference_loss(z, case.labels[keep], **rule).mean()
    loss.backward()
    return [loss.detach(), *(t.grad for t in inputs)]  # type: ignore[list-item]


def compare(truth: list[Tensor], plain: list[Tensor], mine: list[Tensor], unit: float) -> tuple[bool, str]:
    """Return whether the errors are at most twice those of the unfused path, with a sentence about the worst.

    The largest error may be greater by half a unit in the last place of the stored dtype, since the largest unfused
    error can be small by chance.

    Args:
        truth: loss and gradients in float64.
        plain: those of the unfused path.
        mine: those of the fused head.
        unit: a unit in the last place of the dtype, relative; 0 for float32.
    """
    worst, report, passed = 0.0, [], True
    for name, t, p, m in zip(("loss", "hidden", "weight", "bias"), truth, plain, mine, strict=True):
        error, allowed, size = (m.double() - t).abs(), (p.double() - t).abs(), t.abs()
        stored, floor = (0.0, 1.0) if name == "loss" else (unit / 2, 0.0)  # a loss near 0 comes from sums near 1
        fine = bool(torch.isfinite(m).all())
        fine &= bool(error.mean() <= 2 * allowed.mean() + SLACK * size.mean().clamp_min(floor))
        fine &= bool(error.max() <= 2 * allowed.max() + (stored + SLACK) * size.max().clamp_min(floor))
        if name != "loss":
            worst = max(worst, float(error.mean() / allowed.mean().clamp_min(1e-300)))
        passed &= fine
        if not fine:
            report.append(f"{name}: mean {float(error.mean()):.2e} (unfused {float(allowed.mean()):.2e}), "
                          f"max {float(error.max()):.2e} ({float(allowed.max()):.2e})")  # fmt: skip
    return passed, "; ".join([f"mean gradient error {worst:.2f} of the unfused one's at worst", *report])


def accuracy_checks(device: torch.device, impls: list[str], small: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield a check for every implementation, dtype, shape and rule."""
    shapes = [(1, 123, 40, None), (47, 123, 40, 8), (47, 5003 if small else 50257, 16, None)]
    if not small:
        shapes += [(1023, 50257, 64, 512), (4096, 1000, 64, 64)]
    for n, vocab, width, chunk in shapes:
        for dtype_name, dtype in DTYPES.items():
            for rule_name, rule in RULES.items():
                for post_name, post in POST_OPS.items():
                    if post and rule_name not in ("ce", "dpsm .3"):
                        continue

                    def check(
                        n: int = n, vocab: int = vocab, width: int = width, chunk: int | None = chunk,
                        dtype: torch.dtype = dtype, rule: dict[str, Any] = rule, post: dict[str, Any] = post,
                    ) -> tuple[bool, str]:  # fmt: skip
                        case = make_case(n, vocab, width, dtype, device)
                        truth = unfused(case, rule, post, torch.float64)
                        plain = unfused(case, rule, post, None)
                        verdicts = []
                        for impl in impls:
                            inputs = case.leaves()
                            loss = linear_scoring_loss(inputs[0], inputs[1], case.labels, bias=inputs[2],
                                                       impl=impl, chunk_tokens=chunk, **rule, **post).loss  # type: ignore[arg-type]  # fmt: skip
                            loss.backward()  # type: ignore[union-attr]
                            mine = [loss.detach(), *(t.grad for t in inputs)]  # type: ignore[union-attr]
                            unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
                            passed, text = compare(truth, plain, mine, unit)  # type: ignore[arg-type]
                            verdicts.append((passed, f"{impl}: {text}"))
                        return all(v[0] for v in verdicts), " | ".join(v[1] for v in verdicts)

                    yield f"accuracy N={n} V={vocab} {dtype_name} {rule_name} {post_name}".strip(), check


def check_statistics(device: torch.device, impls: list[str], small: bool) -> tuple[bool, str]:
    """Compare the statistics of each token with those from full logits in float64."""
    case = make_case(47, 123 if small else 50257, 40, torch.float32, device)
    truth = score_tokens(F.linear(case.hidden.double(), case.weight.double(), case.bias.double()), case.labels)
    worst = 0.0
    for impl in impls:
        got = linear_scoring_loss(case.hidden, case.weight, case.labels, bias=case.bias, entropy=True, impl=impl)  # type: ignore[arg-type]
        for name in ("nll", "brier", "spherical", "confidence", "correct", "entropy"):
            difference = (getattr(got, name).double() - getattr(truth, name).double()).abs().max()
            worst = max(worst, float(difference))
    return worst <= 2e-5, f"largest difference from float64: {worst:.2e}"


def check_no_waiting(device: torch.device, impls: list[str], small: bool) -> tuple[bool, str]:
    """Run forward and backward, with and without ignored tokens, while CUDA makes any synchronisation an error."""
    if device.type != "cuda":
        return True, "left out: only CUDA can report synchronisations"
    done = []
    alpha = torch.full((), 0.3, device=device)
    for impl in impls:
        for dtype_name, dtype in DTYPES.items():
            full = make_case(512, 5003, 64, dtype, device)
            full.labels.clamp_(min=0)
            some = make_case(512, 5003, 64, dtype, device)
            options = HeadOptions(Objective("dpsm", alpha), impl=impl, chunk_tokens=128)  # type: ignore[arg-type]

            def public(case: Case = full, impl: str = impl) -> None:
                inputs = case.leaves()
                scores = linear_scoring_loss(inputs[0], inputs[1], case.labels, bias=inputs[2], alpha=alpha,
                                             num_items_in_batch=512, impl=impl, chunk_tokens=128)  # type: ignore[arg-type]  # fmt: skip
                scores.loss.backward()  # type: ignore[union-attr]

            def as_in_a_model(case: Case = some, options: HeadOptions = options) -> None:
                inputs = case.leaves()
                # the trainer starts this count before the model's forward; here the device is idle, so it is ready
                rows = ScoredRows(case.labels)
                tokens = TokenLabels.of(case.labels, 5003, rows=rows.indices())
                scores = score_hidden(LinearHead(inputs[1], inputs[2]), inputs[0], tokens, options, denominator=400)
                scores.loss.backward()  # type: ignore[union-attr]

            for name, call in (("all scored", public), ("some ignored", as_in_a_model)):
                call()  # compiles, and probes the device once
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
                done.append(f"{impl} {dtype_name} {name}")
    return True, "no wait in: " + ", ".join(done)


def check_memory(device: torch.device, impls: list[str], small: bool) -> tuple[bool, str]:
    """Check that the peak memory of a call, beyond its inputs, is less than that of all logits."""
    n, vocab, width = (2048, 20011, 32) if small else (16384, 50257, 256)
    found, passed = [], True
    for impl in impls:
        hidden = torch.randn(n, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(vocab, (n,), device=device)

        def call(impl: str = impl, hidden: Tensor = hidden, weight: Tensor = weight, labels: Tensor = labels) -> None:
            hidden.grad = weight.grad = None
            linear_scoring_loss(hidden, weight, labels, alpha=0.3, impl=impl).loss.backward()  # type: ignore[arg-type,union-attr]

        call()
        hidden.grad = weight.grad = None
        peak, logits = peak_above(call, device), n * vocab * 2 / MIB
        passed &= peak is None or peak < logits
        found.append(f"{impl}: {'unknown' if peak is None else f'{peak:.0f} MiB'} (all logits: {logits:.0f})")
    return passed, ", ".join(found)


def check_training(device: torch.device, impls: list[str], small: bool) -> tuple[bool, str]:
    """Check that a tiny GPT-2 learns real text in bfloat16, and that fused and unfused losses nearly agree."""
    from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, set_seed

    from benchmarks.hidden import token_ids
    from dpsm_hf import DPSMConfig, DPSMTrainer

    steps, length, batch = (12, 32, 4) if small else (60, 128, 16)
    ids = token_ids()
    rows = [ids[i * length : (i + 1) * length] for i in range(min(len(ids) // length, steps * batch))]
    data = [{"input_ids": row, "labels": row} for row in rows]
    curves: dict[str, list[float]] = {}
    for mode in ("on", "off"):
        set_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=64, n_layer=2, n_head=2, n_positions=length,
                                           resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                           bos_token_id=0, eos_token_id=0))  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            args = DPSMConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=3e-3,
                warmup_steps=5, bf16=True, use_cpu=device.type == "cpu", logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, fused_head=mode, scoring_rule="dpsm",
                alpha_schedule="constant", alpha_end=0.3, seed=0,
            )  # fmt: skip
            trainer = DPSMTrainer(model=model, args=args, train_dataset=data)  # type: ignore[arg-type]
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        curves[mode] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = (sum(part) / len(part) for part in (curves["on"][:3], curves["on"][-3:]))
    apart = max(abs(a - b) / b for a, b in zip(curves["on"], curves["off"], strict=True))
    text = f"loss {first:.3f} to {last:.3f} in {steps} steps; fused and not differ by at most {100 * apart:.2f} %"
    return last < 0.97 * first and apart < 0.02, text


def run(device: torch.device, impls: list[str], small: bool) -> list[Check]:
    """Run every check and return the results; print those that failed, and all but the many of accuracy."""
    whole: dict[str, Callable[[torch.device, list[str], bool], tuple[bool, str]]] = {
        "statistics": check_statistics,
        "no waiting for the device": check_no_waiting,
        "memory below all logits": check_memory,
        "training": check_training,
    }
    todo = [(name, lambda f=f: f(device, impls, small)) for name, f in whole.items()]
    todo += list(accuracy_checks(device, impls, small))
    found = []
    for name, check in todo:
        started = time.perf_counter()
        try:
            passed, detail = check()
        except Exception as error:  # an exception fails this check; the others go on
            passed, detail = False, f"{type(error).__name__}: {error}"
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        found.append(Check(name, bool(passed), detail, round(time.perf_counter() - started, 2)))
        if not passed or name in whole:
            print(f"{'ok  ' if passed else 'FAIL'} {name}: {detail}", flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--impls", nargs="+", default=["triton", "torch"], help="row passes to check")
    p.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    p.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = p.parse_args()
    device = torch.device(arguments.device)
    # float32 products without TF32 on both paths
    torch.backends.cuda.matmul.allow_tf32 = False
    impls = list(arguments.impls)
    if "triton" in impls and (reason := why_not(device)):
        if device.type == "cuda":
            raise SystemExit(f"the Triton kernel cannot be checked: {reason}")
        print(f"triton is left out: {reason}")
        impls.remove("triton")
    found = run(device, impls, arguments.small)
    failed = [check for check in found if not check.passed]
    passed = f"{len(found) - len(failed)} of {len(found)} checks passed"
    print(f"{passed} on {device_name(device)}, torch {torch.__version__}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"device": device_name(device), "torch": torch.__version__, "impls": impls,
                  "failed": len(failed), "checks": [asdict(check) for check in found]}  # fmt: skip
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
