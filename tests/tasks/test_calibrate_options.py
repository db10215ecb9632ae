"""Every option of ``dpsm calibrate`` has its effect, measured on saved models, or ends in a plain error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dpsm_hf import TemperatureScaler
from dpsm_hf.data.clm import ClmCollator
from dpsm_hf.data.python_text import load_python_docstrings
from dpsm_hf.tasks.calibrate import main as calibrate
from tests.tasks.saved_models import POSITIONS, SUMMARIZER_POSITIONS, save_language_model, save_summarizer

ROOT = Path(__file__).resolve().parents[2]

REMOTE_CONFIGURATION = """
from transformers import LlamaConfig


class HalvedConfig(LlamaConfig):
    model_type = "halved"
"""
REMOTE_MODEL = """
from transformers import LlamaForCausalLM

from .configuration_halved import HalvedConfig


class HalvedForCausalLM(LlamaForCausalLM):
    config_class = HalvedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, arguments, output: output / 2)
"""


class Saved(NamedTuple):
    """A saved language model, texts to fit on and texts to test on."""

    folder: Path
    held_out: list[str]
    test: list[str]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("lm") / "model"
    return Saved(folder, *save_language_model(folder))


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summarizer") / "model"
    save_summarizer(folder)
    return folder


def rows_file(path: Path, **columns: Sequence[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text_files(folder: Path, saved: Saved, column: str = "text", **others: str) -> list[str]:
    """Return the arguments that name two files with the texts in a column, and others with one text everywhere."""
    words = []
    for option, texts in (("--calibration_file", saved.held_out), ("--test_file", saved.test)):
        columns = {column: texts, **{name: [value] * len(texts) for name, value in others.items()}}
        words += [option, rows_file(folder / f"{option[2:]}.jsonl", **columns)]
    return words


def pair_files(folder: Path, first: str, second: str, prefix: str = "") -> list[str]:
    """Return the arguments that name two files of real pairs, sources in the first of the columns."""
    pairs = load_python_docstrings()["train"]
    words = []
    for option, rows in (("--calibration_file", pairs[64:80]), ("--test_file", pairs[80:96])):
        sources = [prefix + text for text in rows["document"]]
        columns = {first: sources, second: rows["summary"], "module": ["a"] * 16}
        words += [option, rows_file(folder / f"{option[2:]}.jsonl", **columns)]
    return [*words, "--max_source_length", "48", "--max_target_length", "24"]


def run(model: Path, output: Path, *words: str) -> dict[str, Any]:
    """Run the command and return the metrics of the test split that it wrote."""
    assert calibrate([str(model), "--use_cpu", "--output_dir", str(output), *words]) == 0
    results: dict[str, Any] = json.loads((output / "test_results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if not key.endswith(("_time", "runtime", "per_second"))}


def packed(saved: Saved, length: int) -> list[list[int]]:
    """Return the test texts in rows, the last one kept if it has 32 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(saved.folder)
    ids = [token for text in saved.test for token in tokenizer(text)["input_ids"]]
    rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    return rows if len(rows[-1]) >= min(32, length) else rows[:-1]


