"""The set-up of an encoder-decoder around its data: positions, languages, vocabulary, decoder start; scores, files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BartForConditionalGeneration,
    BertTokenizer,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    EvalPrediction,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from dpsm_hf.data.summarization import tokenize_pairs
from dpsm_hf.tasks.generation_metrics import decode_ids, summary_metrics, write_predictions
from dpsm_hf.tasks.seq2seq_setup import (
    check_decoder_start,
    check_source_prefix,
    check_tokenizer,
    fit_positions,
    fit_vocabulary,
    position_limit,
    resize_positions,
    set_languages,
)
from tests.small_seq2seq import SETTINGS, SMALL, WORDS, bart, word_tokenizer


@pytest.fixture()
def tokenizer() -> BertTokenizer:
    return word_tokenizer()


# ---- positions


def test_learned_positions_are_kept_and_repeated() -> None:
    model = bart()
    before = model.model.encoder.embed_positions.weight.detach().clone()
    with pytest.raises(NotImplementedError):
        model.resize_position_embeddings(40)  # what transformers itself does
    resize_positions(model, 40)
    for part in (model.model.encoder, model.model.decoder):
        assert part.embed_positions.weight.shape == (42, 16)
    after = model.model.encoder.embed_positions.weight
    assert torch.equal(after[:18], before)  # two unused rows, then the 16 positions
    assert torch.equal(after[18:34], before[2:]) and torch.equal(after[34:], before[2:10])
    assert after.requires_grad and model.config.max_position_embeddings == 40
    ids = torch.randint(3, 60, (2, 40))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_resized_models_save_load_and_shrink(tmp_path: Path) -> None:
    model = bart()
    resize_positions(model, 24)
    model.save_pretrained(tmp_path)
    again = BartForConditionalGeneration.from_pretrained(tmp_path)
    assert position_limit(again) == 24
    assert torch.equal(again.model.decoder.embed_positions.weight, model.model.decoder.embed_positions.weight)
    resize_positions(model, 8)
    assert model.model.encoder.embed_positions.weight.shape == (10, 16)


def test_other_layouts_of_positions() -> None:
    blenderbot = BlenderbotForConditionalGeneration(BlenderbotConfig(**SMALL))
    resize_positions(blenderbot, 40)
    assert blenderbot.model.encoder.embed_positions.weight.shape == (40, 16)
    pegasus = PegasusForConditionalGeneration(PegasusConfig(**SMALL))
    before = pegasus.model.encoder.embed_positions.weight.detach().clone()
    resize_positions(pegasus, 40)
    sinusoids = pegasus.model.encoder.embed_positions.weight
    assert torch.allclose(sinusoids[:16], before) and not torch.allclose(sinusoids[16:32], before)
    prophetnet = ProphetNetForConditionalGeneration(
        ProphetNetConfig(
            vocab_size=64,
            hidden_size=16,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_encoder_attention_heads=2,
            num_decoder_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    with pytest.raises(ValueError, match=r"16 positions that cannot be resized here.*--max_source_length 16"):
        resize_positions(prophetnet, 40)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2))
    fit_positions(t5, 10_000, resize=False)  # relative positions: no limit
    with pytest.raises(ValueError, match="need no resizing"):
        resize_positions(t5, 40)
    with pytest.raises(ValueError, match="at least 1 position"):
        resize_positions(bart(), 0)


def test_fit_positions_follows_the_argument(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ValueError, match=r"40 tokens .* the model has 16 positions.*--resize_position_embeddings true"
    ):
        fit_positions(bart(), 40, resize=False)
    for resize in (None, True):
        model = bart()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="dpsm_hf.tasks.seq2seq_setup"):
            fit_positions(model, 40, resize)
        assert position_limit(model) == 40
        assert ("from 16 to 40" in caplog.text) is (resize is None)
    model = bart()
    fit_positions(model, 12, resize=False)
    assert position_limit(model) == 16


# ---- languages, vocabulary, decoder start


def mbart_tokenizer(kind: type = MBartTokenizer) -> MBartTokenizer | MBart50Tokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁cat", "▁sat", *FAIRSEQ_LANGUAGE_CODES, "<mask>"]
    return kind(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)])


def test_mbart_writes_the_language_into_rows_and_generation(tmp_path: Path) -> None:
    tokenizer = mbart_tokenizer()
    model = MBartForConditionalGeneration(MBartConfig(**SMALL))
    set_languages(model, tokenizer, "ro_RO")
    check_decoder_start(model, tokenizer)
    code = tokenizer.convert_tokens_to_ids("ro_RO")
    made = tokenize_pairs({"document": ["the cat"], "summary": ["cat"]}, tokenizer, SETTINGS)
    assert made["input_ids"][0][-2:] == made["labels"][0][-2:] == [tokenizer.eos_token_id, code]
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(torch.tensor(made["labels"]))
    tokenizer.tgt_lang = "fr_XX"  # summaries go through the tokenizer's target side
    other = tokenize_pairs({"document": ["the cat"], "summary": ["cat"]}, tokenizer, SETTINGS)
    assert other["input_ids"] == made["input_ids"]
    assert other["labels"][0][-1] == tokenizer.convert_tokens_to_ids("fr_XX")
    assert decoder_inputs[0, 0] == code == model.generation_config.decoder_start_token_id
    model.save_pretrained(tmp_path)  # transformers 5 refuses generation settings in the config


def test_mbart50_forces_its_language_code_through_the_generation_config(tmp_path: Path) -> None:
    tokenizer = mbart_tokenizer(MBart50Tokenizer)
    model = MBartForConditionalGeneration(MBartConfig(**SMALL, decoder_start_token_id=2))
    model.generation_config.forced_bos_token_id = tokenizer.convert_tokens_to_ids("fr_XX")
    set_languages(model, tokenizer, "ro_RO")
    assert model.generation_config.forced_bos_token_id is None  # not the language of another fine-tuning
    set_languages(model, tokenizer, "ro_RO", forced_bos_token="ro_RO")
    check_decoder_start(model, tokenizer)
    code = tokenizer.convert_tokens_to_ids("ro_RO")
    assert model.generation_config.forced_bos_token_id == code
    assert model.config.decoder_start_token_id == 2
    assert getattr(model.config, "forced_bos_token_id", None) is None
    generated = model.generate(torch.tensor([[code, 4, 5, 2]]), max_length=5, num_beams=1)
    assert generated[0, :2].tolist() == [2, code]
    model.save_pretrained(tmp_path)


def test_language_errors(tokenizer: BertTokenizer) -> None:
    model = MBartForConditionalGeneration(MBartConfig(**SMALL))
    with pytest.raises(ValueError, match="MBartTokenizer is multilingual: pass --lang with one of ar_AR"):
        set_languages(model, mbart_tokenizer())
    with pytest.raises(ValueError, match="--lang 'en' is not a language code of this tokenizer; it has ar_AR"):
        set_languages(model, mbart_tokenizer(), "en")
    with pytest.raises(ValueError, match="--forced_bos_token 'nope' is not one token"):
        set_languages(bart(), tokenizer, forced_bos_token="nope")
    set_languages(bart(), tokenizer, lang="en")  # a monolingual tokenizer ignores the language


def test_vocabulary_grows_and_never_shrinks(tokenizer: BertTokenizer) -> None:
    for rows, expected in ((8, len(WORDS)), (64, 64)):
        model = bart(vocab_size=rows, eos_token_id=2)
        fit_vocabulary(model, tokenizer)
        assert model.get_input_embeddings().weight.shape[0] == expected == model.lm_head.out_features


def test_generation_starts_as_training_does(tokenizer: BertTokenizer) -> None:
    model = bart(decoder_start_token_id=4)
    model.generation_config.decoder_start_token_id = None
    check_decoder_start(model, tokenizer)
    assert model.generation_config.decoder_start_token_id == model.config.decoder_start_token_id == 4
    # mBART rotates the last label to the front; with a tokenizer without language codes that is the end token.
    mbart = MBartForConditionalGeneration(MBartConfig(**SMALL, decoder_start_token_id=0))
    check_decoder_start(mbart, tokenizer)
    assert mbart.generation_config.decoder_start_token_id == tokenizer.eos_token_id


def test_a_missing_decoder_start_is_an_error(tokenizer: BertTokenizer) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2))
    for model in (t5, bart()):
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
        with pytest.raises(ValueError, match=r"no decoder_start_token_id.*--config_overrides decoder_start_token_id"):
            check_decoder_start(model, tokenizer)
    t5.generation_config.decoder_start_token_id = 0
    check_decoder_start(t5, tokenizer)
    assert t5.config.decoder_start_token_id == 0


def test_source_prefix_warning_is_for_pretrained_t5_only(caplog: pytest.LogCaptureFixture) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2))
    with caplog.at_level(logging.WARNING, logger="dpsm_hf.tasks.seq2seq_setup"):
        check_source_prefix(t5, None, from_scratch=True)
        check_source_prefix(t5, "summarize: ", from_scratch=False)
        check_source_prefix(bart(), None, from_scratch=False)
        assert caplog.text == ""
        check_source_prefix(t5, None, from_scratch=False)
    assert "--source_prefix" in caplog.text


def test_tokenizers_without_pad_or_end_are_refused(tokenizer: BertTokenizer) -> None:
    check_tokenizer(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token, which is needed to end summaries"):
        check_tokenizer(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad_token"):
        check_tokenizer(tokenizer)


# ---- scores and files


def test_metrics_decode_ids_and_ignore_padding(tokenizer: BertTokenizer) -> None:
    cat, dog, sat = (WORDS.index(word) for word in ("cat", "dog", "sat"))
    predictions = np.array([[2, cat, sat, 3, 0], [2, dog, 3, -100, -100]])
    labels = np.array([[2, cat, sat, 3, -100], [2, cat, 3, -100, -100]])
    assert decode_ids(labels, tokenizer) == ["cat sat", "cat"]
    scores = summary_metrics(tokenizer)(EvalPrediction((predictions, None), labels))
    assert scores["rouge1"] == pytest.approx(50.0)
    assert scores["gen_len"] == pytest.approx((4 + 3) / 2)
    assert "bertscore_f1" not in scores


def test_predictions_are_written_one_a_line_and_as_records(tmp_path: Path) -> None:
    text, records = write_predictions(tmp_path / "new", ["eins\nzwei", ""], ["d1", "d2"], ["r1", "ü"])
    assert Path(text).read_text(encoding="utf-8") == "eins zwei\n\n"
    lines = [json.loads(line) for line in Path(records).read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"document": "d1", "reference": "r1", "prediction": "eins\nzwei"}
    assert lines[1]["reference"] == "ü"
    with pytest.raises(ValueError, match="1 predictions, 2 documents"):
        write_predictions(tmp_path, ["a"], ["d1", "d2"], ["r1", "r2"])
