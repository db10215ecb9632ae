"""``dpsm calibrate --apply``: what it writes is whole, overwrites nobody's model, and has its temperature once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dpsm_hf import TemperatureScaler
from dpsm_hf.runtime.files import write_json
from dpsm_hf.tasks.calibrate import main as calibrate
from dpsm_hf.tasks.scaled_model import RECORD_NAME, check_target, save_scaled
from tests.tasks.saved_models import save_language_model

T = 1.25


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "m"
    save_language_model(folder)
    return folder


def save(source: Path, folder: Path, place: str) -> Any:
    check_target(folder, source)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    save_scaled(model, tokenizer, TemperatureScaler(T), folder, place=place, source=source)
    return AutoModelForCausalLM.from_pretrained(folder)


def folded(source: Path, model: Any) -> float:
    """Return by what the output weights were divided."""
    before = AutoModelForCausalLM.from_pretrained(source).lm_head.weight
    return float((before / model.lm_head.weight).detach().median())


def test_folded_weights_in_the_place_of_a_generation_config(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert save(source, folder, "generation_config").generation_config.temperature == T
    assert TemperatureScaler.load(folder).temperature == T
    model = save(source, folder, "weights")
    assert folded(source, model) == pytest.approx(T, rel=1e-5)
    assert model.generation_config.temperature in (None, 1.0)
    assert not (folder / "temperature.json").exists(), "whoever reads it divides a second time"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folded_weights_of_a_model_that_samples_at_its_temperature(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(source, tmp_path / "sampling", "generation_config")
    model = save(tmp_path / "sampling", tmp_path / "folded", "weights")
    assert folded(source, model) == pytest.approx(T, rel=1e-5)
    assert model.generation_config.temperature in (None, 1.0)
    # one of the user's own stays
    (tmp_path / "sampling" / "temperature.json").unlink()
    model = save(tmp_path / "sampling", tmp_path / "own", "weights")
    assert model.generation_config.temperature == T
    assert "samples at temperature 1.25, which divides the scaled logits once more" in caplog.text


@pytest.mark.parametrize("moment", ["saving", "swapping"])
def test_an_interrupt_leaves_what_was_there(
    moment: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    save(source, folder, "generation_config")

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "saving":
            patch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
        else:
            patch.setattr("dpsm_hf.tasks.scaled_model.write_json", interrupted)
        save(source, folder, "weights")
    assert TemperatureScaler.load(folder).temperature == T
    assert folded(source, AutoModelForCausalLM.from_pretrained(folder)) == 1.0
    assert folded(source, save(source, folder, "weights")) == pytest.approx(T, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nobodys_model_is_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is the model that the temperature is fitted for, and would be overwritten"):
        check_target(source, source.parent / "." / source.name)
    with pytest.raises(ValueError, match="holds something else: give another folder"):
        check_target(source, tmp_path)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", source)
    # what a user may have moved away is none of ours
    save(source, tmp_path / "models" / "model", "weights")
    (tmp_path / "models" / "model").rename(tmp_path / "models" / "model.old")
    save(tmp_path / "models" / "model.old", tmp_path / "models" / "model", "weights")
    assert (tmp_path / "models" / "model.old" / "config.json").exists()
    with pytest.raises(ValueError, match="what an interrupted call has left and is about to be deleted"):
        check_target(tmp_path / "m", tmp_path / ".m.dpsm-old")
    ours = tmp_path / "ours"
    ours.mkdir()
    write_json({"schema": 1}, ours / RECORD_NAME)
    check_target(ours, source)
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "notes.txt").write_text("mine")
    arguments = [str(source), "--dataset", "python-docs", "--apply", "weights", "--output_dir", str(tmp_path / "out")]
    assert calibrate(arguments) == 2
    error = capsys.readouterr().err
    assert "--output_dir" in error and "holds something else" in error
    assert (tmp_path / "out" / "model" / "notes.txt").read_text() == "mine"


def test_the_logits_are_those_of_the_temperature(source: Path, tmp_path: Path) -> None:
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        after = save(source, tmp_path / "out", "weights")(ids).logits
    torch.testing.assert_close(after, before / T, rtol=1e-5, atol=1e-5)
