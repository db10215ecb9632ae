"""The command ``dpsm calibrate`` on saved models and real files, as its own process and by its main function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpsm_hf import ReliabilityDisplay, TemperatureScaler
from dpsm_hf.__main__ import main as dpsm
from dpsm_hf.data.python_text import load_python_docs, load_python_docstrings
from dpsm_hf.tasks.calibrate import main as calibrate
from tests.tasks.saved_models import save_language_model, save_summarizer

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A small Llama with weights of its own in its head, trained for a few steps on the Python documentation."""
    folder = tmp_path_factory.mktemp("lm")
    held_out, test = save_language_model(folder / "model")
    files = (write_lines(folder / "held-out.txt", held_out), write_lines(folder / "test.txt", test))
    return folder / "model", *files


def scored(folder: Path, texts: list[str], rows: int, *, ends: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 logits of the first rows of 64 tokens, and the labels they predict."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = [tokenizer.eos_token_id] if ends else []
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], *end]]
    block = torch.tensor(ids[: rows * 64]).view(rows, 64)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(block).logits[:, :-1].double(), block[:, 1:]


def lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        return list(file)


def check_figures(
    results: dict[str, float],
    scaler: TemperatureScaler,
    held_out: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Compare a run with logits at hand: the temperature is of the one split, the metrics are of the other."""
    expected = TemperatureScaler.fit(*held_out)
    assert scaler.tokens == expected.tokens and scaler.split == "calibration"
    assert scaler.temperature == pytest.approx(expected.temperature, rel=1e-4)
    assert scaler.nll_before == pytest.approx(expected.nll_before, rel=1e-5)
    logits, labels = test
    assert results["test_tokens"] == labels.numel()
    for suffix, divisor in (("", 1.0), ("_scaled", scaler.temperature)):
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1) / divisor, labels.flatten())
        assert results[f"test_nll{suffix}"] == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.parametrize("apply", ["none", "weights", "generation_config"])
def test_a_language_model(
    apply: str, language_model: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, held_out, test = language_model
    arguments = [str(folder), "--calibration_file", held_out, "--test_file", test, "--output_dir", str(tmp_path)]
    assert calibrate([*arguments, "--apply", apply, "--use_cpu", "--max_samples", "20"]) == 0
    printed = capsys.readouterr().out
    scaler = TemperatureScaler.load(tmp_path)
    results = json.loads((tmp_path / "test_results.json").read_text(encoding="utf-8"))
    assert results["test_temperature"] == scaler.temperature != 1.0
    assert f"temperature {scaler.temperature:.4f}, fitted on {scaler.tokens:,} tokens" in printed
    assert f"{results['test_ece_15']:.4f}" in printed and f"{results['test_ece_15_scaled']:.4f}" in printed
    check_figures(results, scaler, *(scored(folder, lines(path), 20) for path in (held_out, test)))
    assert "test_eos_tokens" not in results, "the rows of a file are lines, no documents"
    record = tmp_path / "calibration" / "test-step-000000.json"
    check_table(printed, results, json.loads(record.read_text(encoding="utf-8")))
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


def check_table(printed: str, results: dict[str, float], record: dict[str, Any]) -> None:
    rows = {line[:22].strip(): line[22:] for line in printed.splitlines()}
    for heading, name in (("NLL (nats)", "nll"), ("ECE-15", "ece_15"), ("MCE-15", "mce")):
        before, after = (
            f"{results[f'test_{name}{suffix}']:.4f}  [{low:.4f}, {high:.4f}]"
            for suffix, (low, high) in (
                ("", record["intervals"][name]), ("_scaled", record["scaled"]["intervals"][name]),
            )
        )  # fmt: skip
        assert before != after and rows[heading].strip().startswith(before) and rows[heading].endswith(after)
    null = [f"{results[f'test_ece_15_null{suffix}']:.4f}" for suffix in ("", "_scaled")]
    assert rows["ECE-15 if calibrated"].split() == null and null[0] != null[1]


def test_the_embedded_texts_are_documents(language_model: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, *_ = language_model
    options = ["--dataset", "python-docs", "--max_samples", "60", "--use_cpu", "--output_dir", str(tmp_path)]
    assert calibrate([str(folder), *options]) == 0
    results = json.loads((tmp_path / "test_results.json").read_text(encoding="utf-8"))
    texts = load_python_docs()
    held_out, test = (scored(folder, texts[split]["text"][:200], 60, ends=True) for split in ("validation", "test"))
    check_figures(results, TemperatureScaler.load(tmp_path), held_out, test)
    ends = (test[1] == AutoTokenizer.from_pretrained(folder).eos_token_id).sum().item()
    assert results["test_eos_tokens"] == ends > 0


def test_an_encoder_decoder_on_a_named_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_summarizer(tmp_path / "model")
    options = "--dataset python-docstrings --max_samples 24 --max_source_length 64 --max_target_length 24 --use_cpu"
    assert calibrate([str(tmp_path / "model"), *options.split(), "--output_dir", str(tmp_path / "out")]) == 0
    assert "ECE-15" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "test_results.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = {
        split: sum(min(24, len(tokenizer(text_target=text)["input_ids"])) for text in pairs["summary"][:24])
        for split, pairs in load_python_docstrings().items()
    }
    assert TemperatureScaler.load(tmp_path / "out").tokens == tokens["validation"]
    assert results["test_tokens"] == tokens["test"] != tokens["validation"]
    # BART ties its head to its embeddings: refused before the evaluation, which is the long part
    again = [str(tmp_path / "model"), *options.split(), "--output_dir", str(tmp_path / "b"), "--apply", "weights"]
    assert calibrate(again) == 2
    assert "its output weights are those of model." in capsys.readouterr().err
    assert not (tmp_path / "b" / "temperature.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "python-docs", "--test_file", "a.txt"], "--dataset and --test_file contradict each other"),
        (["--test_file", "a.txt"], "give --dataset, or both --calibration_file and --test_file"),
        (["--dataset", "python-docs", "--calibration_split", "test"], "are both 'test'"),
        (["--dataset", "python-docs", "--test_split", "tset"], "python-docs has no 'tset' split; it has 'train'"),
        (["--calibration_file", "a.txt", "--test_file", "./a.txt"], "are both './a.txt'"),
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
    assert "nothing' does not exist: give the folder that save_pretrained" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert calibrate([str(tmp_path / "file"), "--dataset", "python-docs"]) == 2
    assert "file' is a file: give the folder" in capsys.readouterr().err


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
