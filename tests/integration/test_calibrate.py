"""The command ``dpsm calibrate`` on saved models and real files, as its own process and by its main function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from dpsm_hf import ReliabilityDisplay, TemperatureScaler
from dpsm_hf.__main__ import main as dpsm
from dpsm_hf.calibrate import main as calibrate
from dpsm_hf.data.python_text import load_python_docs, load_python_docstrings
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def train(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A small Llama with weights of its own in its head, trained for a few steps on the Python documentation."""
    folder = tmp_path_factory.mktemp("lm")
    texts = load_python_docs()["train"]["text"][:120]
    tokenizer = train_bpe_tokenizer(texts, 600)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
                    bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    )  # fmt: skip
    ids = torch.tensor([t for text in texts[:60] for t in tokenizer(text)["input_ids"]])
    blocks = ids[: len(ids) // 512 * 512].view(-1, 8, 64)[:60]
    train(model, [{"input_ids": block, "labels": block} for block in blocks])
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = (write_lines(folder / "held-out.txt", texts[60:90]), write_lines(folder / "test.txt", texts[90:120]))
    return folder / "model", *files


@pytest.mark.parametrize("apply", ["none", "weights", "generation_config"])
def test_a_language_model(
    apply: str, language_model: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, held_out, test = language_model
    arguments = [str(folder), "--calibration_file", held_out, "--test_file", test, "--output_dir", str(tmp_path)]
    assert calibrate([*arguments, "--apply", apply, "--use_cpu", "--max_samples", "40"]) == 0
    printed = capsys.readouterr().out
    scaler = TemperatureScaler.load(tmp_path)
    results = json.loads((tmp_path / "test_results.json").read_text(encoding="utf-8"))
    assert results["test_temperature"] == scaler.temperature != 1.0
    assert f"temperature {scaler.temperature:.4f}, fitted on {scaler.tokens:,} tokens" in printed
    assert f"{results['test_ece_15']:.4f}" in printed and f"{results['test_ece_15_scaled']:.4f}" in printed
    record = tmp_path / "calibration" / "test-step-000000.json"
    assert ReliabilityDisplay.from_json(record).split == "test" and record.with_suffix(".png").exists()
    assert (tmp_path / "model").exists() == (apply != "none")
    if apply == "none":
        return
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "model"))
    ids = torch.arange(20)[None]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id is not None
    with torch.no_grad():
        old, new = before(ids).logits, after(ids).logits
    if apply == "weights":
        torch.testing.assert_close(new, old / scaler.temperature, rtol=1e-5, atol=1e-5)
        assert not (tmp_path / "model" / "temperature.json").exists(), "it would be applied twice"
    else:
        assert torch.equal(old, new)
        assert after.generation_config.temperature == pytest.approx(scaler.temperature)
        assert after.generation_config.do_sample
        assert TemperatureScaler.load(tmp_path / "model") == scaler


def test_an_encoder_decoder_on_a_named_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = load_python_docstrings()["train"][:64]
    tokenizer = train_bpe_tokenizer([*pairs["document"], *pairs["summary"]], 600)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                   decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=end,
                   bos_token_id=end, eos_token_id=end, decoder_start_token_id=end, max_position_embeddings=128)
    )  # fmt: skip
    rows = [(tokenizer(d)["input_ids"][:64], tokenizer(s)["input_ids"][:24]) for d, s in
            zip(pairs["document"], pairs["summary"], strict=True)]  # fmt: skip
    train(model, [{"input_ids": torch.tensor([d]), "labels": torch.tensor([s])} for d, s in rows])
    model.save_pretrained(tmp_path / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    options = "--dataset python-docstrings --max_samples 24 --max_source_length 64 --max_target_length 24 --use_cpu"
    assert calibrate([str(tmp_path / "model"), *options.split(), "--output_dir", str(tmp_path / "out")]) == 0
    assert "ECE-15" in capsys.readouterr().out
    # BART ties its head to its embeddings: refused before the evaluation, which is the long part
    again = [str(tmp_path / "model"), *options.split(), "--output_dir", str(tmp_path / "b"), "--apply", "weights"]
    assert calibrate(again) == 2
    assert "its output weights are those of its embeddings" in capsys.readouterr().err
    assert not (tmp_path / "b" / "temperature.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "python-docs", "--test_file", "a.txt"], "--dataset and --test_file contradict each other"),
        (["--test_file", "a.txt"], "give --dataset, or both --calibration_file and --test_file"),
        (["--dataset", "python-docs", "--calibration_split", "test"], "are both 'test'"),
        (["--dataset", "python-docs", "--test_split", "tset"], "python-docs has no 'tset' split; it has 'train'"),
        (["--dataset", "python-docs", "--max_samples", "0"], "--max_samples 0 must be at least 1"),
        (["--dataset", "python-docs", "--bins", "7"], "calibration_bins=7 does not divide 3000"),
    ],
)
def test_refused(
    arguments: list[str], message: str, language_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate([str(language_model[0]), *arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate([str(tmp_path / "nothing"), "--dataset", "python-docs"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert dpsm([]) == 0 and "calibrate" in capsys.readouterr().out
    assert dpsm(["--version"]) == 0 and capsys.readouterr().out.startswith("dpsm_hf ")
    assert dpsm(["calibarte"]) == 2 and "there is no command 'calibarte'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        dpsm(["calibrate", "--help"])
    assert "--calibration_split" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "dpsm_hf", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "usage: dpsm COMMAND" in done.stdout
