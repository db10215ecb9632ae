"""Labels outside the vocabulary are found in a data set before training, with the row they are in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from dpsm_hf.training.checks import check_dataset_labels

V = 10


def data(rows: list[Any], dtype: str = "int64") -> Dataset:
    return Dataset.from_dict({"labels": rows}, features=Features({"labels": List(Value(dtype))}))


GOOD = [[1, 2, 9], [], [-100, 0], [3]]


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8"])
@pytest.mark.parametrize("wrong", [10, 127, -1, -99])
def test_the_row_is_named(wrong: int, dtype: str) -> None:
    rows = [*GOOD, [], [4, wrong, 5], [99]]
    with pytest.raises(ValueError, match=rf"eval_dataset row 5 has label {wrong}, outside \[0, 10\).*resize_token"):
        check_dataset_labels(data(rows, dtype), V, "eval_dataset")


def test_first_and_last_places() -> None:
    with pytest.raises(ValueError, match="train_dataset row 0 has label 10"):
        check_dataset_labels(data([[10, 1], [1]]), V, "train_dataset")
    with pytest.raises(ValueError, match="row 0 has label 10"):
        check_dataset_labels(data([[1, 10], [1]]), V, "train_dataset")
    with pytest.raises(ValueError, match="row 1 has label 10"):
        check_dataset_labels(data([[1, 1], [10]]), V, "train_dataset")


def test_right_labels_pass() -> None:
    check_dataset_labels(data(GOOD), V, "train_dataset")
    check_dataset_labels(data([]), V, "train_dataset")
    check_dataset_labels(data([[], []]), V, "train_dataset")
    check_dataset_labels(data([[0, 9]], "uint16"), V, "train_dataset")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint64"])
def test_unsigned_labels(dtype: str) -> None:
    with pytest.raises(ValueError, match="row 1 has label 200"):
        check_dataset_labels(data([[1, 2], [200]], dtype), V, "train_dataset")


def test_missing_rows_and_entries() -> None:
    check_dataset_labels(data([None, [1, None], [2]]), V, "train_dataset")
    check_dataset_labels(data([None, [1, None], [2]], "uint16"), V, "train_dataset")
    with pytest.raises(ValueError, match="row 3 has label 77"):
        check_dataset_labels(data([[1], None, [1, None], [77]]), V, "train_dataset")


def test_several_chunks() -> None:
    joined = concatenate_datasets([data(GOOD), data(GOOD), data([[1], [2, 33]])])
    assert joined.data.column("labels").num_chunks == 3
    with pytest.raises(ValueError, match="row 9 has label 33"):
        check_dataset_labels(joined, V, "train_dataset")


def test_only_the_first_hundreds_of_millions_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpsm_hf.training.checks._MOST_TOKENS", 5)
    joined = concatenate_datasets([data([[1, 2, 3]]), data([[4, 5, 6]]), data([[33]])])
    check_dataset_labels(joined, V, "train_dataset")


def test_selected_and_transformed_sets_are_left_to_the_batches() -> None:
    bad = data([[1], [33], [2]])
    check_dataset_labels(bad.select([2, 0]), V, "train_dataset")
    check_dataset_labels(bad.select([2, 1, 0]), V, "train_dataset")
    check_dataset_labels(bad.with_transform(lambda batch: {"labels": [[0]]}), V, "train_dataset")
    # numbers in another format are the same numbers, and a contiguous selection is a slice
    with pytest.raises(ValueError, match="row 1 has label 33"):
        check_dataset_labels(bad.with_format("torch"), V, "train_dataset")
    with pytest.raises(ValueError, match="row 0 has label 33"):
        check_dataset_labels(bad.select(range(1, 3)), V, "train_dataset")


def test_other_kinds_are_left_alone() -> None:
    rows = [{"labels": torch.tensor([33])}]
    check_dataset_labels(rows, V, "train_dataset")
    check_dataset_labels(IterableDataset.from_generator(lambda: iter(rows)), V, "train_dataset")
    check_dataset_labels(data([[33]]), None, "train_dataset")
    check_dataset_labels(data([[33]]).rename_column("labels", "label_ids"), V, "train_dataset")
    check_dataset_labels(Dataset.from_dict({"labels": [33, 44]}), V, "train_dataset")
    check_dataset_labels(Dataset.from_dict({"labels": [[0.5], [44.0]]}), V, "train_dataset")
