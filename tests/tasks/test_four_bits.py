"""QLoRA by the scripts' options: an adapter on a base of 4 bits (bitsandbytes), on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")

from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpsm_hf.tasks.adapters import AdapterArguments
from dpsm_hf.tasks.calibrate import main as calibrate
from dpsm_hf.tasks.language_modelling import LanguageModelling
from tests.tasks.adapter_run import CALM, command, save_base, words
from tests.tasks.clm_run import real_texts, write


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A finished run with the fused head and a merged copy: folder and metrics."""
    out = tmp_path_factory.mktemp("trained") / "out"
    options = {"load_in_4bit": True, "fused_head": "on", "merge_adapter": True, "fit_temperature": True}
    return out, LanguageModelling.main(command(base, out, **options))


def test_the_layers_are_of_four_bits_and_the_output_layer_is_not(base: Path) -> None:
    options = AdapterArguments(lora_r=4, load_in_4bit=True).quantization()
    model = AutoModelForCausalLM.from_pretrained(base / "model", **options)
    kinds = {name.rpartition(".")[2]: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "weight")}
    assert kinds["q_proj"] == kinds["down_proj"] == "Linear4bit" and kinds["lm_head"] == "Linear"
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


def test_the_fused_head_gives_the_figures_of_the_logits(
    trained: tuple[Path, dict[str, float]], base: Path, tmp_path: Path
) -> None:
    _, ours = trained
    given = {"load_in_4bit": True, "fused_head": "off", "fit_temperature": True}
    theirs = LanguageModelling.main(command(base, tmp_path / "off", **given))
    for name in ("train_loss", "eval_nll", "eval_brier", "eval_nll_scaled"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    plain = LanguageModelling.main(command(base, tmp_path / "plain", **given | {"load_in_4bit": None}))
    assert plain["eval_nll"] != pytest.approx(ours["eval_nll"], rel=1e-5)  # the base's numbers were rounded


def test_only_the_adapter_is_saved_and_it_is_evaluated_again(
    trained: tuple[Path, dict[str, float]], base: Path, tmp_path: Path
) -> None:
    out, metrics = trained
    saved = load_file(out / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved) and not (out / "model.safetensors").exists()
    text = str(base / "train.txt")
    options: dict[str, Any] = {"validation_file": text, "do_eval": True, "block_size": 32, "max_eval_samples": 8}
    again = LanguageModelling.main(
        words(model_name_or_path=out, output_dir=tmp_path / "again", load_in_4bit=True, **options, **CALM)
    )
    assert again["eval_nll"] == metrics["eval_nll"] and again["eval_brier"] == metrics["eval_brier"]


def test_a_resumed_run_is_bit_equal(base: Path, tmp_path: Path) -> None:
    given = {"load_in_4bit": True}
    whole = LanguageModelling.main(command(base, tmp_path / "whole", **given))
    with pytest.raises(SystemExit) as ended:
        LanguageModelling.main(command(base, tmp_path / "parts", stop_at_step=2, **given))
    assert ended.value.code == 0
    parts = LanguageModelling.main(command(base, tmp_path / "parts", **given))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert parts["eval_nll"] == whole["eval_nll"]


def test_the_merged_model_is_the_adapter_on_the_base_as_it_is_saved(trained: tuple[Path, dict[str, float]]) -> None:
    out, _ = trained
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    assert not hasattr(merged.config, "quantization_config")


def test_calibrate_takes_the_base_as_it_is_saved(
    trained: tuple[Path, dict[str, float]], base: Path, tmp_path: Path
) -> None:
    other = write(tmp_path, "txt", real_texts()[40:], "test")
    figures = []
    for model in (trained[0], trained[0] / "merged"):
        out = tmp_path / model.name
        given = [str(model), "--calibration_file", str(base / "train.txt"), "--test_file", str(other), "--use_cpu"]
        assert calibrate([*given, "--block_size", "32", "--max_samples", "8", "--output_dir", str(out)]) == 0
        figures.append(json.loads((out / "test_results.json").read_text(encoding="utf-8"))["test_nll_scaled"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
