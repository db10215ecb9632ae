"""Stress options: every bad value and contradiction is an error that names it; and what is never drawn."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainingArguments

from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.tasks.language_modelling import DataTrainingArguments as ClmArguments
from dpsm_hf.tasks.stress_arguments import StressArguments, SummaryStressArguments, never_drawn
from dpsm_hf.tasks.summarization import DataTrainingArguments as SummaryArguments
from tests.tiny import VOCAB, make_data, make_model


def training(**options: Any) -> TrainingArguments:
    return TrainingArguments(**{"output_dir": "unused", "do_train": True, "use_cpu": True, **options})


FLIP = {"flip_target_tokens": 0.1}
FOLD = {"cross_validation_fold": 0, "cross_validation_folds": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_target_tokens": 0.0}, r"--flip_target_tokens is 0.0; .*above 0 and at most 1"),
        ({"flip_target_tokens": 1.2}, r"--flip_target_tokens is 1.2"),
        ({**FLIP, "flip_steps": -0.5}, r"--flip_steps is -0.5"),
        ({**FLIP, "flip_steps": 20.0}, r"--flip_steps is 20.0; .*share"),
        ({"flip_steps": 0.05}, r"--flip_steps 0.05 has no effect without --flip_target_tokens"),
        ({"flip_replacement": "unigram"}, r"--flip_replacement unigram has no effect without --flip_target_tokens"),
        ({"low_resource": 0.0}, r"--low_resource is 0.0"),
        ({"low_resource": 10.0}, r"--low_resource is 10.0"),
        ({"cross_validation_fold": 1}, r"--cross_validation_fold 1 needs --cross_validation_folds"),
        ({"cross_validation_folds": 5}, r"--cross_validation_folds 5 needs --cross_validation_fold:"),
        ({"cross_validation_fold": 0, "cross_validation_folds": 1}, r"--cross_validation_folds 1 must be at least 2"),
        ({"cross_validation_fold": 5, "cross_validation_folds": 5}, r"fold 5 must lie between 0 and 4"),
        ({"cross_validation_fold": -1, "cross_validation_folds": 5}, r"fold -1 must lie between 0 and 4"),
        (
            {**FOLD, "dataset_name": None, "train_file": "a.csv", "validation_file": "b.csv"},
            r"--validation_file b.csv",
        ),
        ({**FOLD, "dataset_name": None, "test_file": "a.csv"}, r"fold 0 needs a --train_file"),
    ],
)
@pytest.mark.parametrize("kind", [ClmArguments, SummaryArguments])
def test_bad_values_and_contradictions(kind: Any, options: dict[str, Any], message: str) -> None:
    arguments = kind(**{"dataset_name": "python-docs", **options})
    with pytest.raises(ValueError, match=message):
        arguments.check_stress(training())


def test_a_stream_cannot_be_counted() -> None:
    arguments = ClmArguments(dataset_name="python-docs", streaming=True, flip_replacement="unigram", **FLIP)
    with pytest.raises(ValueError, match="unigram counts .*--streaming"):
        arguments.check_stress(training())


@pytest.mark.parametrize("options", [FLIP, {"low_resource": 0.1}, {"swap_summaries": 0.15}])
def test_without_training_there_is_nothing_to_corrupt(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has no effect without --do_train"):
        SummaryStressArguments(**options).check_stress(training(do_train=False, do_eval=True))


def test_folds_serve_evaluation_alone_but_not_prediction() -> None:
    arguments = SummaryArguments(dataset_name="python-docs", **FOLD)
    arguments.check_stress(training(do_train=False, do_eval=True))
    with pytest.raises(ValueError, match="without --do_train or --do_eval"):
        arguments.check_stress(training(do_train=False, do_predict=True))


def test_swaps_need_two_pairs_a_step() -> None:
    arguments = SummaryStressArguments(swap_summaries=0.15)
    with pytest.raises(ValueError, match=r"--swap_summaries 0.15 needs .*at least 2 pairs.*--per_device_train_batch"):
        arguments.check_stress(training(per_device_train_batch_size=1))
    arguments.check_stress(training(per_device_train_batch_size=1, gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="--swap_summaries is 2"):
        SummaryStressArguments(swap_summaries=2).check_stress(training())


def test_language_modelling_has_no_summaries_to_swap() -> None:
    with pytest.raises(TypeError, match="swap_summaries"):
        ClmArguments(dataset_name="python-docs", swap_summaries=0.1)  # type: ignore[call-arg]


def test_good_values_pass_and_none_changes_nothing() -> None:
    SummaryStressArguments(flip_target_tokens=0.1, flip_steps=0.05, low_resource=0.01).check_stress(training())
    arguments = StressArguments()
    arguments.check_stress(training(do_train=False))
    assert arguments.splits_to_load(["train", "validation"]) == ["train", "validation"]
    data = Dataset.from_dict({"text": ["a", "b"]})
    assert arguments.take_fold({"train": data}, ["text"]) == {"train": data}
    assert arguments.take_low_resource(data, ["text"]) is data


def test_a_fold_comes_out_of_train(caplog: pytest.LogCaptureFixture) -> None:
    arguments = StressArguments(cross_validation_fold=1, cross_validation_folds=3)
    assert arguments.splits_to_load(["validation", "test"]) == ["train", "test"]
    assert arguments.splits_to_load(["train", "validation"]) == ["train"]
    train = Dataset.from_dict({"text": [f"text {i}" for i in range(30)]})
    with caplog.at_level(logging.INFO, logger="dpsm_hf"):
        parts = arguments.take_fold({"train": train, "validation": train, "test": train}, ["text"])
    assert sorted([*parts["train"]["text"], *parts["validation"]["text"]]) == sorted(train["text"])
    assert parts["test"] is train and "The validation split is not used" in caplog.text
    assert f"{len(parts['train'])} rows to train on, {len(parts['validation'])} to validate on" in caplog.text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe_tokenizer(["The cat sat on the mat. " * 9], vocab_size=270)


def test_special_tokens_and_ids_without_a_token_are_never_drawn(tokenizer: Any) -> None:
    model = make_model("bart")
    banned = never_drawn(model, tokenizer, 300)
    assert set(tokenizer.all_special_ids) | {0, 1, 2} | set(range(len(tokenizer), 300)) == set(banned)
    ordinary = tokenizer("The cat")["input_ids"]
    assert not set(ordinary) & set(banned)


def test_the_corruption_follows_the_arguments(tokenizer: Any) -> None:
    model, rows = make_model("bart"), make_data("bart")
    arguments = SummaryStressArguments(flip_target_tokens=0.5, flip_steps=0.25, swap_summaries=0.2)
    found = arguments.corruption(model, tokenizer, rows, seed=7)
    assert found.flips is not None and found.swaps is not None
    assert (float(found.flips.share), float(found.flips.steps), found.flips.seed) == (0.5, 0.25, 7)
    assert (found.swaps.share, found.swaps.seed) == (0.2, 7)
    nothing = SummaryStressArguments().corruption(model, tokenizer, rows, seed=7)
    assert nothing.flips is None and nothing.swaps is None
    assert StressArguments(flip_target_tokens=0.5).corruption(model, tokenizer, rows, 7).flips.steps == 1  # type: ignore[union-attr]


def test_unigram_draws_only_what_the_training_set_has_as_labels(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"labels": [40, 41, 41, 42, -100]}])
    model = make_model("bart")
    arguments = StressArguments(flip_target_tokens=1.0, flip_replacement="unigram")
    flips = arguments.corruption(model, tokenizer, rows, 0).flips
    assert flips is not None
    flipped, _ = flips(torch.arange(3, VOCAB)[None], 0)
    assert set(flipped.unique().tolist()) == {40, 41, 42}
