"""Nested subsets and folds: chosen by the text of an example alone, exact in size, and the same in a stream."""

from __future__ import annotations

import pytest
from datasets import Dataset

from dpsm_hf.data.python_text import load_python_docs, load_python_docstrings
from dpsm_hf.data.subsets import drawn_rows, fold_of, low_resource, split_fold

PAIR = ("document", "summary")


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """1,000 real pairs."""
    return load_python_docstrings()["train"].select(range(1000))


def summaries(dataset: Dataset) -> list[str]:
    return [f"{row['document']}|{row['summary']}" for row in dataset]


# ---- nested subsets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "number"), [(0.01, 10), (0.1, 100), (0.0004, 1), (0.333, 333), (0.9999, 1000), (1, 1000)]
)
def test_the_size_is_the_share_rounded_up(pairs: Dataset, share: float, number: int) -> None:
    assert len(low_resource(pairs, share, PAIR)) == number


def test_smaller_subsets_are_parts_of_larger_ones_in_the_same_order(pairs: Dataset) -> None:
    whole = summaries(pairs)
    larger = whole
    for share in (0.5, 0.1, 0.02, 0.01, 0.001):
        part = summaries(low_resource(pairs, share, PAIR))
        places = [whole.index(text) for text in part]
        assert set(part) <= set(larger) and places == sorted(places)
        larger = part
    assert summaries(low_resource(pairs, 0.1, PAIR)) != whole[:100]


def test_drawn_rows_are_of_the_seed_and_nested(pairs: Dataset) -> None:
    whole = summaries(pairs)
    drawn = {seed: summaries(drawn_rows(pairs, 100, seed)) for seed in (0, 1)}
    for part in drawn.values():
        places = [whole.index(text) for text in part]
        assert len({*places}) == 100 and places == sorted(places)
    # 10 % of 100 are expected in both, with a standard deviation of 3
    assert len({*drawn[0]} & {*drawn[1]}) < 25
    assert {*summaries(drawn_rows(pairs, 40, 0))} < {*drawn[0]} == {*summaries(drawn_rows(pairs, 100, 0))}
    assert summaries(drawn_rows(pairs, 5000, 0)) == whole


def test_the_order_of_the_data_does_not_matter(pairs: Dataset) -> None:
    part = low_resource(pairs.shuffle(seed=1), 0.1, PAIR)
    assert sorted(summaries(part)) == sorted(summaries(low_resource(pairs, 0.1, PAIR)))


def test_a_stream_gives_nested_shares_too(pairs: Dataset) -> None:
    stream = pairs.to_iterable_dataset()
    tenth, half = (summaries(low_resource(stream, share, PAIR)) for share in (0.1, 0.5))
    # binomial: 4 standard deviations
    assert abs(len(tenth) - 100) < 4 * 90**0.5 and abs(len(half) - 500) < 4 * 250**0.5
    assert set(tenth) <= set(half)
    # the examples of smallest hash, as those of a loaded set
    loaded = set(summaries(low_resource(pairs, 0.2, PAIR)))
    assert set(tenth) <= loaded


def test_a_share_of_the_text_counts_characters() -> None:
    texts = load_python_docs()["train"].select(range(300))
    total = sum(map(len, texts["text"]))
    previous: set[str] = set()
    for share in (0.01, 0.1, 0.5):
        part = low_resource(texts, share, ["text"], by_length=True)["text"]
        longest = max(map(len, texts["text"]))
        assert share * total <= sum(map(len, part)) < share * total + longest
        assert previous <= set(part)
        previous = set(part)


LINES = ["a\n", "b\n", "\n", "\n", "c\n", " \n", "d\n", "e\n", "f\n"]


