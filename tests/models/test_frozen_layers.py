"""Freezing the lower layers of real model classes, and forwards that take what these put out ready-made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    set_seed,
)

from dpsm_hf.models.frozen_layers import FrozenLayers, FrozenLayersError, decoder_layers

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**LLAMA, tie_word_embeddings=True, use_sliding_window=False),
    "mistral": MistralConfig(**LLAMA, sliding_window=4),
    "gemma2": Gemma2Config(**LLAMA, head_dim=16, sliding_window=4),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1),
    "phi": PhiConfig(**LLAMA),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=32),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=2, n_positions=32),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=32, pad_token_id=1),
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=2),
    "falcon": FalconConfig(**SIZES, alibi=False),
}


def make(config: PreTrainedConfig) -> Any:
    set_seed(0)
    return AutoModelForCausalLM.from_config(config)


def a_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:], mask[2, :2] = 0, 0
    return {"input_ids": torch.randint(3, 97, (3, 9), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("number", [1, 2])
def test_a_forward_from_ready_states_gives_the_model_s_own_logits_and_gradients(name: str, number: int) -> None:
    model, batch = make(CONFIGS[name]), a_batch()
    model.eval()
    layers = FrozenLayers(model, number)
    states = layers.outputs(batch)
    assert states.shape == (3, 9, 32)
    layers.check(batch, states)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    results = []
    called = []
    list_of_layers = decoder_layers(model)[1]
    inner = next(iter(list_of_layers[0].children()))
    handle = inner.register_forward_hook(lambda *_: called.append(1))
    for ready in (False, True):
        if ready:
            called.clear()
            with layers.skipped(states):
                logits = model(**batch).logits
            assert not called
        else:
            logits = model(**batch).logits
            assert called
        logits[batch["attention_mask"].bool()].square().mean().backward()
        results.append((logits.detach(), {key: value.grad for key, value in trained.items()}))
        model.zero_grad()
    handle.remove()
    (whole, gradients), (fed, own) = results
    real = batch["attention_mask"].bool()
    assert torch.equal(whole[real], fed[real])
    for key, gradient in gradients.items():
        assert (gradient is None) == (own[key] is None)
        assert gradient is None or torch.equal(gradient, own[key]), key
    assert "forward" not in vars(list_of_layers[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_and_lower_layers_are_frozen_and_all_above_is_trained(name: str) -> None:
    model = make(CONFIGS[name])
    path, layers = decoder_layers(model)
    assert len(layers) == 3
    FrozenLayers(model, 2)
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for key, parameter in model.named_parameters():
        below = key.startswith((f"{path}.0.", f"{path}.1.")) or id(parameter) in embeddings
        below |= any(part in key for part in ("wpe", "embed_positions", "embeddings_layernorm", "project_in"))
        assert parameter.requires_grad is not below, key


def test_all_layers_can_be_frozen_and_a_separate_head_is_still_trained() -> None:
    model = make(CONFIGS["llama"])
    layers = FrozenLayers(model, 3)
    layers.check(a_batch(), layers.outputs(a_batch()))
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {"model.norm.weight", "lm_head.weight"}


def test_dropout_of_the_frozen_part_is_off_in_training_and_that_above_is_on() -> None:
    model = make(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, embd_pdrop=0.5, resid_pdrop=0.5))
    layers, batch = FrozenLayers(model, 1), a_batch()
    assert layers.has_dropout()
    model.train()
    states: list[torch.Tensor] = []
    block = model.transformer.h[0].register_forward_hook(lambda *arguments: states.append(arguments[-1]))
    with layers.evaluating():
        one, two = (model(**batch).logits for _ in range(2))
    block.remove()
    assert torch.equal(*states)
    assert not torch.equal(one, two)
    assert all(module.training for module in model.modules())


def test_the_digest_tells_weights_number_and_configuration_apart() -> None:
    model = make(CONFIGS["llama"])
    first = FrozenLayers(model, 2)
    digest, changes = first.digest(), first.changes()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(1)  # above
    assert (first.digest(), first.changes()) == (digest, changes)
    assert FrozenLayers(make(CONFIGS["llama"]), 2).digest() == digest
    assert FrozenLayers(make(CONFIGS["llama"]), 1).digest() != digest
    other = FrozenLayers(make(LlamaConfig(**LLAMA, tie_word_embeddings=False, rms_norm_eps=1e-3)), 2)
    assert other.digest() != digest
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] += 1
    assert first.digest() != digest
    assert first.changes() != changes


def refusal(model: Any, number: int = 1) -> str:
    with pytest.raises(FrozenLayersError) as caught:
        FrozenLayers(model, number)
    return str(caught.value)


def test_refusals_name_the_model_and_the_reason() -> None:
    assert "has 3 layers; freeze 1 to 3" in refusal(make(CONFIGS["llama"]), 4)
    assert "has 3 layers" in refusal(make(CONFIGS["llama"]), 0)
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                   decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2)
    )  # fmt: skip
    assert "BartForConditionalGeneration is an encoder-decoder" in refusal(bart)
    jamba = JambaConfig(**{**LLAMA, "num_hidden_layers": 4}, attn_layer_period=2, attn_layer_offset=1,
                        expert_layer_period=2, expert_layer_offset=1, num_experts=2, use_mamba_kernels=False,
                        mamba_d_state=4, mamba_dt_rank=4)  # fmt: skip
    assert "are of several classes (JambaAttentionDecoderLayer, JambaMambaDecoderLayer)" in refusal(make(jamba))
    dropping = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, max_position_embeddings=32)
    assert "at random (layerdrop=0.5)" in refusal(make(dropping))
    assert "has no list of layers" in refusal(torch.nn.Linear(2, 2))


def test_adapters_are_taken_above_the_frozen_layers_alone() -> None:
    low = get_peft_model(make(CONFIGS["llama"]), LoraConfig(r=2, target_modules=["q_proj"]))
    assert "layers.0.self_attn.q_proj.lora_A.default.weight, which is in or below the 2 frozen" in refusal(low, 2)
    prompt = get_peft_model(
        make(CONFIGS["llama"]), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )  # fmt: skip
    assert "prompt_encoder" in refusal(prompt)
    high = get_peft_model(
        make(CONFIGS["llama"]), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2])
    )  # fmt: skip
    before = {key for key, parameter in high.named_parameters() if parameter.requires_grad}
    layers = FrozenLayers(high, 2)
    assert {key for key, parameter in high.named_parameters() if parameter.requires_grad} == before != set()
    assert layers.digest() == FrozenLayers(make(CONFIGS["llama"]), 2).digest()


def test_states_of_another_batch_and_decisions_of_lower_experts_are_noticed() -> None:
    layers, batch = FrozenLayers(make(CONFIGS["llama"]), 2), a_batch()
    states = layers.outputs(batch)
    with pytest.raises(FrozenLayersError, match="states that come of kept outputs .* differ"):
        layers.check(batch, states.flip(0))
    slightly = states.clone()
    slightly[0, 3] *= 1.001
    with pytest.raises(FrozenLayersError, match="differ"):
        layers.check(batch, slightly)
    padded = states.clone()
    padded[1, 6:], padded[2, :2] = 0, 0
    layers.check(batch, padded)
    experts = FrozenLayers(
        make(MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)), 1
    )
    with pytest.raises(FrozenLayersError, match="output_router_logits"):
        experts.check(batch, experts.outputs(batch))
    with pytest.raises(FrozenLayersError, match="puts positions before the text"), layers.skipped(states[:, :4]):
        layers.core(**batch)
