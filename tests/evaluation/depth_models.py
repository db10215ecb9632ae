"""Small decoders of many architectures, and the depth of their tokens by the plain computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dpsm_hf.models.language_model import align_targets, core_model, inputs_without_labels, label_alignment
from tests.tiny import VOCAB

ROWS, LENGTH, LAYERS = 6, 11, 4
SPECIAL: dict[str, Any] = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
LLAMA: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, **SPECIAL,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=2,
    max_position_embeddings=32, **SPECIAL,
)  # fmt: skip
BART: dict[str, Any] = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    decoder_start_token_id=2, forced_eos_token_id=None, **SPECIAL,
)  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=2, n_positions=32,
                                      bos_token_id=0, eos_token_id=2))  # fmt: skip


def t5(**options: Any) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=LAYERS, num_heads=2,
                 pad_token_id=1, eos_token_id=2, decoder_start_token_id=1, **options)
    )  # fmt: skip


def lora(**options: Any) -> nn.Module:
    return get_peft_model(
        LlamaForCausalLM(LlamaConfig(**LLAMA)), LoraConfig(r=4, init_lora_weights=False, lora_alpha=32, **options)
    )


def bert() -> nn.Module:
    return BertLMHeadModel(
        BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
                   intermediate_size=48, max_position_embeddings=32, is_decoder=True)
    )  # fmt: skip


Read = Callable[[Any, Tensor], Tensor]


def llama_read(m: Any, h: Tensor) -> Tensor:
    return m.lm_head(m.model.norm(h))


def gemma2_read(m: Any, h: Tensor) -> Tensor:
    return 3.0 * torch.tanh(m.lm_head(m.model.norm(h)) / 3.0)


def opt_read(m: Any, h: Tensor) -> Tensor:
    for module in (m.model.decoder.final_layer_norm, m.model.decoder.project_out):
        h = h if module is None else module(h)
    return m.lm_head(h)


# how each architecture makes logits of the output of its last layer, by its own names
MODELS: dict[str, tuple[Callable[[], Any], Read]] = {
    "gpt2": (gpt2, lambda m, h: m.lm_head(m.transformer.ln_f(h))),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), llama_read),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=16)), llama_read),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=16, final_logit_softcapping=3.0)),
        gemma2_read,
    ),
    "cohere": (
        lambda: CohereForCausalLM(CohereConfig(**LLAMA, logit_scale=0.25)),
        lambda m, h: 0.25 * llama_read(m, h),
    ),
    "phi": (
        lambda: PhiForCausalLM(PhiConfig(**LLAMA)),
        lambda m, h: m.lm_head(m.model.final_layernorm(h)),
    ),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**OPT)), opt_read),
    "opt post-norm": (lambda: OPTForCausalLM(OPTConfig(**OPT, do_layer_norm_before=False)), opt_read),
    "opt 350m": (
        lambda: OPTForCausalLM(OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16)),
        opt_read,
    ),
    "opt projected": (lambda: OPTForCausalLM(OPTConfig(**OPT, word_embed_proj_dim=16)), opt_read),
    "gpt_neox": (
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
                          num_attention_heads=2, max_position_embeddings=32)
        ),
        lambda m, h: m.get_output_embeddings()(m.gpt_neox.final_layer_norm(h)),
    ),
    "bert": (bert, lambda m, h: m.cls.predictions.decoder(m.cls.predictions.transform(h))),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**BART)),
        lambda m, h: m.lm_head(h) + m.final_logits_bias,
    ),
    "mbart": (
        lambda: MBartForConditionalGeneration(MBartConfig(**BART)),
        lambda m, h: m.lm_head(m.model.decoder.layer_norm(h)) + m.final_logits_bias,
    ),
    "pegasus": (
        lambda: PegasusForConditionalGeneration(PegasusConfig(**BART)),
        lambda m, h: m.lm_head(m.model.decoder.layer_norm(h)) + m.final_logits_bias,
    ),
    "t5": (t5, lambda m, h: m.lm_head(m.decoder.final_layer_norm(h) * 32**-0.5)),
    "t5 untied": (
        lambda: t5(tie_word_embeddings=False, scale_decoder_outputs=False),
        lambda m, h: m.lm_head(m.decoder.final_layer_norm(h)),
    ),
    "lora": (lambda: lora(target_modules=["q_proj", "v_proj"]), llama_read),
    "lora on the head": (lambda: lora(target_modules=["q_proj", "lm_head"]), llama_read),
    "lora with its own norm and head": (
        lambda: lora(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
        llama_read,
    ),
}  # fmt: skip


def make(name: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[name][0]()
    # a norm's bias is the same for every token: after each layer of a post-norm model it would decide alone
    factor, noise = (3.0, 0.02) if name.startswith("opt ") else (6.0, 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)  # layers of a fresh model change next to nothing
            else:
                parameter.add_(noise * torch.randn_like(parameter))  # a norm or bias left out is to be seen
        bias = getattr(core_model(model), "final_logits_bias", None)
        if bias is not None:
            bias.copy_(torch.randn_like(bias))
    return model


def make_batch(model: nn.Module, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, 4 + row :] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    alignment = label_alignment(model)
    assert alignment is not None
    return batch, align_targets(labels, LENGTH, alignment)


def all_states(model: Any, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what Transformers calls the hidden states, and the logits."""
    with torch.no_grad():
        output = model.eval()(**inputs_without_labels(model, batch), output_hidden_states=True)
    return output.get("decoder_hidden_states", output.get("hidden_states")), output.logits


def oracle(name: str, model: Any, batch: dict[str, Tensor], targets: Tensor) -> Tensor:
    states, logits = all_states(model, batch)
    core, read = core_model(model), MODELS[name][1]
    with torch.no_grad():
        top = [read(core, state).argmax(-1) for state in states[:-1]] + [logits.argmax(-1)]
    depths = []
    for b, t in (targets != -100).nonzero().tolist():
        readings = [int(layer[b, t]) for layer in top]
        depths.append(min(n for n in range(len(readings)) if set(readings[n:]) == {readings[-1]}))
    return torch.tensor(depths)


def hooks(model: nn.Module) -> list[tuple[str, str]]:
    """Return the hooks of a model but those of Transformers itself, which stay where it has put them."""
    return [
        (name, hook.__qualname__)
        for name, module in model.named_modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for hook in table.values()
        if "output_capturing_hook" not in hook.__qualname__
    ]
