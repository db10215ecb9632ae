"""Bytes of tokens with real tokenizers: those of a text's tokens add up to the length of the text."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpsm_hf import TokenCalibration
from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.models.token_bytes import token_bytes

TEXTS = (
    "The quick brown fox.",
    "  two spaces, a tab\tand\n\na blank line \r\n",
    "naïve façade — “quoted” … €5",
    "日本語のテキスト и кириллица عربى",
    "👩‍👩‍👧‍👦 family 🇫🇷 flag 👍🏽 é (e + accent)",
    "\x00\x07\x7f\u200b\ufeff\U0010ffff",
    "<s> text that looks like </s> special <pad> tokens",
    "def f(x):\n    return x  # 100%",
    "",
)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_bpe_tokenizer(TEXTS * 3, 420, sequence_template=True)


def length_of(tokenizer: Any, text: str, lengths: torch.Tensor | None = None, **options: Any) -> int:
    lengths = token_bytes(tokenizer) if lengths is None else lengths
    assert lengths is not None and lengths.dtype == torch.int64
    ids = tokenizer(text, **options)["input_ids"]
    return int(lengths[torch.tensor(ids, dtype=torch.int64)].sum())


def without_special(tokenizer: Any, text: str) -> str:
    for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        text = text.replace(token, "")
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_a_trained_tokenizer(text: str, trained: PreTrainedTokenizerFast) -> None:
    expected = len(without_special(trained, text).encode())
    assert length_of(trained, text, add_special_tokens=False) == expected
    assert length_of(trained, text) == expected, "<s> and </s> around a text are no text"


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_published_tokenizers(name: str, real_tokenizer: Callable[[str], str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer(name))
    lengths = token_bytes(tokenizer)
    for text in TEXTS:
        expected = len(without_special(tokenizer, text).encode())
        assert length_of(tokenizer, text, lengths) == expected, text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == without_special(tokenizer, text)


def test_on_real_text(real_data: Callable[..., Any], real_tokenizer: Callable[[str], str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer("gpt2"))
    with gzip.open(real_data("gutenberg", "emma_158.txt.gz"), "rt", encoding="utf-8") as file:
        text = file.read()[10_000:110_000]
    assert len(text) == 100_000 and length_of(tokenizer, text) == len(text.encode())


def test_sentencepiece_cannot_be_told(real_tokenizer: Callable[[str], str]) -> None:
    assert token_bytes(AutoTokenizer.from_pretrained(real_tokenizer("pegasus"))) is None


def test_added_tokens(trained: PreTrainedTokenizerFast) -> None:
    tokenizer = train_bpe_tokenizer(TEXTS, 420)
    tokenizer.add_tokens(["→verb", AddedToken("Größe", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    lengths = token_bytes(tokenizer)
    assert lengths is not None and len(lengths) == len(tokenizer)
    text = "a →verb of Größe"
    assert length_of(tokenizer, text) == len(text.encode())
    assert len(tokenizer.tokenize("→verb")) == len(tokenizer.tokenize("Größe")) == 1
    assert length_of(tokenizer, "<|user|>" + text + tokenizer.eos_token) == len(text.encode())
    assert lengths[tokenizer.convert_tokens_to_ids("<|user|>")] == 0
    assert not lengths[tokenizer.all_special_ids].any()


def test_a_decoder_that_is_a_sequence() -> None:
    backend = Tokenizer.from_str(train_bpe_tokenizer(TEXTS, 420).backend_tokenizer.to_str())
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert length_of(tokenizer, TEXTS[3]) == len(TEXTS[3].encode())


def test_a_normalizer_is_counted_as_normalised() -> None:
    backend = Tokenizer.from_str(train_bpe_tokenizer(TEXTS, 420).backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert length_of(tokenizer, "e\u0301") == len("é".encode()) == 2


def test_tokenizers_whose_tokens_are_not_bytes() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words)) is None
    # says it is byte-level, but has a token that no byte spells
    odd = Tokenizer(models.WordLevel({"a": 0, "日": 1}, unk_token="a"))
    odd.decoder = decoders.ByteLevel()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=odd)) is None
    assert token_bytes(None) is None
    assert token_bytes(object()) is None


def test_ids_with_gaps() -> None:
    gaps = Tokenizer(models.WordLevel({"a": 0, "Ġb": 5}, unk_token="a"))
    gaps.decoder = decoders.ByteLevel()
    lengths = token_bytes(PreTrainedTokenizerFast(tokenizer_object=gaps))
    assert lengths is not None and lengths.tolist() == [1, 0, 0, 0, 0, 2]


def test_bits_per_byte_of_a_uniform_model(trained: PreTrainedTokenizerFast) -> None:
    # by hand: every token costs log2 V bits, over the bytes of the text
    lengths = token_bytes(trained)
    assert lengths is not None
    ids = torch.tensor(trained(TEXTS[3], add_special_tokens=False)["input_ids"])
    number, vocab = len(ids), len(trained)
    calibration = TokenCalibration()
    calibration.update(
        confidence=torch.full((number,), 1 / vocab, dtype=torch.float64),
        correct=torch.zeros(number),
        nll=torch.full((number,), vocab, dtype=torch.float64).log(),
        label_bytes=lengths[ids],
    )
    expected = number * torch.tensor(vocab, dtype=torch.float64).log2() / len(TEXTS[3].encode())
    assert calibration.compute()["bits_per_byte"] == pytest.approx(float(expected), rel=1e-12)
