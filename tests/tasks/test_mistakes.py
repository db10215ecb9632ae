"""What commands say when their user made a mistake: one message and exit code 2; bugs keep their traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_clm_dpsm
from dpsm_hf.__main__ import main as dpsm
from dpsm_hf.runtime.mistakes import exit_status
from dpsm_hf.tasks import get_task
from dpsm_hf.tasks.arguments import ModelSource
from dpsm_hf.tasks.language_modelling import LanguageModelling
from dpsm_hf.tasks.model_building import explained_where_unreachable

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ["--model_type", "gpt2", "--tokenizer_name", "train-bpe", "--use_cpu", "--do_train", "--max_steps", "1"]
pytestmark = pytest.mark.usefixtures("warm_processes")


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], env=known, capture_output=True, text=True, check=False)


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("start", [["-m", "dpsm_hf", "clm"], [str(ROOT / "run_clm_dpsm.py")]])
def test_a_missing_file_is_one_line_in_command_and_script(start: list[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.txt")
    words = [*start, *SCRATCH, "--train_file", missing, "--output_dir", str(tmp_path / "out")]
    done = process(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [line] = errors(done.stderr)
    assert missing in line


def test_a_variable_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["clm", *SCRATCH, "--learning_rate", "fast", "--output_dir", str(tmp_path)]
    assert dpsm(words) == 2
    monkeypatch.setenv("DPSM_HF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--learning_rate fast: this should be a number"):
        dpsm(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clm", "--learning_rate"], "--learning_rate: expected one argument; --help lists the options."),
        (["clm", "--optim", "magic"], "--optim: invalid choice: 'magic'"),
        (["clm", "--nmae", "x"], "nmae is unknown"),
        (["clm", "nowhere.yaml"], "The configuration file 'nowhere.yaml' does not exist."),
        (["summarization", *SCRATCH, "--gce_q", "0.5", "--dataset_name", "python-docstrings"], "gce_q=0.5 has no eff"),
        (["clm", *SCRATCH, "--load_best_model_at_end", "--dataset_name", "python-docs"], "(transformers says so; "),
        (["campaign", "plan", "nowhere.yaml"], "nowhere.yaml"),
        (["campaign", "run", "demo-clm", "--output_dir", "FILE"], "FILE' is a file, not a folder"),
        (["demo", "--output_dir", "FILE/below"], "FILE' is a file, not a folder"),
        (["report", "somewhere", "--output_dir", "FILE"], "FILE' is a file, not a folder"),
        (["report", "somewhere"], "somewhere is not a directory"),
        (["calibrate", "./somewhere", "--dataset", "python-docs"], "the model './somewhere' does not exist"),
    ],
)
def test_mistakes_are_said_in_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    if words[0] in ("clm", "summarization"):
        words = [*words, "--output_dir", "out"]
    assert dpsm(words) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert "usage:" not in said, "two hundred options above the message"


def test_a_model_that_the_hub_cannot_give_is_named_with_what_to_give_instead(tmp_path: Path) -> None:
    said = "We couldn't connect to 'https://huggingface.co' to load the files"
    cases = ({"model_name_or_path": "gpt3"}, {"model_name_or_path": str(tmp_path), "tokenizer_name": "gpt3"})
    for given in cases:
        with pytest.raises(OSError, match=r"^--\w+ gpt3: no folder here, .*smollm2-135m.*train-bpe"):
            with explained_where_unreachable(ModelSource(**given)):
                raise OSError(said)
    for given, error in (({"model_name_or_path": str(tmp_path)}, said), ({"model_name_or_path": "gpt3"}, "disk full")):
        with pytest.raises(OSError, match=f"^{error}"):
            with explained_where_unreachable(ModelSource(**given)):
                raise OSError(error)


def test_an_option_that_begins_alike_is_meant_before_one_that_looks_alike(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_rank is unknown; did you mean lora_r"):
        LanguageModelling.parse(["--lora_rank", "8", "--output_dir", str(tmp_path)])


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        int("no number")

    monkeypatch.setattr(get_task("language-modelling"), "check", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        dpsm(["clm", *SCRATCH, "--dataset_name", "python-docs", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("shapes differ"), ValueError("from a test"), TypeError()]
)
def test_errors_from_elsewhere_are_no_mistakes(error: Exception) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_status(fails)


def test_a_package_that_a_library_lacks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.integrations import SwanLabCallback, is_swanlab_available

    if is_swanlab_available():
        pytest.skip("swanlab is installed here")
    assert exit_status(SwanLabCallback) == 2
    assert "pip install swanlab" in capsys.readouterr().err


def test_the_message_holds_no_credential(capsys: pytest.CaptureFixture[str]) -> None:
    token = "hf_" + "aBcDeFgHiJ" * 3
    assert dpsm(["clm", "--learning_rate", token]) == 2
    assert token not in capsys.readouterr().err


def test_what_the_script_returns_in_python_is_raised_as_ever(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--learning_rate fast"):
        run_clm_dpsm.main([*SCRATCH, "--learning_rate", "fast", "--output_dir", str(tmp_path)])


@pytest.mark.distributed
def test_of_two_processes_one_speaks_and_both_end_at_once(tmp_path: Path) -> None:
    settings = {"model_type": "gpt2", "tokenizer_name": "train-bpe", "output_dir": str(tmp_path / "out"),
                "use_cpu": True, "do_train": True, "train_file": str(tmp_path / "nowhere.txt")}  # fmt: skip
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    began = time.perf_counter()
    done = process(*torchrun, str(ROOT / "run_clm_dpsm.py"), str(tmp_path / "settings.json"))
    assert done.returncode != 0
    [line] = errors(done.stderr)
    assert "nowhere.txt" in line and 'run_clm_dpsm.py", line' not in done.stderr
    assert time.perf_counter() - began < 60
