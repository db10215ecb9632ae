"""run_summarization_dpsm.py with the model families it knows: BART, PEGASUS, T5, mBART, and their tokenizers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MBart50Tokenizer, MBartTokenizer, T5Tokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES

from dpsm_hf.data.python_text import load_python_docstrings
from run_summarization_dpsm import main
from tests.tasks.summarization_run import DOCSTRINGS, TINY, arguments

TINY_T5 = "d_model=16,d_kv=8,d_ff=16,num_layers=1,num_heads=2"


def unigram_vocabulary(first: Sequence[str]) -> list[tuple[str, float]]:
    """A small Unigram vocabulary over real docstrings, as T5's and mBART's SentencePiece models are."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(first), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(load_python_docstrings()["test"]["document"][:60], trainer)
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def run_model(folder: Path, model_type: str, overrides: str, tokenizer: str, *more: str) -> dict[str, float]:
    return main(
        arguments(
            folder,
            *DOCSTRINGS,
            *("--model_type", model_type, "--config_overrides", overrides, "--tokenizer_name", tokenizer),
            *("--do_train", "--do_eval", "--predict_with_generate", *more),
        )
    )


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_bart_and_pegasus_with_their_real_tokenizers(
    name: str, real_tokenizer: Callable[[str], str], tmp_path: Path
) -> None:
    results = run_model(tmp_path, name, TINY, real_tokenizer(name))
    assert results["eval_nll"] > 0 and "eval_rougeLsum" in results
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    start = tokenizer.eos_token_id if name == "bart" else tokenizer.pad_token_id
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == start


def test_t5_with_its_prefix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    T5Tokenizer(vocab=unigram_vocabulary(["<pad>", "</s>", "<unk>"]), extra_ids=0).save_pretrained(tmp_path / "t5")
    run_model(tmp_path / "out", "t5", TINY_T5, str(tmp_path / "t5"), "--source_prefix", "summarize: ")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.config.decoder_start_token_id == model.config.pad_token_id == 0
    evaluate = arguments(tmp_path / "eval", *DOCSTRINGS, "--model_name_or_path", str(tmp_path / "out"), "--do_eval")
    with caplog.at_level(logging.WARNING, logger="dpsm_hf.tasks.seq2seq_setup"):
        without = main(evaluate)
        assert "--source_prefix" in caplog.text
        caplog.clear()
        with_prefix = main([*evaluate, "--source_prefix", "summarize: "])
        assert "--source_prefix" not in caplog.text
    assert without["eval_nll"] != with_prefix["eval_nll"]  # the prefix reaches the model


@pytest.mark.parametrize("kind", ["mbart", "mbart50"])
def test_mbart_with_a_language(kind: str, tmp_path: Path) -> None:
    codes = FAIRSEQ_LANGUAGE_CODES if kind == "mbart" else MBART50_CODES
    pieces = unigram_vocabulary(["<s>", "<pad>", "</s>", "<unk>"])
    vocabulary = [*pieces, *((code, 0.0) for code in codes), ("<mask>", 0.0)]
    tokenizer = (MBartTokenizer if kind == "mbart" else MBart50Tokenizer)(vocab=vocabulary)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    forced = () if kind == "mbart" else ("--forced_bos_token", "ro_RO")
    results = run_model(
        tmp_path / "out", "mbart", TINY, str(tmp_path / "tokenizer"), "--lang", "ro_RO", "--do_predict", *forced
    )
    assert results["eval_nll"] > 0 and results["predict_gen_len"] >= 2
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    code = tokenizer.convert_tokens_to_ids("ro_RO")
    assert model.generation_config.decoder_start_token_id == (code if kind == "mbart" else tokenizer.eos_token_id)
    assert model.generation_config.forced_bos_token_id == (None if kind == "mbart" else code)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.src_lang, again.tgt_lang) == ("ro_RO", "ro_RO")
    common = ("--model_name_or_path", str(tmp_path / "out"), "--do_eval")
    with pytest.raises(ValueError, match="is multilingual: pass --lang"):
        main(arguments(tmp_path / "eval", *DOCSTRINGS, *common))
