"""Floating-point operations of a step against a count by hand, fused head and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpsm_hf import DPSMConfig, DPSMTrainer, linear_scoring_loss
from dpsm_hf.head.matmul import by_onednn
from dpsm_hf.measuring.profiling import count_flops

ROWS, LENGTH, WIDTH, LAYERS, VOCABULARY = 3, 16, 32, 2, 101


def make_step(folder: Path, attention: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=LENGTH,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
                        attn_implementation=attention)  # fmt: skip
    args = DPSMConfig(output_dir=str(folder), use_cpu=True, max_steps=10, report_to=[], **arguments)
    trainer = DPSMTrainer(model=GPT2LMHeadModel(config), args=args)
    trainer.create_optimizer()
    trainer.state.max_steps = 10
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))

    def step() -> None:
        trainer.training_step(trainer.model, {"input_ids": ids, "labels": ids}, torch.tensor(ids.numel()))
        trainer.optimizer.step()
        trainer.model.zero_grad()

    step()  # the first batch compares the head with the model's own logits
    return step


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scoring_rule", ["dpsm", "ce"])
@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_a_step_of_gpt2_by_hand(fused_head: str, scoring_rule: str, attention: str, tmp_path: Path) -> None:
    found = count_flops(make_step(tmp_path, attention, fused_head=fused_head, scoring_rule=scoring_rule))
    tokens = ROWS * LENGTH
    # forward, gradient by the input, gradient by the weight: 3 products of 2 operations for each weight and token
    blocks = 6 * tokens * 12 * WIDTH**2 * LAYERS
    # scores and their product with the values; the fused backward pass computes the scores once more
    pairs = ROWS * LENGTH**2 * WIDTH * LAYERS
    attended = (12 if attention == "eager" else 14) * pairs
    # the last token of a row has no label, and the fused head leaves it out
    scored = ROWS * (LENGTH - 1) if fused_head == "on" else tokens
    assert found.total == blocks + attended + 6 * scored * WIDTH * VOCABULARY
    assert found.total == sum(found.by_operator.values()) and "element-wise" in found.not_counted


def test_the_products_of_onednn_are_counted() -> None:
    """On some processors the fused head multiplies by an operator that torch's own counter does not know."""
    hidden = torch.randn(512, 128, requires_grad=True)
    weight = torch.randn(2048, 128, requires_grad=True)
    labels = torch.randint(2048, (512,))
    fast = by_onednn(hidden, 2048)  # which tries the operator once
    found = count_flops(lambda: linear_scoring_loss(hidden, weight, labels, alpha=0.5).loss.backward())
    assert found.total == 6 * 512 * 128 * 2048
    assert ("mkldnn._linear_pointwise" in found.by_operator) == fast


def test_a_product_into_a_wider_type_is_counted() -> None:
    """As the fused head adds up bfloat16 gradients on CUDA; shapes are enough to count."""
    left = torch.empty(64, 32, dtype=torch.bfloat16, device="meta")
    right = torch.empty(32, 16, dtype=torch.bfloat16, device="meta")
    total = torch.empty(64, 16, device="meta")

    def products() -> None:
        torch.mm(left, right, out_dtype=torch.float32)
        torch.addmm(total, left, right, out_dtype=torch.float32)

    try:
        products()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this build has no such product without CUDA: {error}")
    assert count_flops(products).total == 2 * 2 * 64 * 32 * 16
    assert count_flops(lambda: None, compiled=True).not_counted.endswith("the compiled part of the model")
