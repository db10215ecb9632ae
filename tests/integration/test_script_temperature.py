"""--fit_temperature in the two scripts: a calibration split of its own, and every metric before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import run_clm_dpsm
import run_summarization_dpsm
from dpsm_hf import TemperatureScaler
from dpsm_hf.data.loading import load_text_datasets

COMMON = {
    "tokenizer_name": "train-bpe",
    "tokenizer_vocab_size": 300,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
    "log_level": "warning",
    "loss_type": "ce",
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


def test_language_model_with_a_share_of_train(tmp_path: Path) -> None:
    results = run_clm_dpsm.main(words(tmp_path, {**CLM, "dataset_name": "python-docs", "do_predict": True}))
    check(results, tmp_path)
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
    check(run_clm_dpsm.main(words(tmp_path / "out", {**CLM, **files, "streaming": streaming})), tmp_path / "out")


def test_summarisation(tmp_path: Path) -> None:
    results = run_summarization_dpsm.main(words(tmp_path, {**SUMMARIES, "dataset_name": "python-docstrings"}))
    check(results, tmp_path)
    assert 0 <= results["eval_generated_supported"] <= 1 and results["eval_summaries"] == 6
    assert results["eval_summary_text_quality"] == pytest.approx(results["eval_rougeL"] / 100, abs=1e-4)


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
    with pytest.raises(ValueError, match=message):
        main(words(tmp_path, {**options, "dataset_name": "python-docs"}))


def test_a_file_without_its_option(tmp_path: Path) -> None:
    train, held_out = lines(tmp_path / "a.jsonl", ["a text"] * 9), lines(tmp_path / "b.jsonl", ["b text"] * 9)
    options = {**CLM, "train_file": train, "calibration_file": held_out, "fit_temperature": None}
    with pytest.raises(ValueError, match="--calibration_file has no effect without --fit_temperature"):
        run_clm_dpsm.main(words(tmp_path, options))


def test_evaluating_alone_needs_a_file_to_fit_on(tmp_path: Path) -> None:
    options = {**CLM, "validation_file": lines(tmp_path / "a.jsonl", ["a text"] * 9), "do_train": None,
               "tokenizer_name": "gpt2", "tokenizer_vocab_size": None}  # fmt: skip
    with pytest.raises(ValueError, match="There is no 'calibration' split in the given files.*--calibration_file"):
        run_clm_dpsm.main(words(tmp_path / "out", options))
