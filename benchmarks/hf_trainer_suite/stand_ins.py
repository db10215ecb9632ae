"""A hub cache with tiny random models under the names that Transformers' Trainer tests load.

It looks like a cache that was filled online, so that nothing in Transformers has to be patched.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_REVISION = "0" * 40
_DONE = "complete"
_SENTENCES = (
    "This is a short sentence.",
    "This is a much longer sentence that will require padding.",
    "hello world",
    "The quick brown fox jumps over the lazy dog, 0123456789 times!",
    "foo bar baz, act as a Linux terminal and answer the question: what is the capital of France?",
)


def _byte_pairs() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, as of GPT-2 and Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    names: dict[str, Any] = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _word_pieces() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer, as of BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(_SENTENCES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    return transformers.BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)  # type: ignore[attr-defined]


def _pieces() -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer, as of T5."""
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


_Kind = tuple[Callable[[], PreTrainedTokenizerFast], Callable[[int], Any]]


def _kind(tokenizer: Callable[[], PreTrainedTokenizerFast], model: str, config: str, **sizes: Any) -> _Kind:
    """Return the makers of a tokenizer and of a tiny model, by their classes in Transformers."""

    def make(vocab_size: int) -> Any:
        return getattr(transformers, model)(getattr(transformers, config)(vocab_size=vocab_size, **sizes))

    return tokenizer, make


_GPT2 = _kind(_byte_pairs, "GPT2LMHeadModel", "GPT2Config", n_positions=128, n_embd=32, n_layer=2, n_head=4)
_LLAMA = _kind(
    _byte_pairs, "LlamaForCausalLM", "LlamaConfig",
    hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
)  # fmt: skip
_GPT_NEO = _kind(
    _byte_pairs, "GPTNeoForCausalLM", "GPTNeoConfig",
    max_position_embeddings=128, hidden_size=32, num_layers=2, num_heads=4,
    attention_types=[[["global", "local"], 1]],
)  # fmt: skip
_BERT = _kind(
    _word_pieces, "BertForMaskedLM", "BertConfig",
    hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
)  # fmt: skip
_DISTILBERT = _kind(
    _word_pieces, "DistilBertForMaskedLM", "DistilBertConfig", dim=32, hidden_dim=37, n_layers=2, n_heads=4
)
_T5 = _kind(
    _pieces, "T5ForConditionalGeneration", "T5Config",
    d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
)  # fmt: skip

#: The makers of tokenizer and model for each name.
NAMES: Mapping[str, _Kind] = {
    "gpt2": _GPT2,
    "openai-community/gpt2": _GPT2,
    "sshleifer/tiny-gpt2": _GPT2,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "nickypro/tinyllama-15M": _LLAMA,
    "JackFram/llama-160m": _LLAMA,
    "HuggingFaceTB/SmolLM2-135M": _LLAMA,
    "roneneldan/TinyStories-33M": _GPT_NEO,
    "bert-base-cased": _BERT,
    "bert-base-uncased": _BERT,
    "google-bert/bert-base-cased": _BERT,
    "google-bert/bert-base-uncased": _BERT,
    "prajjwal1/bert-tiny": _BERT,
    "distilbert-base-uncased": _DISTILBERT,
    "distilbert/distilbert-base-uncased": _DISTILBERT,
    "t5-small": _T5,
    "google-t5/t5-small": _T5,
}


def hub_cache(folder: Path) -> Path:
    """Return a folder to use as HF_HOME, whose hub cache holds the stand-ins; it is made on first use.

    Args:
        folder: where to put such folders; there is one for each version of Transformers and of this file.
    """
    written = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    home = folder / f"{transformers.__version__}-{written}"
    if (home / _DONE).exists():
        return home
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    made: dict[int, Path] = {}
    for name, kind in NAMES.items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / _REVISION
        if id(kind) in made:
            shutil.copytree(made[id(kind)], snapshot)
        else:
            _make(snapshot, kind)
            made[id(kind)] = snapshot
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(_REVISION, encoding="utf-8")
    (home / _DONE).touch()
    return home


def _make(folder: Path, kind: _Kind) -> None:
    tokenizer, model = kind[0](), kind[1]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    made = model(len(tokenizer))
    made.eval().save_pretrained(folder)
