"""Tiny models built from configs and token data for them: real classes, random weights, milliseconds a step."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

VOCAB = 97
LENGTH = 12
SEQ2SEQ = ("bart", "t5", "pegasus")
#: Llamas with LoRA, LoRA on the output layer too, DoRA, LoRA beside an output layer that is trained whole, and prompt
#: tuning.
ADAPTED = ("llama_lora", "llama_head_lora", "llama_dora", "llama_saved_head", "llama_prompt")


def make_model(name: str, dropout: float = 0.0, seed: int = 1) -> nn.Module:
    """Return gpt2, llama, bart, t5, pegasus, or a llama of `ADAPTED`.

    Always with the same weights for the same seed.
    """
    set_seed(seed)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    bart = dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
        dropout=dropout, attention_dropout=0.0, activation_dropout=0.0, **special,
    )  # fmt: skip
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=dropout,
                       embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=2)
        )  # fmt: skip
    if name == "llama" or name in ADAPTED:
        llama = LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=32, attention_dropout=dropout, **special)
        )  # fmt: skip
        return llama if name == "llama" else _adapted(llama, name, dropout)
    if name == "bart":
        return BartForConditionalGeneration(BartConfig(**bart, decoder_start_token_id=2, forced_eos_token_id=None))
    if name == "pegasus":
        return PegasusForConditionalGeneration(PegasusConfig(**bart, decoder_start_token_id=1))
    if name == "t5":
        config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                          dropout_rate=dropout, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
        return T5ForConditionalGeneration(config)
    raise ValueError(name)


def _adapted(llama: nn.Module, name: str, dropout: float) -> nn.Module:
    lora: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    if name == "llama_lora":
        return get_peft_model(llama, LoraConfig(lora_dropout=dropout, **lora))
    configs: dict[str, Any] = {
        "llama_head_lora": LoraConfig(**{**lora, "target_modules": ["q_proj", "lm_head"]}),
        "llama_dora": LoraConfig(**lora, use_dora=True),
        "llama_saved_head": LoraConfig(**lora, modules_to_save=["lm_head"]),
        "llama_prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    model = get_peft_model(llama, configs[name])
    # random in all its parts, or the first gradient of one of them would be zero
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_data(name: str, rows: int = 16, seed: int = 0) -> Dataset:
    """Return rows of token ids; labels have different numbers of scored tokens, as after padding."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    examples: list[dict[str, Any]] = []
    for i in range(rows):
        source, scored = ids(LENGTH), 3 + (5 * i) % (LENGTH - 3)
        if name in SEQ2SEQ:
            labels = ids(scored) + [-100] * (LENGTH - scored)
        else:
            labels = source[:scored] + [-100] * (LENGTH - scored)
        examples.append({"input_ids": source, "attention_mask": [1] * LENGTH, "labels": labels})
    return Dataset.from_list(examples)
