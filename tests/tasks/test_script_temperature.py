"""--fit_temperature in the two scripts: a calibration split of its own, and every metric before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import run_clm_dpsm
import run_summarization_dpsm
from dpsm_hf import TemperatureScaler
from dpsm_hf.data.loading import load_text_datasets
from dpsm_hf.tasks.language_modelling import LanguageModelling

COMMON = {
    "tokenizer_name": "train-bpe",
    "tokenizer_vocab_size": 300,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
    "log_level": "warning",
    "scoring_rule": "ce",
    "do_train": True,
    "do_eval": True,
    "fit_temperature": True,
}
CLM = {
    **COMMON,
    "model_type": "gpt2",
    "config_overrides": "n_embd=16,n_layer=1,n_head=2",
    "block_size": 48,
    "max_steps": 6,
    "max_eval_samples": 12,
}
SUMMARIES = {
    **COMMON,
    "model_type": "bart",
    "config_overrides": "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16,"
    "encoder_attention_heads=2,decoder_attention_heads=2",
    "max_source_length": 32,
    "max_target_length": 12,
    "max_train_samples": 64,
    "max_eval_samples": 6,
    "max_steps": 12,
    "predict_with_generate": True,
}


def words(folder: Path, options: dict[str, Any]) -> list[str]:
    given = {"output_dir": folder, **options}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def check(results: dict[str, float], folder: Path) -> TemperatureScaler:
    scaler = TemperatureScaler.load(folder)
    assert results["eval_temperature"] == scaler.temperature and scaler.split == "calibration"
    assert scaler.nll_after is not None and scaler.nll_before is not None and scaler.nll_after <= scaler.nll_before
    assert "eval_ece_15_scaled" in results and "eval_smooth_ece_scaled" in results
    saved = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    assert saved["eval_ece_15_scaled"] == results["eval_ece_15_scaled"]
    record = max((folder / "calibration").glob("eval-step-*.json"))
    assert json.loads(record.read_text(encoding="utf-8"))["temperature"] == scaler.temperature
    return scaler


def tokens_in_rows(folder: Path, texts: list[str], *, ends: bool = False) -> int:
    """Return the tokens that rows of 48 predict, the last row kept if it has 32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    number = sum(len(tokenizer(text)["input_ids"]) + ends for text in texts)
    rest = number % 48
    return number // 48 * 47 + (rest - 1 if rest >= 32 else 0)


def tokens_of_summaries(folder: Path, summaries: list[str], length: int) -> int:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(text_target=summaries, max_length=length, truncation=True)["input_ids"]
    return sum(map(len, rows))


def test_language_model_with_a_share_of_train(tmp_path: Path) -> None:
    options = {**CLM, "dataset_name": "python-docs", "do_predict": True, "calibration_split_percentage": 2}
    results = run_clm_dpsm.main(words(tmp_path, options))
    # all of the share, whatever --max_eval_samples says, and nothing of what was trained on
    texts = load_text_datasets("python-docs")["train"]["text"]
    expected = tokens_in_rows(tmp_path, texts[-round(len(texts) * 0.02) :], ends=True)
    assert check(results, tmp_path).tokens == expected
    assert results["test_temperature"] == results["eval_temperature"], "fitted again for the same weights"


@pytest.mark.parametrize("streaming", [False, True])
def test_language_model_with_a_file(streaming: bool, tmp_path: Path) -> None:
    texts = load_text_datasets("python-docs")["train"]["text"][:60]
    files = {
        "train_file": lines(tmp_path / "train.jsonl", texts[:40]),
        "validation_file": lines(tmp_path / "valid.jsonl", texts[40:50]),
        "calibration_file": lines(tmp_path / "held.jsonl", texts[50:]),
        "cache_dir": tmp_path / "cache",
    }
    out = tmp_path / "out"
    scaler = check(run_clm_dpsm.main(words(out, {**CLM, **files, "streaming": streaming})), out)
    assert scaler.tokens == tokens_in_rows(out, texts[50:])


