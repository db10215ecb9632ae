"""The stress options of both scripts on real text: what reaches the trainer, what is counted, what stays clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import run_clm_dpsm
import run_summarization_dpsm
from dpsm_hf.data.python_text import load_python_docs, load_python_docstrings
from dpsm_hf.data.subsets import fold_of, low_resource
from dpsm_hf.tasks import language_modelling, summarization, task

COMMON = {
    "tokenizer_name": "train-bpe", "tokenizer_vocab_size": 300, "max_steps": 4, "logging_steps": 2, "seed": 3,
    "use_cpu": True, "disable_tqdm": True, "log_level": "warning", "save_strategy": "no", "do_train": True,
    "learning_rate": 0.01,
}  # fmt: skip
CLM = {
    **COMMON, "model_type": "gpt2", "config_overrides": "n_embd=16,n_layer=1,n_head=2", "block_size": 32,
    "per_device_train_batch_size": 4,
}  # fmt: skip
BART = (
    "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2,"
    "encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=64"
)
SUMMARIES = {
    **COMMON, "model_type": "bart", "config_overrides": BART, "max_source_length": 32, "max_target_length": 16,
    "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2,
}  # fmt: skip


def words(folder: Path, options: dict[str, Any]) -> list[str]:
    given = {"output_dir": folder, **options}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that the scripts make."""
    made: list[Any] = []
    for owner in (language_modelling.LanguageModelling, summarization.Summarization):
        kind = owner.trainer_class

        def keep(*args: Any, kind: Any = kind, **kwargs: Any) -> Any:
            made.append(kind(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(owner, "trainer_class", staticmethod(keep))
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The texts of each split that the language-modelling script tokenises."""
    found: dict[str, list[str]] = {}
    original = language_modelling.prepare_clm_datasets

    def spy(raw: Any, *args: Any, **kwargs: Any) -> Any:
        found.update({split: [row["text"] for row in part] for split, part in raw.items()})
        return original(raw, *args, **kwargs)

    monkeypatch.setattr(language_modelling, "prepare_clm_datasets", spy)
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for text in load_python_docs()["train"]["text"] if "\n" in text][:60]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    return [dict(row) for row in load_python_docstrings()["train"].select(range(200))]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("replacement", ["uniform", "unigram"])
def test_flipped_targets_of_a_language_model(
    replacement: str, tmp_path: Path, texts: list[str], trainers: list[Any]
) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    flips = {"flip_target_tokens": 0.1, "flip_steps": 0.5, "flip_replacement": replacement}
    results = run_clm_dpsm.main(words(tmp_path / "out", {**CLM, "train_file": train, "do_eval": True, **flips}))
    # 4 rows of 31 targets a step: 3.1 flips a row, so 3 or 4
    assert results["train_flip_steps"] == 2 and results["train_target_tokens"] == 4 * 4 * 31
    assert 2 * 4 * 3 <= results["train_flipped_tokens"] <= 2 * 4 * 4
    saved = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert saved["train_flipped_tokens"] == results["train_flipped_tokens"]
    logged = [entry["flipped_tokens"] for entry in trainers[0].state.log_history if "loss" in entry]
    assert sum(logged) == results["train_flipped_tokens"] and len(logged) == 2
    outcome = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert outcome["corruption"] == {
        name: results[f"train_{name}"] for name in ("target_tokens", "flipped_tokens", "flip_steps")
    }
    # the very numbers of an evaluation that knows of no corruption
    trainers[0].corruption = type(trainers[0].corruption)()
    assert trainers[0].evaluate()["eval_nll"] == pytest.approx(results["eval_nll"], rel=1e-12)


def test_swapped_summaries(tmp_path: Path, pairs: list[dict[str, str]], trainers: list[Any]) -> None:
    train = write(tmp_path / "train.jsonl", pairs)
    corruption = {"swap_summaries": 0.2, "flip_target_tokens": 0.5}
    results = run_summarization_dpsm.main(words(tmp_path / "out", {**SUMMARIES, "train_file": train, **corruption}))
    assert results["train_pairs"] == 40 and results["train_swapped_summaries"] == 8
    assert results["train_flip_steps"] == 4
    # every row is rounded by itself: at most a token from a half
    assert abs(results["train_flipped_tokens"] - results["train_target_tokens"] / 2) <= 40
    outcome = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert outcome["corruption"]["swapped_summaries"] == 8
    assert set(outcome["corruption"]) == set(trainers[0].corruption_record()) == {
        "target_tokens", "flipped_tokens", "flip_steps", "pairs", "swapped_summaries",
    }  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fold_of_texts_is_validated_on(
    streaming: bool, tmp_path: Path, texts: list[str], seen: dict[str, list[str]]
) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    fold = {"cross_validation_fold": 2, "cross_validation_folds": 4, "streaming": streaming}
    results = run_clm_dpsm.main(
        words(tmp_path / "out", {**CLM, "train_file": train, "do_eval": True, "cache_dir": tmp_path, **fold})
    )
    assert seen["validation"] == [text for text in texts if fold_of([text], 4) == 2]
    assert seen["train"] == [text for text in texts if fold_of([text], 4) != 2]
    assert results["eval_tokens"] > 0


def test_a_fold_of_a_named_set_replaces_its_validation_split(tmp_path: Path) -> None:
    fold = {"cross_validation_fold": 0, "cross_validation_folds": 5, "dataset_name": "python-docstrings"}
    options = {**SUMMARIES, "do_eval": True, "max_steps": 1, "low_resource": 0.02, **fold}
    results = run_summarization_dpsm.main(words(tmp_path, options))
    train = load_python_docstrings()["train"]
    outside = [r for r in train if fold_of([r["document"], r["summary"]], 5) != 0]
    assert results["eval_samples"] == len(train) - len(outside)
    expected = low_resource(Dataset.from_list(outside), 0.02, ("document", "summary"))
    assert results["train_samples"] == len(expected) == -(-len(outside) * 2 // 100)


def test_a_fold_serves_evaluation_alone(tmp_path: Path, texts: list[str], trainers: list[Any]) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    run_clm_dpsm.main(words(tmp_path / "model", {**CLM, "train_file": train, "max_steps": 1}))
    results = run_clm_dpsm.main(
        words(
            tmp_path / "out",
            {
                "model_name_or_path": tmp_path / "model",
                "train_file": train,
                "do_eval": True,
                "block_size": 32,
                "use_cpu": True,
                "log_level": "warning",
                "cross_validation_fold": 1,
                "cross_validation_folds": 3,
            },
        )
    )
    held_out = [text for text in texts if fold_of([text], 3) == 1]
    tokenizer = trainers[1].processing_class
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in held_out)
    assert 0 < results["eval_tokens"] <= tokens and results["eval_tokens"] > 0.9 * tokens


def test_low_resource_texts_are_nested_and_a_share_of_the_text(
    tmp_path: Path, texts: list[str], seen: dict[str, list[str]]
) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    parts = []
    for share in (0.1, 0.5):
        options = {**CLM, "train_file": train, "max_steps": 1, "low_resource": share, "validation_split_percentage": 0}
        run_clm_dpsm.main(words(tmp_path / str(share), {**options, "tokenizer_vocab_size": 270}))
        parts.append(seen["train"])
        assert 0 <= sum(map(len, seen["train"])) - share * sum(map(len, texts)) < max(map(len, texts))
    assert set(parts[0]) < set(parts[1]) < set(texts)


def test_lines_of_a_document_stay_together(tmp_path: Path, texts: list[str], seen: dict[str, list[str]]) -> None:
    documents = [[line for line in text.splitlines() if line.strip()] for text in texts[:20]]
    (tmp_path / "train.txt").write_text("\n\n".join("\n".join(lines) for lines in documents), encoding="utf-8")
    fold = {"cross_validation_fold": 0, "cross_validation_folds": 2, "max_steps": 1, "do_eval": True}
    common = {**CLM, "train_file": tmp_path / "train.txt", "cache_dir": tmp_path / "cache", **fold}
    run_clm_dpsm.main(words(tmp_path / "out", common))
    for lines in documents:
        inside = [line in {text.rstrip("\n") for text in seen["validation"]} for line in lines]
        outside = [line in {text.rstrip("\n") for text in seen["train"]} for line in lines]
        assert all(inside) or all(outside)
    with pytest.raises(ValueError, match=r"--cross_validation_fold keeps documents .*--streaming"):
        run_clm_dpsm.main(words(tmp_path / "stream", {**common, "streaming": True}))


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (run_clm_dpsm.main, {**CLM, "swap_summaries": 0.1}, "swap_summaries is unknown"),
        (run_clm_dpsm.main, {**CLM, "flip_steps": 0.1}, "--flip_steps 0.1 has no effect"),
        (run_clm_dpsm.main, {**CLM, "low_resource": 0}, "--low_resource is 0"),
        (run_summarization_dpsm.main, {**SUMMARIES, "swap_summaries": 1.5}, "--swap_summaries is 1.5"),
        (run_summarization_dpsm.main, {**SUMMARIES, "cross_validation_fold": 1}, "needs --cross_validation_folds"),
    ],
)
def test_errors_come_before_anything_is_loaded(
    main: Any, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "load_text_datasets", None)
    with pytest.raises(ValueError, match=message):
        main(words(tmp_path, {**options, "dataset_name": "python-docs"}))
