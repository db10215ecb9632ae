"""What --extra_eval_datasets, --early_stopping_patience, --evaluate_best and --sample_outputs accept and refuse."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from dpsm_hf import DPSMConfig
from dpsm_hf.tasks.arguments import OutcomeArguments, settle_best_checkpoint
from dpsm_hf.tasks.command_line import parse_script_arguments
from dpsm_hf.tasks.extra_datasets import ExtraDataset, parse_extra_datasets
from dpsm_hf.tasks.stopping import evaluations_since_best


def test_the_syntax_of_extra_sets(tmp_path: Path) -> None:
    odd = tmp_path / "a,b=c.txt"
    odd.write_text("text")
    assert parse_extra_datasets(["books=python-docs", f"odd={odd}", "xsum=org/xsum,split=validation,config=1.0"]) == [
        ExtraDataset("books", "python-docs"),
        ExtraDataset("odd", str(odd)),
        ExtraDataset("xsum", "org/xsum", config="1.0", split="validation"),
    ]
    (named,) = parse_extra_datasets(["d=set,text=dialogue,summary=gist"])
    assert (named.text_column, named.summary_column) == ("dialogue", "gist")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["books"], "write NAME=SOURCE"),
        (["books="], "write NAME=SOURCE"),
        (["1st=python-docs"], "must begin with a letter"),
        (["my-books=python-docs"], "must begin with a letter"),
        (["test=python-docs"], "does not begin with eval, test"),
        (["eval_2=python-docs"], "does not begin with eval, test"),
        (["Best=python-docs"], "does not begin with eval, test"),
        (["a=python-docs", "a=python-docstrings"], r"of the name 'a' already \(python-docs\)"),
        (["a=python-docs,spilt=test"], "'spilt=test' is not understood"),
        (["a=python-docs,split=test,split=train"], "'split=train' is not understood"),
        ([f"a={__file__},split=test"], "a file has neither configurations nor splits"),
    ],
)
def test_extra_sets_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutcomeArguments(extra_eval_datasets=words)


def test_extra_sets_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--extra_eval_datasets a=python-docs: it has the splits .*'test'"):
        ExtraDataset("a", "python-docs", split="dev").load()
    with pytest.raises((FileNotFoundError, ConnectionError), match="--extra_eval_datasets a=no/such-set: "):
        ExtraDataset("a", "no/such-set").load(cache_dir=str(tmp_path))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="--extra_eval_datasets a=.*empty"):
        ExtraDataset("a", str(tmp_path / "empty.jsonl")).load(cache_dir=str(tmp_path))


def test_the_split_of_an_extra_set() -> None:
    assert len(ExtraDataset("a", "python-docs").load()) != len(ExtraDataset("a", "python-docs", split="train").load())
    named, default = (ExtraDataset("a", "python-docs", split=split).load() for split in ("test", None))
    assert named["text"] == default["text"]


def test_the_columns_of_an_extra_set() -> None:
    own = ("document", "summary")
    assert ExtraDataset("a", "f.json").pair_columns(["id", "document", "summary"], own) == own
    assert ExtraDataset("a", "f.json").pair_columns(["dialogue", "gist"], own) == ("dialogue", "gist")
    assert ExtraDataset("a", "org/dialogsum").pair_columns(["id", "dialogue", "summary"], own) == (
        "dialogue",
        "summary",
    )
    named = ExtraDataset("a", "f.json", text_column="b", summary_column="c")
    assert named.pair_columns(["a", "b", "c", *own], own) == ("b", "c")
    with pytest.raises(ValueError, match="--extra_eval_datasets a=f.json: .*'b'.* but the columns there are: 'x'"):
        named.pair_columns(["x"], own)


def test_one_extra_set_in_a_file_of_arguments(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    for text, names in (("a=python-docs", ["a"]), ("[a=python-docs, b=python-docs]", ["a", "b"])):
        path.write_text(f"extra_eval_datasets: {text}\n")
        (parsed,) = parse_script_arguments((OutcomeArguments,), [str(path)])
        assert [extra.name for extra in parsed.extra_datasets()] == names
    (parsed,) = parse_script_arguments(
        (OutcomeArguments,), ["--extra_eval_datasets", "a=python-docs", "b=python-docs"]
    )
    assert [extra.name for extra in parsed.extra_datasets()] == ["a", "b"]


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_ece_15", False), ("ece_15", False), ("eval_held_out_smooth_ece_scaled", False), ("eval_loss", False),
        ("eval_perplexity", False), ("eval_rougeL", True), ("eval_token_accuracy", True), ("eval_piece", True),
    ],
)  # fmt: skip
def test_which_end_of_a_metric_is_the_good_one(metric: str, greater: bool, tmp_path: Path) -> None:
    for given, expected in ((None, greater), (True, True), (False, False)):
        config = DPSMConfig(output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=given)
        assert config.greater_is_better is expected


def settled(folder: Path, outcome: dict[str, Any], **training: Any) -> DPSMConfig:
    defaults = {"do_train": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config = DPSMConfig(output_dir=str(folder), use_cpu=True, **{**defaults, **training})
    settle_best_checkpoint(OutcomeArguments(**outcome), config)
    return config


def test_what_the_best_checkpoint_is_best_in(tmp_path: Path) -> None:
    for outcome in ({"evaluate_best": True}, {"early_stopping_patience": 2}):
        config = settled(tmp_path, outcome)
        assert (config.metric_for_best_model, config.greater_is_better) == ("eval_nll", False)
    config = settled(tmp_path, {"evaluate_best": True}, metric_for_best_model="eval_rougeL", save_strategy="best")
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_rougeL", True)
    assert settled(tmp_path, {}).metric_for_best_model is None
    epochs = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    assert settled(tmp_path, {"evaluate_best": True}, **epochs).metric_for_best_model == "eval_nll"


@pytest.mark.parametrize(
    ("outcome", "training", "message"),
    [
        ({"early_stopping_patience": 0}, {}, "must be at least 1"),
        ({"sample_outputs": -1}, {}, "--sample_outputs -1 must be"),
        ({"early_stopping_patience": 2}, {"eval_strategy": "no"}, "--early_stopping_patience 2 needs evaluations"),
        ({"evaluate_best": True}, {"eval_strategy": "no"}, "--evaluate_best needs evaluations"),
        ({"evaluate_best": True}, {"do_train": False}, "--evaluate_best concerns training and needs --do_train"),
        (
            {"evaluate_best": True},
            {"save_strategy": "no"},
            "--save_strategy steps --save_steps 2 .it is --save_strat.* no",
        ),
        ({"evaluate_best": True}, {"save_steps": 4}, r"--save_steps 2 \(it is --save_strategy steps --save_steps 4\)"),
        ({"evaluate_best": True}, {"save_strategy": "epoch"}, r"\(it is --save_strategy epoch\)"),
        ({"evaluate_best": True}, {"load_best_model_at_end": True}, "leave out --load_best_model_at_end"),
        ({}, {"metric_for_best_model": "eval_nll", "greater_is_better": True}, "nll is better when it is lower"),
        ({}, {"metric_for_best_model": "ece_15", "greater_is_better": True}, "--greater_is_better is true: leave"),
    ],
)
def test_options_that_are_refused(
    outcome: dict[str, Any], training: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        settled(tmp_path, outcome, **training)


@pytest.mark.parametrize("greater", [False, True])
def test_the_count_is_that_of_transformers(greater: bool, tmp_path: Path) -> None:
    """Every sequence of five values, NaN and infinity among them."""
    config = DPSMConfig(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="x", greater_is_better=greater,
    )  # fmt: skip
    for values in itertools.product([0.0, 1.0, math.nan, math.inf], repeat=5):
        theirs, state = EarlyStoppingCallback(9), TrainerState()
        for value in values:
            theirs.on_evaluate(config, state, TrainerControl(), {"eval_x": value})
            # as Trainer._determine_best_metric does behind the callback
            start = -math.inf if greater else math.inf
            state.best_metric = start if state.best_metric is None else state.best_metric
            if value > state.best_metric if greater else value < state.best_metric:
                state.best_metric = value
        ours = evaluations_since_best(list(values), greater=greater)
        assert ours == theirs.early_stopping_patience_counter, values