def test_summarisation(tmp_path: Path) -> None:
    options = {"dataset_name": "python-docstrings", "calibration_split_percentage": 2, "val_max_target_length": 10}
    results = run_summarization_dpsm.main(words(tmp_path, {**SUMMARIES, **options}))
    summaries = load_text_datasets("python-docstrings")["train"]["summary"]
    expected = tokens_of_summaries(tmp_path, summaries[-round(len(summaries) * 0.02) :], 10)
    assert check(results, tmp_path).tokens == expected
    assert 0 <= results["eval_generated_supported"] <= 1 and results["eval_summaries"] == 6
    assert results["eval_summary_text_quality"] == pytest.approx(results["eval_rougeL"] / 100, abs=1e-4)


def test_summarisation_with_a_file(tmp_path: Path) -> None:
    pairs = load_text_datasets("python-docstrings")["train"].select_columns(["document", "summary"])
    files: dict[str, Any] = {"cache_dir": tmp_path / "cache", "predict_with_generate": None}
    for split, first, last in (("train", 0, 64), ("validation", 64, 72), ("calibration", 72, 90)):
        path = tmp_path / f"{split}.jsonl"
        pairs.select(range(first, last)).to_json(path)
        files[f"{split}_file"] = path
    scaler = check(run_summarization_dpsm.main(words(tmp_path / "out", {**SUMMARIES, **files})), tmp_path / "out")
    assert scaler.tokens == tokens_of_summaries(tmp_path / "out", pairs["summary"][72:90], 12)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_calibration_split_is_not_trained_on(streaming: bool) -> None:
    whole = [row["text"] for row in load_text_datasets("python-docs")["train"]]
    raw = load_text_datasets(
        "python-docs", streaming=streaming, required_splits=["train", "calibration"], calibration_split_percentage=10
    )
    train, held_out = ([row["text"] for row in raw[split]] for split in ("train", "calibration"))
    assert sorted(train + held_out) == sorted(whole)
    if streaming:
        assert held_out == [text for i, text in enumerate(whole) if i % 100 >= 90]
    else:
        assert train + held_out == whole and len(held_out) == round(len(whole) / 10)


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (run_clm_dpsm.main, {**CLM, "calibration_split_percentage": 0}, "calibration_split_percentage 0 must lie"),
        (
            run_summarization_dpsm.main,
            {**SUMMARIES, "calibration_split_percentage": 100},
            "calibration_split_percentage 100 must lie",
        ),
    ],
)
def test_an_impossible_share(main: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    # before anything is loaded: there is no such data set
    with pytest.raises(ValueError, match=message):
        main(words(tmp_path, {**options, "dataset_name": str(tmp_path / "nothing")}))


def test_a_file_without_its_option(tmp_path: Path) -> None:
    train, held_out = lines(tmp_path / "a.jsonl", ["a text"] * 9), lines(tmp_path / "b.jsonl", ["b text"] * 9)
    options = {**CLM, "train_file": train, "calibration_file": held_out, "fit_temperature": None}
    with pytest.raises(ValueError, match="--calibration_file has no effect without --fit_temperature"):
        run_clm_dpsm.main(words(tmp_path, options))


def test_a_cap_of_the_rows_to_fit_on(tmp_path: Path) -> None:
    train, held_out = lines(tmp_path / "a.jsonl", ["a text"] * 9000), lines(tmp_path / "b.jsonl", ["b text"] * 900)
    files = {**CLM, "train_file": train, "calibration_file": held_out, "dataset_name": None}

    def rows(**options: Any) -> int:
        task = LanguageModelling.parse(words(tmp_path, {**files, **options}))
        task.check()
        task.load_data()
        tokenizer = task.load_tokenizer(task.training_texts)
        return len(task.prepare_rows(tokenizer, task.load_model(tokenizer))[0]["calibration"])

    assert rows(max_calibration_samples=2) == 2 < rows()
    with pytest.raises(ValueError, match="--max_calibration_samples 0 must be at least 1"):
        rows(max_calibration_samples=0)
    with pytest.raises(ValueError, match="--max_calibration_samples has no effect without --fit_temperature"):
        rows(max_calibration_samples=2, fit_temperature=None, calibration_file=None)


def test_evaluating_alone_needs_a_file_to_fit_on(tmp_path: Path) -> None:
    options = {**CLM, "validation_file": lines(tmp_path / "a.jsonl", ["a text"] * 9), "do_train": None,
               "tokenizer_name": "gpt2", "tokenizer_vocab_size": None}  # fmt: skip
    with pytest.raises(ValueError, match="There is no 'calibration' split in the given files.*--calibration_file"):
        run_clm_dpsm.main(words(tmp_path / "out", options))
