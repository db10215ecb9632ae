"""`dpsm doctor`, through its process: what it finds, what it says of models, and what it does with broken packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, MixtralConfig, T5Config, ViTConfig, XLNetConfig

from dpsm_hf.tasks.doctor import TESTED
from dpsm_hf.tasks.model_path import path_of

ROOT = Path(__file__).resolve().parents[2]


def doctor(*words: str, path: str = "") -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "dpsm_hf", "doctor", "--json", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def found(report: dict[str, Any], part: str) -> dict[str, tuple[str, str]]:
    return {line["name"]: (line["said"], line["state"]) for line in report[part]}


def test_a_sound_machine() -> None:
    code, report = doctor()
    assert code == 0 and report["sound"] is True
    versions = found(report, "Versions")
    assert {"python", "dpsm_hf", *TESTED} <= set(versions)
    assert "cores" in found(report, "Devices")["CPU"][0] and "GB free" in found(report, "Caches")["HF_HOME"][0]
    extras = found(report, "Extras")
    assert all("pip install" in said for said, _ in extras.values() if said.startswith("not installed"))


def test_broken_and_missing_packages_are_lines(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("raise OSError('libtorn.so: cannot open shared object file')")
    code, report = doctor("--model", "./nowhere", path=str(tmp_path))
    said, state = found(report, "Versions")["peft"]
    assert code == 1 and report["sound"] is False and state == "error" and "libtorn.so" in said
    assert found(report, "Versions")["torch"][1] != "error", "the others are still looked at"
    assert report["Model"][0]["state"] == "error"


@pytest.mark.parametrize(
    ("config", "labels", "fused"),
    [
        (GPT2Config(), "shifted", "yes"),
        (T5Config(decoder_start_token_id=0), "aligned", "yes"),
        (XLNetConfig(), "aligned", ""),
        (MixtralConfig(hidden_size=64, intermediate_size=64, output_router_logits=True), "shifted", ""),
    ],
)
def test_which_path_a_model_takes(config: Any, labels: str, fused: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    said = {name: (words, state) for name, words, state in path_of(str(tmp_path))}
    assert said["labels"][0].startswith(labels)
    assert said["fused head"][0].startswith(fused) and said["fused head"][1] != "error"
    assert ("adds a term of its own" in said["own loss"][0]) == isinstance(config, MixtralConfig)


def test_of_an_adapter_the_base_is_asked_about(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    GPT2Config().save_pretrained(base)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    )
    assert path_of(str(adapter)) == path_of(str(base))


def test_a_model_that_the_package_knows_by_name(smollm2: Path) -> None:
    assert path_of("smollm2-135m")[0] == ("class", "LlamaForCausalLM", "ok")


def test_what_is_no_language_model_is_said(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTConfig"):  # a line of the report, like every error
        path_of(str(tmp_path))


def test_the_tested_versions_are_those_of_the_project() -> None:
    setup, pins = (ROOT / "setup.cfg").read_text(), (ROOT / "constraints.txt").read_text()
    oldest = (ROOT / "Makefile").read_text().partition("OLDEST := ")[2].splitlines()[0]
    for name, (low, high) in TESTED.items():
        bound = re.search(rf"^    {name}>=([\d.]+)", setup, re.MULTILINE)
        assert bound is not None and low.startswith(f"{bound[1]}."), name
        assert re.search(rf"^{name}=={re.escape(high)}( |$)", pins, re.MULTILINE), name
        assert f"{name}=={low}" in oldest.split(), name
