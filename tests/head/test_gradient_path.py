"""The fused head's loss waits for whoever waits for the gradient of the head's output, as ZeRO-3 does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, GraniteForCausalLM, GraniteMoeConfig

from dpsm_hf.head.gradient_path import loss_after, output_of
from dpsm_hf.head.model_head import FusedHead, FusedHeadError, ScoringRequest
from dpsm_hf.rules.scoring_rules import Objective
from tests import cases
from tests.tiny import VOCAB, make_model

DECODER: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=False,
)  # fmt: skip


def make(name: str) -> nn.Module:
    """Return a model whose head has a weight of its own."""
    torch.manual_seed(1)
    if name == "gemma2":
        return AutoModelForCausalLM.from_config(Gemma2Config(**DECODER, head_dim=16, final_logit_softcapping=4.0))
    if name == "granite":
        return AutoModelForCausalLM.from_config(GraniteConfig(**DECODER, logits_scaling=8.0))
    if name == "granite moe":  # its loss of balance is made behind the head, of what was before it
        config = GraniteMoeConfig(**DECODER, logits_scaling=8.0, num_local_experts=4, num_experts_per_tok=2,
                                  output_router_logits=True)  # fmt: skip
        return AutoModelForCausalLM.from_config(config)
    model = make_model(name)
    layer = model.get_output_embeddings()
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def steps(model: nn.Module, call: Any = None) -> list[dict[str, Tensor]]:
    """Return the gradients of two batches scored in the head: the first is checked, the other is not."""
    head, found = FusedHead(model), []
    for step in range(2):
        ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        output = head(
            model if call is None else call,
            {"input_ids": ids},
            ScoringRequest(ids, "shifted", Objective("dpsm", 0.5), 14),
        )
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "granite", "granite moe"])
def test_what_is_compiled_behind_the_head(name: str) -> None:
    torch._dynamo.reset()
    model = make(name)
    found = steps(model, torch.compile(model, backend="aot_eager"))
    for mine, theirs in zip(found, steps(model), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert (mine[key] - theirs[key]).norm() <= 1e-5 * theirs[key].norm() + 1e-8, key


class _Factor(GraniteForCausalLM):
    """A Granite with a trainable factor behind its logits, which is one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.slow
def test_something_trainable_in_what_is_compiled_behind_the_head() -> None:
    torch._dynamo.reset()
    model = make("granite")
    model.__class__ = _Factor
    model.factor = nn.Parameter(torch.ones(()))
    with pytest.raises(FusedHeadError, match="trainable behind"):
        steps(model, torch.compile(model, backend="aot_eager"))
    model.factor.requires_grad_(False)
    torch._dynamo.reset()
    steps(model, torch.compile(model, backend="aot_eager"))


@pytest.mark.parametrize("trainable", [False, True])
def test_a_bias_behind_the_head_may_be_trained(trainable: bool) -> None:
    parameters = []
    for how in ("on", "off"):
        trainer = cases.build(
            "bart", max_steps=2, scoring_rule="dpsm", alpha_schedule="constant", alpha_end=0.5, fused_head=how,
            per_device_train_batch_size=8, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        model: Any = trainer.model
        bias = torch.linspace(-1, 1, VOCAB)[None]
        if trainable:
            del model.final_logits_bias
            model.final_logits_bias = nn.Parameter(bias.clone())
        else:
            model.final_logits_bias.copy_(bias)
        trainer.train()
        parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})
    mine, theirs = parameters
    assert ("final_logits_bias" in mine) is trainable
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not trainable or not torch.allclose(mine["final_logits_bias"], bias, atol=1e-3)


def test_the_gradient_of_the_output_is_zero_and_comes_first() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    order: list[Any] = []
    loss = weight.square()
    loss.register_hook(lambda grad: order.append(("loss", float(grad))))
    output = output_of(loss, torch.full((3,), 0.1))
    output.register_hook(lambda grad: order.append(("output", grad.tolist())))
    after = loss_after(loss, torch.tanh(output[:2] * 3).to(torch.float64))
    assert after is not None and float(after.detach()) == 4.0
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
