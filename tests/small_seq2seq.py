"""A word tokenizer and small encoder-decoders, for the data and the set-up of summarisation."""

from __future__ import annotations

from transformers import BartConfig, BartForConditionalGeneration, BertTokenizer

from dpsm_hf.data.summarization import TokenizationSettings

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat a dog ran summarize :".split()
SETTINGS = TokenizationSettings("document", "summary", max_source_length=6, max_target_length=5)
SMALL = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 16,
}


def word_tokenizer() -> BertTokenizer:
    """A tokenizer of these words; [SEP] ends a text."""
    made = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    made.eos_token = "[SEP]"
    return made


def bart(**changes: int) -> BartForConditionalGeneration:
    return BartForConditionalGeneration(BartConfig(**{**SMALL, **changes}))
