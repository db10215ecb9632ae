"""The documentation as it stands: every Python block runs, every command line parses, the site builds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from dpsm_hf import DPSMConfig, DPSMSeq2SeqConfig, DPSMTrainer
from dpsm_hf.campaign.cli import build_parser
from dpsm_hf.rules import schedules
from dpsm_hf.tasks import TASKS, calibrate, get_task, split
from tests.tiny import make_data, make_model

ROOT = Path(__file__).resolve().parents[2]
#: The pages of modules for `evaluate` are doctests, which their own test runs.
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "evaluate-modules")]
WITH_PYTHON = [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")]
WITH_COMMANDS = [path for path in PAGES if "```bash" in path.read_text(encoding="utf-8")]


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of a language with the number of the line before each."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 1, match.group(1)) for match in found]


class Tokenizer:
    """Of a tokenizer, what a page uses."""

    all_special_ids = (0, 1, 2)


def prepared(path: Path, folder: Path) -> dict[str, Any]:
    """Return the names that a page takes for granted: a model, its data, and figures of an evaluation."""
    seq2seq = path.stem == "stress"
    name = "bart" if seq2seq else "gpt2"
    data = make_data(name, rows=8)
    config = DPSMSeq2SeqConfig if seq2seq else DPSMConfig
    generator = np.random.default_rng(0)
    tokens = np.full(6, 20)
    nll_sums = generator.uniform(20, 60, 6)
    bins = generator.multinomial(20, np.full(15, 1 / 15), 6)
    model = make_model(name)
    held_out = make_data(name, rows=4, seed=2)
    if not seq2seq:  # every other label is what the model predicts: there is a best temperature
        with torch.no_grad():
            best = model(torch.tensor(held_out["input_ids"])).logits.argmax(-1)
        labels = torch.tensor(held_out["input_ids"])
        labels[:, 1::2] = best[:, :-1:2]
        held_out = Dataset.from_dict({**held_out.to_dict(), "labels": labels.tolist()})
    names: dict[str, Any] = {
        "model": model, "train": data, "dev": data, "test": make_data(name, rows=4, seed=1),
        "held_out": held_out, "tokenizer": Tokenizer(),
        "collator": default_data_collator, "args": config(output_dir=str(folder / "out"), max_steps=1),
        "input_ids": torch.tensor(make_data("gpt2", rows=2)["input_ids"]), "np": np, "torch": torch,
        "confidence": [0.9, 0.6, 0.7], "correct": [1, 0, 1], "nll": [0.1, 0.9, 0.4], "document": [0, 0, 1],
        "tokens": tokens, "nll_sums": nll_sums, "base_nll_sums": nll_sums + 1, "count": bins, "base_count": bins,
        "base_correct": bins * 0.5, "base_confidence": bins * 0.6,
    }  # fmt: skip
    if path.stem == "statistics":
        names |= {"correct": bins * 0.5, "confidence": bins * 0.7}
    if path.stem == "trl":
        sft = pytest.importorskip("tests.trl.sft", exc_type=ImportError)
        names |= {"model": sft.small_model(), "tokenizer": sft.small_tokenizer()}
        names |= {"chats": sft.data("messages"), "held_out": sft.data("messages")}
    if path.stem == "audit":
        import dpsm_hf.measuring.profiling

        names |= {"dpsm_hf": dpsm_hf, "trainer": DPSMTrainer(model, names["args"], train_dataset=data)}
    if path.stem == "scripts":
        (folder / "out" / "documents").mkdir(parents=True)
        sums = {"nll": nll_sums, "count": bins, "correct": bins * 0.5, "confidence": bins * 0.6}
        np.savez(folder / "out" / "documents" / "last-test.npz", **sums)
    return names


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schedules, "_SCHEDULES", dict(schedules._SCHEDULES))  # pages register their own
    return tmp_path


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.stem)
def test_python_runs_as_it_stands(path: Path, outside: Path) -> None:
    names = prepared(path, outside)
    for line, code in blocks(path, "python"):
        # the page's own line numbers, for whoever reads the traceback
        exec(compile("\n" * line + code, str(path), "exec"), names)


def commands(path: Path) -> list[str]:
    """Return the command lines of a page, joined over their ends, without comments."""
    text = "\n".join(code for _, code in blocks(path, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.stem)
def test_commands_are_what_the_parsers_take(path: Path, outside: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    scripts = {f"run_{entry.command}_dpsm.py": name for name, entry in TASKS.items()}
    by_command = {entry.command: name for name, entry in TASKS.items()}
    base = {
        "language-modelling": "dataset_name: python-docs\nmodel_type: gpt2\n",
        "summarization": "dataset_name: python-docstrings\nmodel_type: bart\n",
    }
    for command in commands(path):
        words = shlex.split(command)
        if words[:2] == ["accelerate", "launch"] or words[:2] == ["nsys", "profile"]:  # a program that starts another
            words = words[next(place for place, word in enumerate(words) if word in scripts) :]
        match words:
            case ["make", target, *_]:
                assert target in targets, command
            case ["python", script, *rest] if script in scripts:
                parse(scripts[script], rest, base[scripts[script]])
            case [script, *rest] if script in scripts:
                parse(scripts[script], rest, base[scripts[script]])
            case ["dpsm", task, *rest] if task in by_command:
                parse(by_command[task], rest, base[by_command[task]])
            case ["dpsm", "campaign", *rest]:
                build_parser().parse_args(rest)
            case ["dpsm", "doctor", *rest]:
                assert {word for word in rest if word.startswith("--")} <= {"--model", "--json"}, command
            case ["dpsm", "split", *rest]:
                split.check_sizes(split.parser().parse_args(rest).sizes)
            case ["dpsm", "calibrate", *rest]:
                calibrate.parser().parse_args(rest)
            case ["python", script] if script.startswith("examples/"):
                assert (ROOT / script).is_file(), command
            case ["pip" | "nsys" | "export", *_] | ["python", "-m", *_]:
                pass
            case _:
                assert command.startswith("--"), f"{path.name}: nothing here knows how to check: {command}"


def parse(task: str, words: list[str], base: str) -> None:
    """Parse a script's words; what a page leaves out, and a settings file that it names, are filled in."""
    if words == ["--help"]:
        return
    common = "tokenizer_name: train-bpe\ndo_train: true\ndo_eval: true\noutput_dir: out\n"
    Path("settings.yaml").write_text(base + common, encoding="utf-8")
    if words and words[0] == "...":
        words = ["settings.yaml", *words[1:]]
    # what a processor or a GPU must have is not asked of the machine that runs the tests
    words = [word for word in words if word not in ("--bf16", "--fp16")]
    get_task(task).parse([*words, "--use_cpu"]).check()


def test_links_and_references_of_the_site(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("the site needs the extra docs: pip install '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    written = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").glob("*.md")
    }
    assert {name for name in written if name != "README.html"} < pages and "index.html" in pages
    trainers = (tmp_path / "site" / "api" / "trainers.html").read_text(encoding="utf-8")
    assert "alpha_warmup_steps" in trainers and "DPSMSeq2SeqTrainer" in trainers
