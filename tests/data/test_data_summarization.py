"""Columns, filtering and tokenisation of summarisation pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from datasets import Dataset, IterableDataset
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    DataCollatorForSeq2Seq,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
)

from dpsm_hf.data.summarization import (
    SUMMARIZATION_COLUMNS,
    TokenizationSettings,
    filter_pairs,
    known_columns,
    resolve_columns,
    tokenize_pairs,
    tokenize_split,
)
from tests.small_seq2seq import SETTINGS, SMALL, WORDS, bart, word_tokenizer


@pytest.fixture()
def tokenizer() -> BertTokenizer:
    return word_tokenizer()


@pytest.fixture()
def pairs() -> Dataset:
    return Dataset.from_dict(
        {
            "id": [1, 2, 3, 4, 5],
            "document": ["the cat sat on the mat", "a dog ran", "", "the cat", "the dog sat on a mat"],
            "summary": ["cat sat", "dog ran", "cat", None, "  "],
        }
    )


# ---- columns


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("cnn_dailymail", ("article", "highlights")),
        ("abisee/cnn_dailymail", ("article", "highlights")),
        ("EdinburghNLP/xsum", ("document", "summary")),
        ("knkarthick/dialogsum", ("dialogue", "summary")),
        ("python-docstrings", ("document", "summary")),
    ],
)
def test_known_data_sets_need_no_column_arguments(name: str, columns: tuple[str, str]) -> None:
    assert known_columns(name) == columns
    assert resolve_columns(["id", columns[1], columns[0]], name) == columns


def test_the_table_holds_upstreams_names() -> None:
    upstream = "amazon_reviews_multi big_patent cnn_dailymail orange_sum pn_summary psc samsum thaisum xglue xsum "
    assert set((upstream + "wiki_summary multi_news").split()) <= set(SUMMARIZATION_COLUMNS)
    assert known_columns(None) is None and known_columns("someone/unheard-of") is None


def test_explicit_columns_win_and_unknown_sets_take_the_first_two(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_columns(["a", "b", "c"], "xsum", "c", "a") == ("c", "a")
    with caplog.at_level(logging.WARNING, logger="dpsm_hf.data.summarization"):
        assert resolve_columns(["a", "b", "c"]) == ("a", "b")
    assert "--text_column was not given" in caplog.text


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["a", "b"], {"text_column": "body"}, r"--text_column is 'body', but the columns there are: 'a', 'b'"),
        (["a", "b"], {"summary_column": "tl"}, r"--summary_column is 'tl', but the columns there are: 'a', 'b'"),
        (["document", "target"], {"dataset_name": "GEM/xsum"}, r"expected to hold a column 'summary'.*'target'"),
        (["only"], {}, r"need two columns; the columns there are: 'only'"),
        (["a", "b"], {"text_column": "a", "summary_column": "a"}, r"both come from column 'a'"),
    ],
)
def test_missing_columns_list_those_there(names: list[str], arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_columns(names, **arguments)


# ---- filtering


def test_empty_and_short_pairs_are_dropped_counted_and_logged(
    pairs: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dpsm_hf.data.summarization"):
        kept, counts = filter_pairs(pairs, "document", "summary", min_source_words=4, split="train")
    assert kept["id"][:] == [1]
    assert (counts.kept, counts.empty, counts.short) == (1, 3, 1)
    assert "train set: 1 pairs kept, 3 dropped for an empty text or summary, 1 dropped" in caplog.text


def test_word_filter_is_off_by_default_and_inclusive(pairs: Dataset) -> None:
    assert filter_pairs(pairs, "document", "summary")[0]["id"][:] == [1, 2]
    assert filter_pairs(pairs, "document", "summary", min_source_words=3)[0]["id"][:] == [1, 2]
    assert filter_pairs(pairs, "document", "summary", min_source_words=6)[0]["id"][:] == [1]


def test_filter_errors(pairs: Dataset) -> None:
    with pytest.raises(
        ValueError, match=r"test set has no pair left of 5: 3 have an empty.*2 have a 'document' under 50"
    ):
        filter_pairs(pairs, "document", "summary", min_source_words=50, split="test")
    with pytest.raises(ValueError, match="--min_source_words is -1"):
        filter_pairs(pairs, "document", "summary", min_source_words=-1)
    with pytest.raises(ValueError, match="Column 'id' must hold text; row 0 of a batch holds int"):
        filter_pairs(pairs, "id", "summary")


def test_streams_give_the_same_rows_as_data_sets(pairs: Dataset, tokenizer: BertTokenizer) -> None:
    stream = pairs.to_iterable_dataset()
    kept, counts = filter_pairs(stream, "document", "summary", min_source_words=4)
    assert isinstance(kept, IterableDataset) and counts.kept is None
    rows = list(tokenize_split(kept, tokenizer, SETTINGS))
    expected = tokenize_split(
        filter_pairs(pairs, "document", "summary", min_source_words=4)[0], tokenizer, SETTINGS
    ).to_list()
    assert rows == expected


# ---- tokenisation


def test_pairs_become_ids_with_prefix_and_limits(tokenizer: BertTokenizer) -> None:
    settings = TokenizationSettings("document", "summary", 6, 4, source_prefix="summarize : ")
    batch = {"document": ["the cat sat on the mat"], "summary": ["the cat sat on"]}
    made = tokenize_pairs(batch, tokenizer, settings)
    assert tokenizer.convert_ids_to_tokens(made["input_ids"][0]) == "[CLS] summarize : the cat [SEP]".split()
    assert tokenizer.convert_ids_to_tokens(made["labels"][0]) == "[CLS] the cat [SEP]".split()
    assert made["attention_mask"][0] == [1] * 6


@pytest.mark.parametrize("ignore", [True, False])
def test_full_padding_marks_labels_or_keeps_the_pad_token(tokenizer: BertTokenizer, ignore: bool) -> None:
    settings = TokenizationSettings(
        "document", "summary", 6, 5, pad_to_max_length=True, ignore_pad_token_for_loss=ignore
    )
    made = tokenize_pairs({"document": ["a dog"], "summary": ["dog"]}, tokenizer, settings)
    assert len(made["input_ids"][0]) == 6
    assert made["labels"][0] == [2, WORDS.index("dog"), 3, *([-100, -100] if ignore else [0, 0])]


def test_a_pad_token_that_is_also_the_end_token_keeps_the_real_end(tokenizer: BertTokenizer) -> None:
    tokenizer.pad_token = "[SEP]"
    settings = TokenizationSettings("document", "summary", 6, 5, pad_to_max_length=True)
    made = tokenize_pairs({"document": ["a dog"], "summary": ["dog"]}, tokenizer, settings)
    assert made["labels"][0] == [2, WORDS.index("dog"), 3, -100, -100]


def test_cut_summaries_are_reported(tokenizer: BertTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    data = Dataset.from_dict({"document": ["a dog"] * 3, "summary": ["the cat sat on the mat", "dog", "cat"]})
    with caplog.at_level(logging.WARNING, logger="dpsm_hf.data.summarization"):
        tokenized = tokenize_split(data, tokenizer, SETTINGS, split="validation")
    assert tokenized.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert "validation set: 1 of 3 summaries reach the limit of 5 tokens" in caplog.text


def test_tokenisation_errors(tokenizer: BertTokenizer) -> None:
    with pytest.raises(ValueError, match="--max_target_length is 0"):
        TokenizationSettings("document", "summary", max_target_length=0)
    with pytest.raises(ValueError, match="holds list"):
        tokenize_pairs({"document": [["a", "dog"]], "summary": ["dog"]}, tokenizer, SETTINGS)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="--pad_to_max_length needs a pad token"):
        tokenize_pairs(
            {"document": ["a"], "summary": ["a"]},
            tokenizer,
            TokenizationSettings("document", "summary", pad_to_max_length=True),
        )


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_real_tokenizers_and_the_collators_decoder_inputs(name: str, real_tokenizer: Callable[[str], str]) -> None:
    loaded = AutoTokenizer.from_pretrained(real_tokenizer(name))
    batch = {"document": ["Hello world, again.", "Hello"], "summary": ["Hello world", "Hello again, world"]}
    made = tokenize_pairs(batch, loaded, TokenizationSettings("document", "summary"))
    assert all(row[-1] == loaded.eos_token_id for row in made["labels"])
    if name == "bart":
        assert made["labels"][0] == [0, 31414, 232, 2]
        model: PreTrainedModel = bart(vocab_size=len(loaded))
        start = loaded.eos_token_id
    else:
        small = {**SMALL, "vocab_size": len(loaded)}
        model = PegasusForConditionalGeneration(PegasusConfig(**small))
        start = loaded.pad_token_id
    rows = [{key: made[key][i] for key in ("input_ids", "attention_mask", "labels")} for i in range(2)]
    collated = DataCollatorForSeq2Seq(loaded, model=model)(rows)
    assert collated["decoder_input_ids"][:, 0].tolist() == [start, start]
    longest = collated["labels"].shape[1]
    assert collated["decoder_input_ids"][1, 1:].tolist() == collated["labels"][1, : longest - 1].tolist()
    assert collated["labels"][0, -1] == -100
