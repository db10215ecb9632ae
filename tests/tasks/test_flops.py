"""Floating-point operations on a copy without numbers: equal to what a real step does, and nothing is touched."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpsm_hf.tasks.flops import model_flops
from tests.tiny import LENGTH, VOCAB, make_data, make_model


def batch(name: str, rows: int) -> dict[str, torch.Tensor]:
    data = make_data(name, rows)
    return {column: torch.tensor(data[column]) for column in data.column_names}


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_lora", "bart", "t5"])
def test_equal_to_a_real_step(name: str) -> None:
    model = make_model(name, dropout=0.1)
    random_state = torch.get_rng_state()
    weights = [p.detach().clone() for p in model.parameters()]
    found = model_flops(model, [batch(name, 4), batch(name, 2), batch(name, 4)])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    core = model.get_base_model() if name == "llama_lora" else model
    core.set_attn_implementation("eager")
    real = []
    for rows in (4, 2):
        with FlopCounterMode(display=False) as counter:
            model(**batch(name, rows)).loss.backward()
        real.append(counter.get_total_flops())
    assert found == (2 * real[0] + real[1]) / 3


def test_the_formula_of_a_decoder() -> None:
    """6 operations a token and weight of the products, the output layer among them, and 12 L d T² of attention."""
    model = make_model("gpt2")
    model.gradient_checkpointing_enable()  # a second forward is no work on the model
    layers, width, rows = 2, 32, 4
    weights = layers * 12 * width**2 + VOCAB * width
    attention = 12 * layers * width * LENGTH**2 * rows
    assert model_flops(model, [batch("gpt2", rows)]) == 6 * weights * rows * LENGTH + attention


def test_what_cannot_be_counted_is_not_measured() -> None:
    model = make_model("gpt2")
    forward = model.transformer.forward

    def looks(self: object, *args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        assert output[0].detach().sum().item() != 0  # a question to the numbers
        return output

    model.transformer.__class__ = type("Looks", (type(model.transformer),), {"forward": looks})
    assert model_flops(model, [batch("gpt2", 2)]) is None
    assert model_flops(make_model("gpt2"), []) is None
