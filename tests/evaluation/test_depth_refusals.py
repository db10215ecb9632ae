"""Models whose layers cannot be read: what is not known is refused, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dpsm_hf.evaluation.depth import DepthReader, DepthReaderError
from tests.evaluation.depth_models import LAYERS, LLAMA, hooks, make, make_batch
from tests.tiny import VOCAB


class Odd(PreTrainedModel):
    """A language model whose way from the last layer to the logits can be made odd."""

    config_class = LlamaConfig

    def __init__(self, odd: str = "") -> None:
        super().__init__(LlamaConfig(**LLAMA))
        torch.manual_seed(1)
        self.odd = odd
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(LAYERS))
        self.norm, self.lm_head = nn.LayerNorm(16), nn.Linear(16, VOCAB)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> Any:
        h = self.embed(input_ids)
        states = [h]
        for block in self.blocks:
            h = h + 0.5 * block(h) if self.odd == "residual outside" else block(h)
            states.append(h)
        h = F.rms_norm(h, (16,)) if self.odd == "norm without a module" else self.norm(h)
        if self.odd == "function":
            h = torch.tanh(h)
        if self.odd == "three":
            h = 3 * h
        if self.odd == "raises":
            raise RuntimeError("boom")
        if self.odd == "no head call":
            logits = h @ self.lm_head.weight.t()
        else:
            logits = self.lm_head(h)
        if self.odd == "twice":
            logits = logits + self.lm_head(h)
        if self.odd == "bias":
            logits = logits + torch.linspace(0, 1, VOCAB)
        if self.odd == "tiny bias":  # too little to change the most likely of a few tokens
            logits = logits + torch.linspace(0, 1e-4, VOCAB)
        if self.odd == "mask":
            logits = logits.index_fill(-1, torch.arange(9), -torch.inf)
        if self.odd == "narrow":
            logits = logits[..., :-1]
        states = {"no states": None, "too few": states[:-1]}.get(self.odd, states)
        return CausalLMOutput(logits=logits, hidden_states=None if states is None else tuple(states))


@pytest.mark.parametrize("odd", ["", "three"])
def test_an_unknown_model_with_the_usual_interface_is_read(odd: str) -> None:
    model = Odd(odd)
    ids = torch.randint(3, VOCAB, (3, 5))
    found = DepthReader(model).depths({"input_ids": ids}, ids)
    output = model(ids, output_hidden_states=True)
    factor = 3 if odd else 1
    top = [model.lm_head(factor * model.norm(state)).argmax(-1) for state in output.hidden_states[:-1]]
    top = torch.stack([*top, output.logits.argmax(-1)])
    assert found.tolist() == (LAYERS + 1 - (top == top[-1]).flip(0).cumprod(0).sum(0)).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("residual outside", "between its last layer and its output layer"),
        ("function", "LayerNorm and a factor of .* leave a difference"),
        ("no head call", "without calling its output layer"),
        ("twice", "more than once"),
        ("norm without a module", "no module and a factor of .* leave a difference"),
        ("bias", "does something to its logits"),
        ("tiny bias", "does something to its logits"),
        ("mask", "does something to its logits"),
        ("narrow", r"turns the output of its head \(1, .*97\) into \(1, .*96\)"),
        ("no states", "returns no hidden states"),
        ("too few", f"expected {LAYERS + 1}"),
    ],
)
def test_what_is_not_known_is_refused(odd: str, message: str) -> None:
    model = Odd(odd).train()
    ids = torch.randint(3, VOCAB, (3, 5))
    reader = DepthReader(model)
    for _ in range(2):  # nothing is taken for checked by the failure
        with pytest.raises(DepthReaderError, match=message):
            reader.depths({"input_ids": ids}, ids)
    assert hooks(model) == [] and all(module.training for module in model.modules())


def test_a_norm_is_not_taken_for_a_factor_where_a_single_token_is_scored() -> None:
    ids = torch.randint(3, VOCAB, (3, 5))
    targets = torch.full_like(ids, -100)
    targets[1, 2] = ids[1, 2]
    with pytest.raises(DepthReaderError, match="leave a difference"):
        DepthReader(Odd("norm without a module")).depths({"input_ids": ids}, targets)


def test_a_model_with_a_new_head_is_looked_at_again() -> None:
    model = Odd()
    ids = torch.randint(3, VOCAB, (3, 5))
    reader = DepthReader(model)
    reader.depths({"input_ids": ids}, ids)
    model.odd, model.lm_head = "bias", nn.Linear(16, VOCAB)
    with pytest.raises(DepthReaderError, match="does something to its logits"):
        reader.depths({"input_ids": ids}, ids)


def test_an_error_of_the_model_leaves_no_hook_and_no_mode_behind() -> None:
    model = Odd("raises").train()
    ids = torch.randint(3, VOCAB, (3, 5))
    reader = DepthReader(model)
    with pytest.raises(RuntimeError, match="boom"):
        reader.depths({"input_ids": ids}, ids)
    assert hooks(model) == [] and all(module.training for module in model.modules())
    model.odd = ""
    assert reader.depths({"input_ids": ids}, ids).shape == (15,)


class Bare(nn.Module):
    def __init__(self, head: bool = True, config: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.config = config
        if head:
            self.lm_head = nn.Linear(8, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.embed(input_ids))


class WithStates(Bare):
    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> Tensor:
        return self.lm_head(self.embed(input_ids))


def test_models_without_the_interface_are_refused_at_once() -> None:
    with pytest.raises(DepthReaderError, match="Bare has no output layer"):
        DepthReader(Bare(head=False))
    with pytest.raises(DepthReaderError, match="has no output_hidden_states"):
        DepthReader(Bare())
    with pytest.raises(DepthReaderError, match="number of layers"):
        DepthReader(WithStates())
    with pytest.raises(DepthReaderError, match="returns no hidden states"):
        ids = torch.zeros(1, 2, dtype=torch.int64)
        DepthReader(WithStates(config=LlamaConfig(**LLAMA))).depths({"input_ids": ids}, ids)
    with pytest.raises(ValueError, match="chunk_rows=0"):
        DepthReader(make("gpt2"), chunk_rows=0)


def test_targets_of_another_length_are_refused() -> None:
    model = make("gpt2")
    batch, targets = make_batch(model)
    with pytest.raises(ValueError, match=r"\(6, 11\) positions, but there are 60 targets"):
        DepthReader(model).depths(batch, targets[:, 1:])
    assert hooks(model) == []
