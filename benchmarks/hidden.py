"""Realistic hidden states: from a one-layer GPT-2 trained for some steps on the text that comes with Python."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpsm_hf.data.python_text import load_python_docs
from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.head.scoring_loss import linear_scoring_loss

LENGTH = 128


@functools.cache
def token_ids(entries: int = 4096) -> Tensor:
    """Return token ids of Python's own text, by a byte-level BPE of so many entries trained on it."""
    texts = load_python_docs()["train"]["text"]
    tokenizer = train_bpe_tokenizer(texts, entries)
    ids = [tokenizer(text)["input_ids"] for text in texts[:400]]
    return torch.tensor([token for document in ids for token in document])


def hidden_states(
    tokens: int, width: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states ``[tokens, width]``, the weight ``[vocabulary, width]`` and the labels of real text.

    The model has one layer of that width and ``vocabulary`` output rows, of which the text uses the first 4,096. So
    the logits have full size, and are distributed as in a model that has learned which tokens occur.
    """
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=1, n_head=max(1, width // 64), n_positions=LENGTH,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    ids = token_ids().to(device)
    # a step of a wide model takes minutes on a CPU
    steps, lines = (40, 4) if width <= 1024 else (4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(steps):
        start = (step * lines * LENGTH) % (len(ids) - lines * LENGTH - 1)
        batch = ids[start : start + lines * LENGTH].view(lines, LENGTH)
        hidden = model.transformer(batch).last_hidden_state
        linear_scoring_loss(hidden[:, :-1], model.lm_head.weight, batch[:, 1:], scoring_rule="ce").loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    rows = -(-(tokens + 1) // LENGTH)
    text = ids[-rows * LENGTH :].view(rows, LENGTH)
    with torch.no_grad():
        hidden = torch.cat([model.transformer(text[i : i + 8]).last_hidden_state for i in range(0, rows, 8)])
    labels = text.reshape(-1)[1 : tokens + 1].clone()
    weight = model.lm_head.weight.detach().to(dtype)
    return hidden.reshape(-1, width)[:tokens].to(dtype).contiguous(), weight.contiguous(), labels
