"""The fused head's loss waits for whoever waits for the gradient of the head's output, as ZeRO-3 does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config

from dpsm_hf.fused import FusedHead, ScoringRequest
from dpsm_hf.gradient_path import loss_after, output_of
from dpsm_hf.scoring_rules import Objective
from tests.tiny import VOCAB, make_model


def make(name: str) -> nn.Module:
    """Return a model whose head has a weight of its own."""
    torch.manual_seed(1)
    if name == "gemma2":
        return AutoModelForCausalLM.from_config(
            Gemma2Config(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16,
                         num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=4.0,
                         tie_word_embeddings=False)
        )  # fmt: skip
    model = make_model(name)
    layer = model.get_output_embeddings()
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def steps(model: nn.Module, times: int = 2) -> list[dict[str, Tensor]]:
    """Return the gradients of some batches scored in the head: the first is checked, the others are not."""
    head, found = FusedHead(model), []
    for step in range(times):
        ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        output = head(model, {"input_ids": ids}, ScoringRequest(ids, "shifted", Objective("dpsm", 0.5), 14))
        assert output.loss is not None
        output.loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_weight_that_is_there_only_while_its_module_runs(name: str) -> None:
    """What ZeRO-3 does: gathered before a module's forward and before its backward, released after each."""
    expected, model = steps(make(name)), make(name)
    layer = model.get_output_embeddings()
    kept = layer.weight.detach().clone()
    events: list[str] = []

    def gather(*_: Any) -> None:
        events.append("gather")
        layer.weight.data = kept

    def release(*_: Any) -> None:
        events.append("release")
        layer.weight.data = kept.new_empty(0)

    release()
    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(release)
    layer.register_full_backward_pre_hook(gather)
    layer.weight.register_post_accumulate_grad_hook(release)
    events.clear()
    found = steps(model)
    assert events == ["gather", "release"] * 4  # forward and backward of two batches
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=0)


def test_the_gradient_of_the_output_is_zero_and_comes_first() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    order: list[Any] = []
    loss = weight.square()
    loss.register_hook(lambda grad: order.append(("loss", float(grad))))
    output = output_of(loss, torch.full((3,), 0.1))
    output.register_hook(lambda grad: order.append(("output", grad.tolist())))
    after = loss_after(loss, torch.tanh(output[:2] * 3).to(torch.float64))
    assert after is not None and float(after) == 4.0
    (3 * after).backward()
    assert order == [("output", [0.0, 0.0, 0.0]), ("loss", 3.0)]
    assert weight.grad == 12.0


def test_nothing_is_attached_where_there_is_no_graph() -> None:
    loss, values = torch.tensor(1.0), torch.zeros(2)
    output = output_of(loss, values)
    assert not output.requires_grad and output.data_ptr() != values.data_ptr()
    assert loss_after(loss, output) is loss and loss_after(None, output) is None
    assert not output_of(None, values).requires_grad
    graph = torch.tensor(1.0, requires_grad=True) * 2
    for nothing in (None, output, "logits"):
        assert loss_after(graph, nothing) is graph
