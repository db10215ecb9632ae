"""Small models that were trained for some steps on real text and saved with their tokenizers, as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from dpsm_hf.data.python_text import load_python_docs, load_python_docstrings
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

#: Positions of the two models.
POSITIONS, SUMMARIZER_POSITIONS = 64, 128


def train(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """Take an optimizer step on each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def save_language_model(folder: Path) -> tuple[list[str], list[str]]:
    """Save a Llama with weights of its own in its head; return texts to fit on and texts to test on."""
    texts = load_python_docs()["train"]["text"][:120]
    tokenizer = train_bpe_tokenizer(texts, 600)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=False,
                    bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    )  # fmt: skip
    ids = torch.tensor([t for text in texts[:60] for t in tokenizer(text)["input_ids"]])
    blocks = ids[: len(ids) // 512 * 512].view(-1, 8, 64)[:60]
    train(model, [{"input_ids": block, "labels": block} for block in blocks])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return texts[60:90], texts[90:120]


def save_summarizer(folder: Path) -> None:
    """Save a BART, whose head is tied to its embeddings."""
    pairs = load_python_docstrings()["train"][:64]
    tokenizer = train_bpe_tokenizer([*pairs["document"], *pairs["summary"]], 600)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                   decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=end,
                   bos_token_id=end, eos_token_id=end, decoder_start_token_id=end,
                   max_position_embeddings=SUMMARIZER_POSITIONS)
    )  # fmt: skip
    rows = [(tokenizer(d)["input_ids"][:64], tokenizer(s)["input_ids"][:24]) for d, s in
            zip(pairs["document"], pairs["summary"], strict=True)]  # fmt: skip
    train(model, [{"input_ids": torch.tensor([d]), "labels": torch.tensor([s])} for d, s in rows])
    model.save_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
