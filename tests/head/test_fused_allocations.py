"""No tensor the size of all logits lives while the head is fused, watched at every operation; and training agrees."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from dpsm_hf import DPSMConfig, DPSMTrainer, linear_scoring_loss
from dpsm_hf.data.python_text import load_python_docs

V, D, SAMPLES, LENGTH, CHUNK = 5003, 32, 4, 128, 64
N = SAMPLES * LENGTH
# the row pass works on two float32 copies of some rows, which may be all rows of a chunk this small
LIMIT = 2 * CHUNK * -(-V // 64) * 64
# what is watched for stands clear of all that has to be there: the parameters
assert V * D < LIMIT / 2 and LIMIT < N * V / 3


class Watcher(TorchDispatchMode):
    """Record the largest storage, in entries, that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operation, self.count = 0, "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count += 1
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                if size > self.largest:
                    self.largest, self.operation = size, f"{func} {tuple(leaf.shape)}"
        return result


def score(dtype: torch.dtype = torch.float32, **options: Any) -> Watcher:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(V, D, dtype=dtype)
    weight.requires_grad_()
    labels = torch.randint(V, (N,))
    labels[3] = -100
    with Watcher() as watcher:
        loss = linear_scoring_loss(hidden, weight, labels, alpha=0.3, chunk_tokens=CHUNK, **options).loss
        assert loss is not None
        loss.sum().backward()
    assert hidden.grad is not None and weight.grad is not None and watcher.count > 50
    return watcher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"logit_scale": 0.5, "entropy": True, "label_smoothing": 0.1},
        {"loss_type": "spherical", "bias": torch.zeros(V)},
    ],
    ids=["mix", "none", "entropy", "bias"],
)
def test_the_head_holds_one_chunk(options: dict[str, Any], dtype: torch.dtype) -> None:
    if "bias" in options:
        options = {**options, "bias": options["bias"].to(dtype)}
    watcher = score(dtype, **options)
    assert CHUNK * V / 2 < watcher.largest <= LIMIT, watcher.operation


def test_a_softcap_needs_a_third_copy_of_a_block() -> None:
    watcher = score(logit_softcap=4.0)
    assert watcher.largest <= 1.5 * LIMIT, watcher.operation


def test_the_watcher_sees_all_logits_where_they_are() -> None:
    watcher = score(impl="reference")
    assert watcher.largest >= (N - 1) * V, watcher.operation


def make_model(name: str) -> nn.Module:
    set_seed(1)
    config = GPT2Config(
        vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    if name == "gpt2":
        return model
    return get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], fan_in_fan_out=False))


def make_trainer(tmp_path: Path, model: nn.Module, data: Dataset, **arguments: Any) -> DPSMTrainer:
    defaults: dict[str, Any] = dict(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=SAMPLES, per_device_eval_batch_size=SAMPLES,
        chunk_tokens=CHUNK, use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, alpha_warmup_steps=2,
        calibration_metrics="all",
    )  # fmt: skip
    args = DPSMConfig(**{**defaults, **arguments})
    return DPSMTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)


def random_tokens(rows: int) -> Dataset:
    ids = torch.randint(V, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "lora on the head"])
def test_training_and_evaluating_hold_one_chunk(name: str, mode: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(name), random_tokens(2 * SAMPLES), fused_head=mode)
    with Watcher() as training:
        trainer.train()
    with Watcher() as evaluating:
        metrics = trainer.evaluate()
    assert metrics["eval_tokens"] == 2 * SAMPLES * (LENGTH - 1)
    for watcher in (training, evaluating):
        assert watcher.count > 100
        if mode == "on":
            assert CHUNK * V / 2 < watcher.largest <= LIMIT, watcher.operation
        else:
            assert watcher.largest >= (N - SAMPLES) * V


@pytest.fixture(scope="module")
def english() -> Dataset:
    """Bytes of the language reference and the standard library's docstrings, in rows of 32."""
    texts: Iterable[str] = load_python_docs()["train"]["text"][:400]
    data = "\n\n".join(texts).encode()[: 32 * 800]
    rows = [list(data[i : i + 32]) for i in range(0, len(data), 32)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def test_200_steps_side_by_side(english: Dataset, tmp_path: Path) -> None:
    curves: dict[str, list[dict[str, float]]] = {}
    for mode in ("on", "off"):
        set_seed(1)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
        )
        trainer = make_trainer(
            tmp_path, model, english, fused_head=mode, max_steps=200, learning_rate=3e-3, alpha_schedule="cosine",
            alpha_warmup_steps=100, chunk_tokens=50,
        )  # fmt: skip
        trainer.train()
        curves[mode] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(curves["on"]) == 200
    for fused, plain in zip(curves["on"], curves["off"], strict=True):
        for key in ("loss", "nll", "brier"):
            assert fused[key] == pytest.approx(plain[key], abs=1e-4, rel=0), (key, fused["step"])
        assert fused["alpha"] == plain["alpha"]
    # it learned, and was not held together by standing still
    assert curves["on"][-1]["nll"] < curves["on"][0]["nll"] - 1.5
