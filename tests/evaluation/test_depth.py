"""The depth of tokens against the plain computation with the logits of every layer, on real architectures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from dpsm_hf.evaluation.depth import DepthReader
from dpsm_hf.models.language_model import align_targets, core_model
from tests.evaluation.depth_models import (
    LAYERS,
    LENGTH,
    LLAMA,
    MODELS,
    all_states,
    hooks,
    llama_read,
    make,
    make_batch,
    oracle,
)

# ---- the architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_depths_are_those_of_the_logits_of_every_layer(name: str) -> None:
    model = make(name)
    reader = DepthReader(model)
    assert reader.layers == LAYERS
    seen = []
    for seed in range(3):
        batch, targets = make_batch(model, seed)
        expected = oracle(name, model, batch, targets)
        found = reader.depths(batch, targets)
        assert found.dtype == torch.int64
        assert found.tolist() == expected.tolist()
        seen += found.tolist()
    assert len(set(seen)) >= 3, f"the test tells nothing of depths {set(seen)}"
    assert hooks(model) == []


@pytest.mark.parametrize("name", MODELS)
def test_the_last_of_the_states_is_behind_the_final_norm(name: str) -> None:
    """What the reader relies on: L + 1 states, of which the last alone must not go through the norm again."""
    model = make(name)
    states, logits = all_states(model, make_batch(model)[0])
    core, read = core_model(model), MODELS[name][1]
    assert len(states) == LAYERS + 1
    captured: list[Tensor] = []
    handle = core.get_output_embeddings().register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    all_states(model, make_batch(model)[0])
    handle.remove()
    if name != "bert":  # its transform belongs to the head
        scale = 32**-0.5 if name == "t5" else 1.0
        torch.testing.assert_close(states[-1] * scale, captured[0], rtol=1e-6, atol=1e-6)
    # without any norm at the end it makes no difference
    if name not in ("bart", "opt post-norm", "bert"):
        try:
            again = read(core, states[-1])
        except RuntimeError:  # a projection has changed the width
            return
        assert not torch.allclose(again, logits, atol=1e-2)


def zero_residual_branches(model: Any, first: int) -> None:
    core = core_model(model)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            parts = name.split(".")
            number = next((int(part) for part in parts if part.isdigit()), None)
            closes = any(part in ("c_proj", "o_proj", "down_proj", "out_proj", "fc2", "o", "wo") for part in parts)
            if number is not None and number >= first and closes and "encoder" not in parts:
                parameter.zero_()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mbart", "t5", "lora"])
@pytest.mark.parametrize("last", [0, 1, 3])
def test_layers_that_add_nothing_are_not_counted(name: str, last: int) -> None:
    model = make(name)
    if name == "gemma2":  # a norm closes its branches
        for layer in model.model.layers[last:]:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                nn.init.constant_(norm.weight, -1.0)  # it multiplies by 1 + weight
    zero_residual_branches(model, last)
    batch, targets = make_batch(model)
    found = DepthReader(model).depths(batch, targets)
    assert int(found.max()) <= last
    if last == 3:
        assert int(found.max()) == last


# ---- precision, modes, wrappers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bart", "t5"])
def test_bfloat16_weights(name: str) -> None:
    model = make(name).to(torch.bfloat16)
    batch, targets = make_batch(model)
    found = DepthReader(model).depths(batch, targets)
    # products of few rows add up in another order: near ties may fall otherwise
    same = (found == oracle(name, model, batch, targets)).float().mean()
    assert same > 0.9


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_inside_autocast_and_with_a_forward_that_widens_its_outputs(name: str) -> None:
    """As accelerate prepares a model for mixed precision: autocast inside its forward, float32 outside."""
    from accelerate.utils import convert_outputs_to_fp32

    model = make(name)
    batch, targets = make_batch(model)
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(forward)
    found = DepthReader(model).depths(batch, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = oracle(name, model, batch, targets)
    assert (found == expected).float().mean() > 0.9


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model = make("gpt2").train()
    model.transformer.h[1].eval()  # frozen by hand
    model.gradient_checkpointing_enable()
    before = {name: module.training for name, module in model.named_modules()}
    batch, targets = make_batch(model)
    expected = oracle("gpt2", make("gpt2"), batch, targets)
    grad_modes: list[bool] = []
    handle = model.transformer.h[1].register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    found = DepthReader(model).depths(batch, targets)
    assert found.tolist() == expected.tolist()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(state, torch.get_rng_state())
    assert grad_modes == [False] and torch.is_grad_enabled()
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not found.requires_grad


class Parallel(nn.Module):
    """Wraps as data parallelism does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_wrapped_models(name: str) -> None:
    model = make(name)
    batch, targets = make_batch(model)
    expected = oracle(name, model, batch, targets).tolist()
    assert DepthReader(Parallel(model)).depths(batch, targets).tolist() == expected
    assert DepthReader(Parallel(torch.compile(model))).depths(batch, targets).tolist() == expected