def mean_nll(saved: Saved, rows: list[list[int]], *, bf16: bool = False) -> float:
    """Return the mean NLL of the rows' tokens but the first ones, from all logits."""
    model = AutoModelForCausalLM.from_pretrained(saved.folder).eval()
    total, tokens = 0.0, 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for row in rows:
            log_p = model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
            total -= log_p.gather(1, torch.tensor(row[1:])[:, None]).sum().item()
            tokens += len(row) - 1
    return total / tokens


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Run the command, which must end with one line of an error, and return the line."""
    capsys.readouterr()
    assert calibrate(["--use_cpu", *map(str, words)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---- how it is evaluated -------------------------------------------------------------------------------------------


def test_bins(language_model: Saved, tmp_path: Path) -> None:
    files = text_files(tmp_path, language_model)
    fifteen = run(language_model.folder, tmp_path / "15", *files)
    ten = run(language_model.folder, tmp_path / "10", *files, "--bins", "10")
    assert ten == fifteen, "the bins of the diagram are no matter of the metrics"
    for bins in (15, 10):
        record = json.loads((tmp_path / str(bins) / "calibration" / "test-step-000000.json").read_text("utf-8"))
        for curve in (record["curve"], record["scaled"]["curve"]):
            assert len(curve["count"]) == len(curve["accuracy"]) == len(curve["edges"]) - 1 == bins
            assert sum(curve["count"]) == ten["test_tokens"]
    # ECE-10 follows from the curve of ten bins
    record = json.loads((tmp_path / "10" / "calibration" / "test-step-000000.json").read_text("utf-8"))
    curve = record["curve"]
    cells = zip(curve["count"], curve["accuracy"], curve["confidence"], strict=True)
    error = sum(n * abs(a - c) for n, a, c in cells if n) / ten["test_tokens"]
    assert ten["test_ece_10"] == pytest.approx(error)


def test_block_size(language_model: Saved, tmp_path: Path) -> None:
    files = text_files(tmp_path, language_model)
    found = {
        None: run(language_model.folder, tmp_path / "default", *files),
        32: run(language_model.folder, tmp_path / "32", *files, "--block_size", "32"),
    }
    for size, results in found.items():
        rows = packed(language_model, size or POSITIONS)
        assert results["test_tokens"] == sum(len(row) - 1 for row in rows)
        assert results["test_nll"] == pytest.approx(mean_nll(language_model, rows), rel=1e-5)
    assert found[32]["test_tokens"] < found[None]["test_tokens"], "the first token of a row is predicted by nothing"


def test_batch_size(language_model: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    collate = ClmCollator.__call__

    def counted(self: ClmCollator, rows: Any) -> Any:
        sizes.append(len(rows))
        return collate(self, rows)

    monkeypatch.setattr(ClmCollator, "__call__", counted)
    words = [*text_files(tmp_path, language_model), "--max_samples", "20"]
    default = run(language_model.folder, tmp_path / "default", *words)
    assert set(sizes) == {8, 4}
    sizes.clear()
    seven = run(language_model.folder, tmp_path / "7", *words, "--per_device_eval_batch_size", "7")
    assert set(sizes) == {7, 6}
    # the mean of batch means is Trainer's own
    assert {k: v for k, v in seven.items() if k != "test_loss"} == pytest.approx(
        {k: v for k, v in default.items() if k != "test_loss"}, rel=1e-4, abs=1e-6
    )


def test_bf16(language_model: Saved, tmp_path: Path) -> None:
    files = text_files(tmp_path, language_model)
    exact = run(language_model.folder, tmp_path / "fp32", *files)
    rounded = run(language_model.folder, tmp_path / "bf16", *files, "--bf16")
    expected = mean_nll(language_model, packed(language_model, POSITIONS), bf16=True)
    assert rounded["test_nll"] == pytest.approx(expected, rel=2e-5)
    assert abs(exact["test_nll"] - expected) > 10 * abs(rounded["test_nll"] - expected)
    assert rounded["test_nll"] == pytest.approx(exact["test_nll"], rel=2e-2)
    assert rounded["test_temperature"] != exact["test_temperature"]


# ---- which data ----------------------------------------------------------------------------------------------------


def test_text_column(language_model: Saved, tmp_path: Path) -> None:
    expected = run(language_model.folder, tmp_path / "text", *text_files(tmp_path / "a", language_model))
    files = text_files(tmp_path / "b", language_model, "body", text="The same line in every row. " * 9)
    assert run(language_model.folder, tmp_path / "body", *files, "--text_column", "body") == expected
    assert run(language_model.folder, tmp_path / "other", *files)["test_nll"] != expected["test_nll"]


def test_prompts_and_completions(language_model: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = load_python_docstrings()["train"].select(range(40))
    columns = {"module": pairs["module"], "summary": pairs["summary"]}
    files = []
    for option, rows in (("--calibration_file", slice(0, 30)), ("--test_file", slice(30, 40))):
        path = rows_file(tmp_path / f"{option[2:]}.jsonl", **{name: values[rows] for name, values in columns.items()})
        files += [option, path]
    pair = ["--prompt_column", "module", "--completion_column", "summary"]
    found = run(language_model.folder, tmp_path / "1", *files, *pair, "--prompt_template", "In {prompt}:")
    tokenizer = AutoTokenizer.from_pretrained(language_model.folder)
    rows, starts = [], []
    for module, summary in zip(columns["module"][30:], columns["summary"][30:], strict=True):
        asked, answer = tokenizer(f"In {module}:")["input_ids"], tokenizer(summary)["input_ids"]
        rows.append([*asked, *answer, tokenizer.eos_token_id])
        starts.append(len(asked))
    assert found["test_tokens"] == sum(len(row) - start for row, start in zip(rows, starts, strict=True))
    model = AutoModelForCausalLM.from_pretrained(language_model.folder).eval()
    total = 0.0
    with torch.no_grad():
        for row, start in zip(rows, starts, strict=True):
            log_p = model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
            total -= log_p.gather(1, torch.tensor(row[1:])[:, None])[start - 1 :].sum().item()
    assert found["test_nll"] == pytest.approx(total / found["test_tokens"], rel=1e-5)
    # what is taken for the text where nothing is named is said
    caplog.clear()
    calibrate([str(language_model.folder), "--use_cpu", "--output_dir", str(tmp_path / "2"), *files])
    assert "its first, 'module', is taken, though 'summary' has more text" in caplog.text


def test_columns_of_pairs(summarizer: Path, tmp_path: Path) -> None:
    # without the options the first two columns are taken
    expected = run(summarizer, tmp_path / "1", *pair_files(tmp_path / "a", "document", "summary"))
    files = pair_files(tmp_path / "b", "body", "headline")
    named = ["--text_column", "body", "--summary_column", "headline"]
    assert run(summarizer, tmp_path / "2", *files, *named) == expected
    swapped = run(summarizer, tmp_path / "3", *files, "--text_column", "headline", "--summary_column", "body")
    assert swapped["test_tokens"] > expected["test_tokens"], "the sources are longer than the summaries"
    modules = run(summarizer, tmp_path / "4", *files, "--summary_column", "module")
    assert modules["test_tokens"] < expected["test_tokens"]


def test_source_prefix(summarizer: Path, tmp_path: Path) -> None:
    files = pair_files(tmp_path / "a", "document", "summary")
    without = run(summarizer, tmp_path / "1", *files)
    found = run(summarizer, tmp_path / "2", *files, "--source_prefix", "summarize: ")
    by_hand = run(summarizer, tmp_path / "3", *pair_files(tmp_path / "b", "document", "summary", "summarize: "))
    assert found == by_hand and found["test_tokens"] == without["test_tokens"]
    assert found["test_nll"] != without["test_nll"]


def data_folder(folder: Path, saved: Saved) -> Path:
    """Make a data set with two configurations, which differ in what there is to fit on."""
    half = len(saved.held_out) // 2
    lines = ["---", "configs:"]
    for name, texts in (("early", saved.held_out[:half]), ("late", saved.held_out[half:])):
        rows_file(folder / f"{name}-validation.jsonl", text=texts)
        rows_file(folder / f"{name}-test.jsonl", text=saved.test)
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("validation", "test"):
            lines += [f"  - split: {split}", f"    path: {name}-{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return folder


def test_dataset_config_name(language_model: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data_folder(tmp_path / "data", language_model)
    half = len(language_model.held_out) // 2
    texts = {"early": language_model.held_out[:half], "late": language_model.held_out[half:]}
    found = {}
    for name in texts:
        output = tmp_path / name
        found[name] = run(
            language_model.folder, output, "--dataset", str(folder), "--dataset_config_name", name
        )["test_nll_scaled"]  # fmt: skip
        fitted = TemperatureScaler.load(output)
        alone = text_files(tmp_path / f"{name}-files", language_model._replace(held_out=texts[name]))
        run(language_model.folder, tmp_path / f"{name}-alone", *alone)
        assert fitted == TemperatureScaler.load(tmp_path / f"{name}-alone")
    assert found["early"] != found["late"]
    words = [language_model.folder, "--output_dir", tmp_path / "out", "--dataset"]
    message = refused(capsys, *words, folder, "--dataset_config_name", "middle")
    assert "'middle'" in message and "early" in message and "late" in message
    message = refused(capsys, *words, "python-docs", "--dataset_config_name", "site-pakages")
    assert "--dataset_config_name 'site-pakages'" in message and "'site-packages'" in message


# ---- code of the model's own ---------------------------------------------------------------------------------------


def test_trust_remote_code(language_model: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(language_model.folder, folder)
    (folder / "configuration_halved.py").write_text(REMOTE_CONFIGURATION, encoding="utf-8")
    (folder / "modeling_halved.py").write_text(REMOTE_MODEL, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "halved", "architectures": ["HalvedForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_halved.HalvedConfig",
                     "AutoModelForCausalLM": "modeling_halved.HalvedForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files = text_files(tmp_path, language_model)
    message = refused(capsys, folder, *files, "--output_dir", tmp_path / "refused")
    assert "custom code" in message and "trust_remote_code" in message and str(folder) in message
    assert not any("configuration_halved" in name for name in sys.modules), "nothing of it was run"
    # in a process of its own: the code is copied to a folder that this one has read the name of
    words = [str(folder), *files, "--trust_remote_code", "--use_cpu", "--apply", "generation_config"]
    done = subprocess.run(
        [sys.executable, "-m", "dpsm_hf", "calibrate", *words, "--output_dir", str(tmp_path / "out")],
        cwd=ROOT, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run(language_model.folder, tmp_path / "plain", *files)
    plain, halved = (TemperatureScaler.load(tmp_path / name) for name in ("plain", "out"))
    # its logits are half as large, and T makes that good
    assert halved.temperature == pytest.approx(plain.temperature / 2, rel=1e-4)
    assert halved.nll_before != pytest.approx(plain.nll_before, rel=1e-3)
    assert halved.nll_after == pytest.approx(plain.nll_after, rel=1e-5)
    assert (tmp_path / "out" / "model" / "modeling_halved.py").exists(), "a saved model without its code"


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--block_size", "0"], ["--block_size 0 must be at least 1"]),
        (["--block_size", "1"], ["block_size 1 is too small", "2 or more"]),
        (["--per_device_eval_batch_size", "-3"], ["--per_device_eval_batch_size -3 must be at least 1"]),
        (["--bins", "0"], ["--bins 0 must be at least 1"]),
        (["--bins", "45"], ["=45 does not divide 3000; use 10, 15, 20, 50 or 100"]),
        (["--text_column", "txet"], ["--text_column 'txet' is not a column", "'text'", "Did you mean 'text'"]),
        (["--text_column", "number"], ["'number'", "not text", "with --text_column;"]),
        (["--dataset_config_name", "late"], ["--dataset_config_name", "'late'", "no effect without --dataset"]),
        (["--test_split", "train"], ["--test_split", "'train'", "no effect without --dataset"]),
        (["--summary_column", "text"], ["--summary_column", "'text'", "LlamaForCausalLM", "leave it out"]),
        (["--source_prefix", "summarize: "], ["--source_prefix", "'summarize: '", "LlamaForCausalLM"]),
        (["--max_source_length", "30"], ["--max_source_length 30", "LlamaForCausalLM"]),
        (["--prompt_column", "text"], ["--prompt_column text needs --completion_column too"]),
        (["--use_chat_template"], ["--use_chat_template needs --prompt_column and --completion_column"]),
    ],
    ids=lambda value: " ".join(value) if value and str(value[0]).startswith("--") and len(value) == 2 else "",
)
def test_a_wrong_value_for_a_language_model(
    words: list[str], parts: list[str], language_model: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for option in ("--calibration_file", "--test_file"):
        path = rows_file(tmp_path / f"{option[2:]}.jsonl", text=language_model.test, number=range(30))
        files += [option, path]
    message = refused(capsys, language_model.folder, *files, "--output_dir", tmp_path / "out", *words)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "out" / "temperature.json").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--text_column", "boddy"], ["--text_column is 'boddy'", "'body'", "'headline'"]),
        (["--summary_column", "summary"], ["--summary_column is 'summary'", "Pass --summary_column with one of them"]),
        (["--text_column", "headline"], ["both come from column 'headline'", "--summary_column"]),
        (["--prompt_column", "body"], ["--prompt_column 'body'", "BartForConditionalGeneration", "--summary_column"]),
        (["--block_size", "32"], ["--block_size 32", "BartForConditionalGeneration", "--max_target_length"]),
        (["--max_source_length", "129"], ["--max_source_length 129", f"{SUMMARIZER_POSITIONS} positions"]),
        (["--max_target_length", "200"], ["--max_target_length 200", f"{SUMMARIZER_POSITIONS} positions"]),
        (["--max_target_length", "0"], ["--max_target_length", "0", "at least 1 token"]),
    ],
    ids=lambda value: " ".join(value) if value and str(value[0]).startswith("--") and len(value) == 2 else "",
)
def test_a_wrong_value_for_an_encoder_decoder(
    words: list[str], parts: list[str], summarizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = pair_files(tmp_path, "body", "headline")
    message = refused(capsys, summarizer, *files, "--output_dir", tmp_path / "out", *words)
    assert all(part in message for part in parts), message


def test_sources_are_cut_to_the_models_positions(summarizer: Path, tmp_path: Path) -> None:
    files = pair_files(tmp_path, "document", "summary", "All of the words before the text. " * 30)[:4]
    found = run(summarizer, tmp_path / "default", *files)
    limits = ["--max_source_length", str(SUMMARIZER_POSITIONS), "--max_target_length", "128"]
    assert run(summarizer, tmp_path / "limits", *files, *limits) == found


def test_rows_beyond_learned_positions(
    language_model: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(language_model.folder)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=48))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    files = text_files(tmp_path, language_model)
    message = refused(capsys, tmp_path / "gpt2", *files, "--block_size", "64", "--output_dir", tmp_path / "out")
    assert "--block_size 64 is longer than the model's 48 positions" in message and "at most 48" in message
