"""The number of bytes of text in each token, for the metric bits per byte."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor


def token_bytes(tokenizer: Any) -> Tensor | None:
    """Return the length in bytes of each token's text, int64 ``[V]``; None if it is not fixed for each token.

    It is fixed in byte-level vocabularies (GPT-2, Llama 3, Qwen, RoBERTa, BART), where each character of a token
    stands for one byte. SentencePiece adds and drops spaces at the edges of texts, so its tokens do not add up to the
    text. Special tokens have 0 bytes. If the tokenizer normalises text, the bytes are those of the normalised text.

    Args:
        tokenizer: a fast tokenizer of Transformers; for any other, and for None, the result is None.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part]
    if "ByteLevel" not in kinds:
        return None
    alphabet = set(ByteLevel.alphabet())
    added = tokenizer.added_tokens_decoder
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    lengths = torch.zeros(max(vocabulary.values(), default=0) + 1, dtype=torch.int64)
    for token, index in vocabulary.items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif set(token) <= alphabet:
            lengths[index] = len(token)
        else:
            return None
    return lengths