def test_virtual_tokens_of_prompt_tuning() -> None:
    torch.manual_seed(0)
    model = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch, _ = make_batch(model)
    targets = align_targets(batch["labels"], LENGTH + 3, "shifted")
    found = DepthReader(model).depths(batch, targets)
    states, logits = all_states(model, batch)
    with torch.no_grad():
        top = torch.stack([llama_read(core_model(model), s).argmax(-1) for s in states[:-1]] + [logits.argmax(-1)])
    plain = LAYERS + 1 - (top == top[-1]).flip(0).cumprod(0).sum(0)
    assert found.tolist() == plain[targets != -100].tolist()


def test_targets_may_be_flattened_and_ignored_positions_are_not_read() -> None:
    model = make("llama")
    batch, targets = make_batch(model)
    reader = DepthReader(model)
    found = reader.depths(batch, targets)
    assert reader.depths(batch, targets.reshape(-1)).tolist() == found.tolist()
    fewer = targets.clone()
    fewer[0] = -100
    assert reader.depths(batch, fewer).tolist() == found[int((targets[0] != -100).sum()) :].tolist()


def test_a_batch_without_scored_tokens_calls_nothing_and_the_next_one_is_read() -> None:
    model = make("t5")
    batch, targets = make_batch(model)
    reader = DepthReader(model)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    none = reader.depths({**batch, "labels": torch.full_like(batch["labels"], -100)}, torch.full_like(targets, -100))
    assert none.dtype == torch.int64 and none.shape == (0,) and calls == []
    handle.remove()
    assert reader.depths(batch, targets).tolist() == oracle("t5", model, batch, targets).tolist()


def test_a_single_scored_token() -> None:
    model = make("t5")
    batch, targets = make_batch(model)
    one = torch.full_like(targets, -100)
    one[2, 1] = targets[2, 1]
    assert DepthReader(model).depths(batch, one).tolist() == oracle("t5", model, batch, one).tolist()


def test_an_adapter_that_brings_its_own_head_later_is_found() -> None:
    model = make("lora with its own norm and head")
    batch, targets = make_batch(model)
    reader = DepthReader(model)
    adapted = reader.depths(batch, targets)
    with model.disable_adapter():
        plain = reader.depths(batch, targets)
        expected = oracle("llama", model, batch, targets)
    assert plain.tolist() == expected.tolist()
    assert adapted.tolist() != plain.tolist()
    assert reader.depths(batch, targets).tolist() == adapted.tolist()


def test_broken_weights_are_left_to_those_who_look_for_them() -> None:
    """NaN logits are an error of the scores; the reader makes no second, misleading one of them."""
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias.fill_(torch.nan)
    batch, targets = make_batch(model)
    assert len(DepthReader(model).depths(batch, targets)) == int((targets != -100).sum())


# ---- memory --------------------------------------------------------------------------------------------------------


class LargestLogits(TorchDispatchMode):
    """Record the most rows of anything that is as wide as the vocabulary, but the head's own weight."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.width, self.weight, self.rows = head.out_features, head.weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wide = isinstance(result, Tensor) and result.dim() > 1 and result.shape[-1] == self.width
        if wide and result.data_ptr() != self.weight:
            self.rows = max(self.rows, math.prod(result.shape[:-1]))
        return result


@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_logits_of_a_chunk_alone_ever_exist(chunk_rows: int | None) -> None:
    torch.manual_seed(0)
    vocabulary, rows, length = 211, 40, 30  # no other size is 211
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": vocabulary, "num_hidden_layers": 2}))
    ids = torch.randint(3, vocabulary, (rows, length))
    targets = align_targets(ids, length, "shifted")
    scored = int((targets != -100).sum())
    assert scored > 4 * 256
    reader = DepthReader(model, chunk_rows=chunk_rows)
    for _ in range(2):  # the first is the one that looks around
        with LargestLogits(model.lm_head) as seen:
            found = reader.depths({"input_ids": ids, "labels": ids}, targets)
        assert len(found) == scored
        assert seen.rows == 256 if chunk_rows is None else seen.rows in (7, 8)  # up to 8 rows are compared


def test_settled_tokens_are_not_read_again() -> None:
    model = make("llama")
    batch, targets = make_batch(model)
    reader = DepthReader(model)
    depths = reader.depths(batch, targets)
    read: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: read.append(output.shape[-2]))
    reader.depths(batch, targets)
    handle.remove()
    in_forward, *readings = read
    assert in_forward <= 8
    # the final reading, one for each layer that agrees, and the first that does not
    assert sum(readings) == sum(1 + LAYERS - d + (d > 0) for d in depths.tolist())
