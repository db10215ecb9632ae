"""--draw_train_samples: each seed trains on rows of its own, drawn from the whole train split, in both scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.runtime.mistakes import exit_status
from dpsm_hf.tasks.language_modelling import LanguageModelling
from dpsm_hf.tasks.summarization import Summarization
from tests.tasks.saved_models import save_language_model, save_summarizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_language_model(folder / "clm")
    save_summarizer(folder / "summaries")
    return folder


def words(base: Path, kind: str, out: Path, *more: str) -> list[str]:
    lengths = {"clm": ["--block_size", "48"], "pairs": ["--block_size", "60"], "summaries": []}[kind]
    pairs = ["--prompt_column", "summary", "--completion_column", "module"] if kind == "pairs" else []
    model = base / ("summaries" if kind == "summaries" else "clm")
    text = ["--text_column_name", "document"] if kind == "clm" else []
    return [
        "--model_name_or_path", str(model), "--dataset_name", "python-docstrings", "--output_dir", str(out),
        "--use_cpu", "--log_level", "error", "--do_train", "--max_train_samples", "20", *lengths, *pairs, *text, *more,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["clm", "pairs", "summaries"])
def test_seeds_draw_rows_of_their_own(kind: str, base: Path, tmp_path: Path) -> None:
    def rows(*more: str) -> list[tuple[int, ...]]:
        task: Any = (Summarization if kind == "summaries" else LanguageModelling).parse(
            words(base, kind, tmp_path, *more)
        )
        task.load_data()
        tokenizer = task.load_tokenizer(task.training_texts)
        found, _ = task.prepare_rows(tokenizer, task.load_model(tokenizer))
        return [tuple(row["input_ids"]) for row in found["train"]]

    first = rows()
    drawn = rows("--draw_train_samples", "--seed", "1")
    assert len(first) == len(drawn) == 20
    # of hundreds of rows: equal ones by chance or because they are the same text
    assert len({*drawn} & {*first}) < 8 and len({*drawn} & {*rows("--draw_train_samples", "--seed", "2")}) < 8
    assert rows("--draw_train_samples", "--seed", "1") == drawn
    assert rows("--draw_train_samples", "--seed", "7", "--data_seed", "1") == drawn


@pytest.mark.parametrize("kind", ["clm", "summaries"])
def test_what_cannot_be_drawn_is_refused(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task: Any = Summarization if kind == "summaries" else LanguageModelling

    def said(*more: str, without: str = "") -> str:
        given = words(base, kind, tmp_path, "--draw_train_samples", *more)
        if without:
            place = given.index(without)
            del given[place : place + 2]
        assert exit_status(lambda: task.main(given), task.__module__) == 2
        return capsys.readouterr().err

    assert "--draw_train_samples draws so many rows as --max_train_samples says" in said(without="--max_train_samples")
    fresh = ["--tokenizer_name", "train-bpe", "--model_type", "gpt2" if kind == "clm" else "bart"]
    assert "another tokenizer with --tokenizer_name train-bpe" in said(*fresh, without="--model_name_or_path")
    if kind == "clm":
        assert "cannot draw from a stream" in said("--streaming", "--max_steps", "2")