def test_documents_of_several_lines_stay_whole_with_the_blank_lines_behind_them() -> None:
    lines = Dataset.from_dict({"text": LINES})
    documents = [["a\n", "b\n", "\n", "\n"], ["c\n", " \n"], ["d\n", "e\n", "f\n"]]
    for fold in range(4):
        texts = [["a\n", "b\n"], ["c\n"], ["d\n", "e\n", "f\n"]]
        expected = [doc for doc, text in zip(documents, texts, strict=True) if fold_of(text, 4) == fold]
        if expected and len(expected) < 3:
            _, held_out = split_fold(lines, fold, 4, ["text"], by_document=True)
            assert held_out["text"] == [line for document in expected for line in document]
    assert low_resource(lines, 0.1, ["text"], by_document=True)["text"] in documents
    assert low_resource(lines, 1.0, ["text"], by_document=True)["text"] == LINES


def test_blank_lines_before_the_first_document_go_with_it() -> None:
    lines = Dataset.from_dict({"text": ["", "a", "", "b"]})
    assert low_resource(lines, 0.1, ["text"], by_document=True)["text"] in (["", "a", ""], ["b"])


def test_a_share_out_of_range_is_named(pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="--low_resource is 0"):
        low_resource(pairs, 0, PAIR)
    with pytest.raises(ValueError, match="--low_resource is 1.5"):
        low_resource(pairs, 1.5, PAIR)


# ---- folds --------------------------------------------------------------------------------------------------------


def test_folds_partition_the_training_set(pairs: Dataset) -> None:
    whole = summaries(pairs)
    seen: list[str] = []
    for fold in range(5):
        train, held_out = (summaries(part) for part in split_fold(pairs, fold, 5, PAIR))
        assert sorted(train + held_out) == sorted(whole) and not set(train) & set(held_out)
        # binomial: 4 standard deviations
        assert abs(len(held_out) - 200) < 4 * 160**0.5
        seen += held_out
    assert sorted(seen) == sorted(whole)


def test_a_fold_depends_on_the_example_alone(pairs: Dataset) -> None:
    held_out = set(summaries(split_fold(pairs, 2, 5, PAIR)[1]))
    assert set(summaries(split_fold(pairs.shuffle(seed=3), 2, 5, PAIR)[1])) == held_out
    half = pairs.select(range(500))
    assert set(summaries(split_fold(half, 2, 5, PAIR)[1])) == held_out & set(summaries(half))


def test_equal_examples_are_in_one_fold() -> None:
    texts = Dataset.from_dict({"text": [f"text {i % 20}" for i in range(100)]})
    for fold in range(3):
        train, held_out = (set(part["text"]) for part in split_fold(texts, fold, 3, ["text"]))
        assert not train & held_out


def test_a_fold_holds_its_share_of_a_small_subset(pairs: Dataset) -> None:
    """Subsets and folds are chosen by different hashes."""
    small = low_resource(pairs, 0.3, PAIR)
    for fold in range(3):
        assert abs(len(split_fold(small, fold, 3, PAIR)[1]) - 100) < 4 * 67**0.5


def test_folds_of_a_stream_are_those_of_the_loaded_set(pairs: Dataset) -> None:
    for loaded, streamed in zip(
        split_fold(pairs, 1, 4, PAIR), split_fold(pairs.to_iterable_dataset(), 1, 4, PAIR), strict=True
    ):
        assert summaries(loaded) == summaries(streamed)


def test_too_few_examples_for_a_fold() -> None:
    texts = Dataset.from_dict({"text": ["one", "two"]})
    empty = next(fold for fold in range(3) if fold not in {fold_of([t], 3) for t in texts["text"]})
    with pytest.raises(ValueError, match=rf"fold {empty} of 3: of 2 examples none is left to validate on.*fewer"):
        split_fold(texts, empty, 3, ["text"])
    same = Dataset.from_dict({"text": ["one"] * 5})
    with pytest.raises(ValueError, match="none is left to train on"):
        split_fold(same, fold_of(["one"], 2), 2, ["text"])


def test_a_stream_of_lines_cannot_be_cut_into_documents() -> None:
    stream = Dataset.from_dict({"text": LINES}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"--cross_validation_fold .*--streaming"):
        split_fold(stream, 0, 2, ["text"], by_document=True)
    with pytest.raises(ValueError, match=r"--low_resource .*--document_boundary row"):
        low_resource(stream, 0.5, ["text"], by_document=True)
