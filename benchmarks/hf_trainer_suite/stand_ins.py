"""A hub cache with tiny random models under the names that Transformers' Trainer tests ask for.

Everything is loaded from it as from a cache that was filled online, so nothing of Transformers has to be replaced.
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
    """Return a tokenizer of GPT-2's and Llama's kind."""
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
    """Return a tokenizer of BERT's kind."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(_SENTENCES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    return transformers.BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)  # type: ignore[attr-defined]


def _pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer of T5's kind."""
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _gpt2(words: int) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=words, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    )


def _llama(words: int) -> Any:
    config: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=words, **config))


def _gpt_neo(words: int) -> Any:
    config: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    }
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(vocab_size=words, max_position_embeddings=128, **config)
    )


def _bert(words: int) -> Any:
    config: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=words, **config))


def _distilbert(words: int) -> Any:
    config: dict[str, Any] = {"dim": 32, "hidden_dim": 37, "n_layers": 2, "n_heads": 4}
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(vocab_size=words, **config))


def _t5(words: int) -> Any:
    config: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=words, **config))


_Kind = tuple[Callable[[], PreTrainedTokenizerFast], Callable[[int], Any]]
_GPT2: _Kind = (_byte_pairs, _gpt2)
_LLAMA: _Kind = (_byte_pairs, _llama)
_BERT: _Kind = (_word_pieces, _bert)
_DISTILBERT: _Kind = (_word_pieces, _distilbert)
_T5: _Kind = (_pieces, _t5)

#: What each name stands for: a tokenizer and a model.
NAMES: Mapping[str, _Kind] = {
    "gpt2": _GPT2,
    "openai-community/gpt2": _GPT2,
    "sshleifer/tiny-gpt2": _GPT2,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "nickypro/tinyllama-15M": _LLAMA,
    "JackFram/llama-160m": _LLAMA,
    "HuggingFaceTB/SmolLM2-135M": _LLAMA,
    "roneneldan/TinyStories-33M": (_byte_pairs, _gpt_neo),
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
    """Return the value of HF_HOME whose hub cache holds the stand-ins, made on first use.

    Args:
        folder: for the caches; each version of Transformers and of this file has one of its own.
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
