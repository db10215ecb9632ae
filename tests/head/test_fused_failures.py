"""What the fused head must notice, and what it must survive: each of these once gave wrong numbers or a crash."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from dpsm_hf import DPSMTrainer, linear_scoring_loss
from dpsm_hf.head.model_head import FusedHead, FusedHeadError, ScoringRequest
from dpsm_hf.rules.scoring_rules import Objective
from tests import cases
from tests.tiny import VOCAB, make_model


def request(labels: Tensor) -> ScoringRequest:
    return ScoringRequest(labels, "shifted", Objective("ce"), 10)


def ids() -> Tensor:
    return torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))


def score(model: nn.Module, head: FusedHead | None = None) -> Any:
    return (head or FusedHead(model))(model, {"input_ids": ids()}, request(ids()))


class _Behind(LlamaForCausalLM):
    """A Llama that does something to its logits."""

    def change(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def behind(change: Any) -> nn.Module:
    model = make_model("llama")
    model.__class__ = type("Behind", (_Behind,), {"change": change})
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_factor_is_noticed_in_every_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(FusedHeadError, match="not known here"):
        score(behind(lambda self, logits: logits * 0.99).to(dtype))
    score(make_model("llama").to(dtype))


def test_a_masked_entry_does_not_switch_the_check_off() -> None:
    model = behind(lambda self, logits: logits / 2)
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCAB))
    model.lm_head.bias.data[5] = float("-inf")
    with pytest.raises(FusedHeadError, match="not known here"):
        score(model)


def test_something_trainable_behind_the_head_is_noticed_while_it_does_nothing() -> None:
    model = behind(lambda self, logits: logits * self.temperature)
    model.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(FusedHeadError, match="trainable behind"):
        score(model)


def test_a_weight_that_the_head_does_not_own_is_noticed() -> None:
    class Tied(nn.Module):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.tied = [embedding]  # a list hides it from parameters()

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.tied[0].weight.t()

    model = make_model("llama")
    model.lm_head = Tied(model.model.embed_tokens)
    with pytest.raises(FusedHeadError, match="not among its parameters"):
        score(model)


def test_training_is_checked_though_evaluation_was() -> None:
    model = behind(lambda self, logits: logits * 2 if self.training else logits)
    head = FusedHead(model)
    model.eval()
    score(model, head)
    model.train()
    with pytest.raises(FusedHeadError, match="not known here"):
        score(model, head)


def test_a_model_may_look_at_its_last_logit_at_every_batch() -> None:
    model = behind(lambda self, logits: logits - 0 * logits[:, -1:].detach().amax())
    head = FusedHead(model)
    losses = [score(model, head).loss.item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


def test_a_subclass_that_reads_logits_evaluates() -> None:
    class Reads(DPSMTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            assert outputs.logits.shape[-1] == VOCAB
            return (loss, outputs) if return_outputs else loss

    trainer = cases.build("llama", max_steps=1, prediction_loss_only=True)
    trainer.__class__ = Reads
    trainer.train()
    assert trainer.evaluate()["eval_nll"] > 0


def test_another_model_is_scored_from_its_logits() -> None:
    trainer, teacher = (
        cases.build("llama", max_steps=1, scoring_rule="ce", fused_head="on"),
        make_model("llama", seed=2),
    )
    batch = {"input_ids": ids(), "labels": ids()}
    trainer.train()
    own, other = (float(trainer.compute_loss(model, dict(batch))) for model in (trainer.model, teacher))
    expected = float(teacher(**batch).loss)
    assert other == pytest.approx(expected, rel=1e-5) and own != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_bad_batch_is_not_blamed_on_the_head(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer = cases.build("llama", max_steps=1, scoring_rule="ce", fused_head=mode)
    with caplog.at_level(logging.WARNING), pytest.raises(IndexError):
        trainer.compute_loss(trainer.model, {"input_ids": ids() + VOCAB, "labels": ids()})
    assert "cannot be scored" not in caplog.text
    assert not trainer._scorer.fell_back
    trainer.compute_loss(trainer.model, {"input_ids": ids(), "labels": ids()})
    assert trainer._scorer.head is not None and trainer._scorer.head.checked


def test_out_of_memory_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full logits would need more still; accelerate's search for a batch size waits for this very error."""
    trainer = cases.build("llama", max_steps=1, scoring_rule="ce")

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(FusedHead, "__call__", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.compute_loss(trainer.model, {"input_ids": ids(), "labels": ids()})
    assert not trainer._scorer.fell_back


def test_falling_back_draws_the_same_dropout() -> None:
    def halve(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits / 2  # scores have no logits: the attempt fails after it has drawn
        return output

    losses = []
    for mode in ("auto", "off"):
        trainer = cases.build("llama", max_steps=3, fused_head=mode, dropout=0.3, scoring_rule="ce")
        trainer.model.register_forward_hook(halve)
        trainer.train()
        assert trainer._scorer.fell_back == (mode == "auto")
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_two_threads_leave_the_model_as_it_was() -> None:
    model = make_model("llama")
    head, failures = FusedHead(model), []

    def work() -> None:
        try:
            for _ in range(20):
                score(model, head)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_large_weights_do_not_overflow_float16(reduction: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (16 * torch.randn(123, 16, generator=generator)).half()
    hidden = (torch.randn(20, 16, generator=generator) / 16).half()
    labels = torch.randint(0, 123, (20,), generator=generator)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        h = hidden.detach().to(dtype).clone().requires_grad_()
        scores = linear_scoring_loss(h, weight.to(dtype), labels, scoring_rule="ce", reduction=reduction)
        scores.loss.sum().backward()
        gradients.append(h.grad.double())
    assert (gradients[0] - gradients[1]).abs().max() <= 4e-3 * gradients[1].abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": torch.tensor(7.0)}, "lies outside"),
        ({"alpha": torch.zeros(3)}, "0-d tensor"),
        ({"chunk_tokens": 2.5}, "whole number"),
        ({"num_items_in_batch": -3}, "one whole number"),
        ({"num_items_in_batch": torch.tensor([5, 5])}, "one whole number"),
        ({"logit_softcap": float("inf")}, "positive and finite"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, "must be numbers"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_scoring_loss(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64), **options)
