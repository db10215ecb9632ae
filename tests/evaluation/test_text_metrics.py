"""ROUGE, BERTScore and lengths against values worked out by hand."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, T5Config, T5Model

from dpsm_hf.evaluation import text_metrics
from dpsm_hf.evaluation.text_metrics import (
    bert_scores,
    generation_lengths,
    load_bert_scorer,
    rouge_scores,
    sentence_splitter_name,
    split_by_rules,
    split_sentences,
)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat a dog ran".split()


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # "t5" in the path on purpose: bert-score loads any such path as a T5 model.
    folder = tmp_path_factory.mktemp("tiny-bert-not-t5")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_rouge_by_hand() -> None:
    # 4 and 5 words with "the", "cat", "sat" in common; 3 and 4 bigrams with "the cat", "cat sat" in common.
    scores = rouge_scores(["the cat sat down"], ["the cat sat on mats"], use_stemmer=False)
    assert scores["rouge1"] == pytest.approx(100 * 2 * 3 / (4 + 5))
    assert scores["rouge2"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["rougeL"] == pytest.approx(100 * 2 * 3 / (4 + 5))
    assert scores["rougeLsum"] == pytest.approx(scores["rougeL"])
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_rouge_mean_is_over_samples() -> None:
    scores = rouge_scores(["one two", ""], ["one two", "three four"])
    assert scores == pytest.approx({"rouge1": 50.0, "rouge2": 50.0, "rougeL": 50.0, "rougeLsum": 50.0})


def test_rougelsum_compares_sentences_and_rougel_does_not() -> None:
    # The same two sentences in the other order: as one sequence half of the words are in order, as sentences all are.
    scores = rouge_scores(["gamma delta\nalpha beta"], ["alpha beta\ngamma delta"])
    assert scores["rougeLsum"] == pytest.approx(100.0)
    assert scores["rougeL"] == pytest.approx(50.0)


def test_rougelsum_splits_prose_without_newlines_and_pegasus_marks() -> None:
    for prediction in ("Gamma delta. Alpha beta.", "Gamma delta.<n>Alpha beta."):
        scores = rouge_scores([prediction], ["Alpha beta. Gamma delta."])
        assert scores["rougeLsum"] == pytest.approx(100.0)
        assert scores["rougeL"] == pytest.approx(50.0)
        assert scores["rouge1"] == pytest.approx(100.0)  # <n> must not count as a word


def test_stemmer_joins_word_forms() -> None:
    assert rouge_scores(["models trained"], ["model training"])["rouge1"] == pytest.approx(100.0)
    assert rouge_scores(["models trained"], ["model training"], use_stemmer=False)["rouge1"] == 0.0


def test_several_references_take_the_best_of_each_type() -> None:
    both = rouge_scores(["a b c d"], [["x y", "a b c d"]])
    assert both == pytest.approx(rouge_scores(["a b c d"], ["a b c d"]))
    assert rouge_scores(["a b"], [["x y", "q r"]])["rouge1"] == 0.0


def test_text_without_latin_words_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dpsm_hf.evaluation.text_metrics"):
        scores = rouge_scores(["привет мир", "hello"], ["привет мир", "hello"])
    assert scores["rouge1"] == pytest.approx(50.0)
    assert "1 of 2 references" in caplog.text


@pytest.mark.parametrize("function", [rouge_scores, lambda p, r: bert_scores(p, r, lang="en")])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], ["a"], "2 predictions and 1 references"),
        ([], [], "no samples"),
        (["a"], [[]], "sample 0 has no reference"),
        ("a", ["a"], "lists of texts"),
        (["a", None], ["a", "b"], "sample 1 is not text"),
    ],
)
def test_bad_pairs_are_refused(function, predictions, references, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        function(predictions, references)


def test_rules_split_at_ends_and_not_at_abbreviations() -> None:
    text = 'Dr. Smith saw the U.S. Army at 5 p.m. today. "Really?" Yes! J. Doe paid 3.5 dollars, e.g. Monday. 12 came'
    assert split_by_rules(text) == [
        "Dr. Smith saw the U.S. Army at 5 p.m. today.",
        '"Really?"',
        "Yes!",
        "J. Doe paid 3.5 dollars, e.g. Monday.",
        "12 came",
    ]
    assert split_by_rules("") == []


def test_newlines_decide_before_any_rule() -> None:
    assert split_sentences("One. Two.\n\n Three ") == ["One. Two.", "Three"]
    assert split_sentences("  \n ") == []


def test_punkt_is_used_when_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "_punkt_tokenizer", lambda: lambda text: text.split("|"))
    assert sentence_splitter_name() == "nltk punkt"
    assert split_sentences("All. B|c") == ["All. B", "c"]
    monkeypatch.setattr(text_metrics, "_punkt_tokenizer", lambda: None)
    assert sentence_splitter_name() == "rules"
    assert split_sentences("All. B|c") == ["All.", "B|c"]


def test_bertscore_equal_texts_score_one_and_empty_ones_zero(scorer_folder: str) -> None:
    scores = bert_scores(["the cat sat"], ["the cat sat"], model_type=scorer_folder, num_layers=1)
    assert scores == pytest.approx({f"bertscore_{part}": 1.0 for part in ("precision", "recall", "f1")}, abs=1e-5)
    half = bert_scores(["the cat sat", " "], ["the cat sat", "a dog"], model_type=scorer_folder, num_layers=1)
    assert half["bertscore_f1"] == pytest.approx(0.5, abs=1e-5)
    none = bert_scores(["", "a dog"], ["a dog", ""], model_type=scorer_folder, num_layers=1)
    assert none == {"bertscore_precision": 0.0, "bertscore_recall": 0.0, "bertscore_f1": 0.0}


def test_bertscore_follows_its_formula(scorer_folder: str) -> None:
    prediction, reference = "the cat ran", "a dog sat on"
    scores = bert_scores([prediction], [reference], model_type=scorer_folder, num_layers=2)
    model = BertModel.from_pretrained(scorer_folder).eval()
    sides = []
    for text in (prediction, reference):
        ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
        with torch.no_grad():
            sides.append(torch.nn.functional.normalize(model(ids).last_hidden_state[0], dim=-1))
    similarity = (sides[0] @ sides[1].T).double()
    # [CLS] and [SEP] weigh nothing themselves but may be matched.
    precision = float(similarity.max(1).values[1:-1].mean())
    recall = float(similarity.max(0).values[1:-1].mean())
    assert scores["bertscore_precision"] == pytest.approx(precision, abs=1e-5)
    assert scores["bertscore_recall"] == pytest.approx(recall, abs=1e-5)
    assert scores["bertscore_f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


def test_bertscore_cuts_texts_to_the_models_positions(scorer_folder: str) -> None:
    # This tokenizer has no model_max_length (10^30): unbounded, the text below would overflow 32 positions.
    scorer = load_bert_scorer(scorer_folder, num_layers=1)
    long = bert_scores(["the cat sat " * 100], ["the cat sat"], scorer=scorer)
    assert all(math.isfinite(value) for value in long.values())
    assert bert_scores(["a dog"], [["a cat", "a dog"]], scorer=scorer)["bertscore_f1"] == pytest.approx(1.0, abs=1e-5)


def test_bertscore_loads_a_t5_folder_as_t5(tmp_path: Path) -> None:
    folder = str(tmp_path / "encoder")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    T5Model(T5Config(vocab_size=16, d_model=16, num_layers=2, num_heads=2, d_ff=16, d_kv=8)).save_pretrained(folder)
    assert bert_scores(["a dog"], ["a dog"], model_type=folder, num_layers=1)["bertscore_f1"] == pytest.approx(1.0)


def test_bertscore_errors_name_the_remedy(scorer_folder: str) -> None:
    with pytest.raises(ValueError, match=r"roberta-large.*cannot be loaded.*--bertscore_model FOLDER"):
        bert_scores(["a"], ["a"], lang="en")
    with pytest.raises(ValueError, match="pass num_layers"):
        bert_scores(["a"], ["a"], model_type=scorer_folder)
    with pytest.raises(ValueError, match="cannot use layer 9"):
        bert_scores(["a"], ["a"], model_type=scorer_folder, num_layers=9)
    with pytest.raises(ValueError, match="model_type='roberta-large' or lang='en'"):
        bert_scores(["a"], ["a"])
    with pytest.raises(ValueError, match="pass lang together"):
        load_bert_scorer(scorer_folder, num_layers=1, rescale_with_baseline=True)
    with pytest.raises(ValueError, match="Baseline not Found"):
        load_bert_scorer(scorer_folder, "en", num_layers=1, rescale_with_baseline=True)


def test_generation_lengths_leave_padding_out() -> None:
    assert generation_lengths(np.array([[2, 5, 6, 1, 1], [2, 5, -100, -100, -100]]), 1).tolist() == [3, 2]
    assert generation_lengths([[2, 5], [2, 5, 7]], 1).tolist() == [2, 3]
    with pytest.raises(ValueError, match="empty"):
        generation_lengths([], 0)
