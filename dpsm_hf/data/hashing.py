"""Hashes of token rows and texts, used in place of random numbers.

A choice made by a hash depends on no generator's state, so the order of the data, the number of processes and resuming
do not change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Hashes lie in [0, 2**32).
BITS = 32
MASK = 2**BITS - 1
# Multipliers of the public-domain function lowbias32 (C. Wellons, hash-prospector). The second is written modulo 2**32
# as a negative number, so that products fit into an int64.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def mix(value: Any) -> Any:
    """Return a hash in [0, 2**32) of a number, or int64 tensor of numbers, in that range; no two collide."""
    value = ((value ^ (value >> 16)) * _FIRST) & MASK
    value = ((value ^ (value >> 15)) * _SECOND) & MASK
    return value ^ (value >> 16)


def combine(state: Any, *values: Any) -> Any:
    """Return the hash of a sequence of numbers; sequences that differ only in the last one never collide.

    Args:
        state: the hash to begin with, in [0, 2**32), or a tensor of hashes.
        values: integers in [0, 2**32), or int64 tensors that broadcast with ``state``.
    """
    for value in values:
        state = mix((mix(state) + value) & MASK)
    return state


def row_hash(tokens: Tensor, kept: Tensor, salt: int = 0) -> Tensor:
    """Hash the kept tokens of each row in order; padding on either side does not change the hash.

    Args:
        tokens: int64 ``[B, T]``.
        kept: bool ``[B, T]``.
        salt: different salts give independent hashes.

    Returns:
        int64 ``[B]`` in [0, 2**32).
    """
    place = kept.cumsum(-1)
    each = combine(salt & MASK, torch.where(kept, tokens, 0), place)
    # places count the kept tokens only and the sum has no order, so padding changes nothing
    total = torch.where(kept, each, 0).sum(-1) & MASK
    hashed: Tensor = combine(total, kept.sum(-1))
    return hashed


def text_hash(texts: Iterable[str | None], salt: str) -> int:
    """Return a 64-bit hash of texts, the same on every machine and in every version of Python.

    Args:
        texts: the texts of one example; None counts as empty.
        salt: different salts give independent hashes.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=8)
    for text in texts:
        encoded = (text or "").encode("utf-8", "surrogatepass")
        # each text is preceded by its length, so that ("ab", "c") differs from ("a", "bc")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")
