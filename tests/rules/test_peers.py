"""The rules of other packages as those define them: their own code where it is installed, else its definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from dpsm_hf import DPSMConfig, DPSMTrainer, Objective, score_tokens
from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from tests.tiny import make_model

V = 97


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, V, generator=generator)
    labels = torch.randint(V, (64,), generator=generator)
    labels[:32] = logits[:32].argmax(-1)
    labels[::7] = -100
    return logits.requires_grad_(), labels


def ours(objective: Objective) -> tuple[Tensor, Tensor]:
    logits, labels = batch()
    loss = score_tokens(logits, labels, objective).loss
    assert loss is not None
    total = loss.sum() / (labels != -100).sum()
    return total.detach(), torch.autograd.grad(total, logits)[0]


def entropy_adaptive(scale: Any) -> tuple[Tensor, Tensor]:
    """EAFT by its definition: the loss of each token times a function of the entropy of its 20 largest logits."""
    logits, labels = batch()
    kept = labels != -100
    with torch.no_grad():
        shares = logits[kept].sort(descending=True).values[:, :20].softmax(-1)
        weight = scale(-(shares * (shares + 1e-10).log()).sum(-1))
    total = (weight * F.cross_entropy(logits[kept], labels[kept], reduction="none")).mean()
    return total.detach(), torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        pytest.param({}, lambda entropy: entropy / 3.0, id="LLaMA-Factory"),
        pytest.param({"eaft_alpha": 2.0}, lambda entropy: (entropy / 3.0) ** 2, id="LLaMA-Factory, alpha 2"),
        pytest.param({"eaft_divisor": 1.0}, lambda entropy: entropy, id="axolotl at first"),
        pytest.param({"eaft_divisor": math.log(20)}, lambda entropy: entropy / math.log(20), id="axolotl now"),
    ],
)
def test_eaft(options: dict[str, float], scale: Any) -> None:
    for found, expected in zip(ours(Objective("eaft", **options)), entropy_adaptive(scale), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_dft_is_that_of_trl(tmp_path: Path) -> None:
    """Loss and gradient norm of a training step of TRL's own trainer with ``loss_type="dft"``."""
    trl = pytest.importorskip("trl")
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in torch.randint(2, 30, (4, 16)).tolist()])
    shared: dict[str, Any] = dict(
        max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=4,
        output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    entries = []
    for kind in (trl.SFTTrainer, DPSMTrainer):
        model = make_model("llama")
        model.get_output_embeddings().weight.data.mul_(20)  # so that probabilities differ
        if kind is DPSMTrainer:
            trainer = kind(model, DPSMConfig(scoring_rule="dft", **shared), train_dataset=rows)
        else:
            args = trl.SFTConfig(loss_type="dft", dataset_kwargs={"skip_prepare_dataset": True}, **shared)
            tokenizer = train_bpe_tokenizer(["a few words to make a tokenizer of"] * 4, 300)
            trainer = kind(model, args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        entries.append(trainer.state.log_history[0])
    theirs, found = entries
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(theirs[key], rel=1e-6), key
