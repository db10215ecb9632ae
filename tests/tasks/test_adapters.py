"""LoRA, DoRA and what belongs to them by the scripts' options, on small real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpsm_hf.tasks import adapters
from dpsm_hf.tasks.adapters import save_merged
from dpsm_hf.tasks.calibrate import main as calibrate
from dpsm_hf.tasks.language_modelling import LanguageModelling
from dpsm_hf.tasks.summarization import Summarization
from tests.tasks.adapter_run import CALM, LORA, command, save_base, words
from tests.tasks.clm_run import real_texts, write
from tests.tasks.saved_models import save_summarizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A finished run with an adapter, its temperature and a merged copy: folder and metrics."""
    out = tmp_path_factory.mktemp("trained") / "out"
    options = {"merge_adapter": True, "fit_temperature": True, "sample_outputs": 1, "continuation_rouge": 3}
    return out, LanguageModelling.main(command(base, out, **options))


def test_only_the_adapter_is_trained_and_saved(trained: tuple[Path, dict[str, float]], base: Path) -> None:
    out, metrics = trained
    saved = load_file(out / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (out / "model.safetensors").exists()
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)  # B begins as zero
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32, 0.1)
    adapted_layers = {name.rpartition(".")[2] for name in config["target_modules"]}
    mlp, attention = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted_layers == mlp | attention  # all but the output layer
    assert config["base_model_name_or_path"] == str(base / "model")
    adapted = AutoPeftModelForCausalLM.from_pretrained(out)  # plain PEFT finds the base too
    assert isinstance(adapted, PeftModel)
    outcome = json.loads((out / "outcome.json").read_text(encoding="utf-8"))
    assert outcome["metrics"]["last"]["validation"]["nll"] == metrics["eval_nll"]
    assert outcome["efficiency"]["flops_per_step"] > 0 and outcome["samples"][0]["output"]
    assert 0 <= metrics["eval_rougeL"] <= 100 and metrics["eval_nll_scaled"] > 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and "Training objective" in card


def test_the_merged_model_is_the_adapted_one(trained: tuple[Path, dict[str, float]]) -> None:
    out, _ = trained
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out / "merged")("The value of the expression", return_tensors="pt")
    with torch.no_grad():
        theirs, ours = merged(**ids).logits, adapted(**ids).logits
    assert torch.allclose(theirs, ours, atol=1e-5) and type(merged).__name__ == "LlamaForCausalLM"
    assert (out / "merged" / "temperature.json").read_bytes() == (out / "temperature.json").read_bytes()


def test_a_saved_adapter_is_evaluated_with_its_base(
    trained: tuple[Path, dict[str, float]], base: Path, tmp_path: Path
) -> None:
    out, metrics = trained
    text = str(base / "train.txt")
    options = {"validation_file": text, "do_eval": True, "block_size": 32, "max_eval_samples": 8, **CALM}
    again = LanguageModelling.main(words(model_name_or_path=out, output_dir=tmp_path / "again", **options))
    assert again["eval_nll"] == metrics["eval_nll"] and again["eval_brier"] == metrics["eval_brier"]


@pytest.mark.parametrize("apply", ["none", "weights"])
def test_calibrate_finds_the_base_of_an_adapter(
    apply: str, trained: tuple[Path, dict[str, float]], base: Path, tmp_path: Path
) -> None:
    out, _ = trained
    other = write(tmp_path, "txt", real_texts()[40:], "test")
    given = [str(out), "--calibration_file", str(base / "train.txt"), "--test_file", str(other), "--use_cpu"]
    given += ["--block_size", "32", "--max_samples", "8", "--output_dir", str(tmp_path / "out"), "--apply", apply]
    assert calibrate(given) == 0
    figures = json.loads((tmp_path / "out" / "test_results.json").read_text(encoding="utf-8"))
    assert figures["test_nll_scaled"] > 0
    if apply == "weights":  # a whole model, ready to be used
        scaled = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        merged = AutoModelForCausalLM.from_pretrained(out / "merged")
        temperature = json.loads((tmp_path / "out" / "temperature.json").read_text(encoding="utf-8"))["temperature"]
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert torch.allclose(scaled(ids).logits, merged(ids).logits / temperature, atol=1e-5)


def figures_of(base: Path, model: Path, out: Path, **options: Any) -> dict[str, float]:
    """Evaluate a saved model as the runs of `command` do."""
    given = {"validation_file": base / "train.txt", "do_eval": True, "block_size": 32, "max_eval_samples": 8}
    return LanguageModelling.main(words(model_name_or_path=model, output_dir=out, **given, **CALM, **options))


def calibrated(base: Path, model: Path, out: Path, apply: str) -> int:
    """Fit a temperature by the command; return its status."""
    other = write(out.parent, "txt", real_texts()[40:], "test")
    given = [str(model), "--calibration_file", str(base / "train.txt"), "--test_file", str(other), "--use_cpu"]
    return calibrate([*given, "--block_size", "32", "--max_samples", "8", "--output_dir", str(out), "--apply", apply])


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_target_modules": ["q_proj", "lm_head"]},
        {"lora_target_modules": "q_proj", "lora_modules_to_save": "lm_head"},
    ],
    ids=["DoRA", "output layer", "saved beside"],
)
def test_other_kinds_are_merged_and_calibrated(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = LanguageModelling.main(command(base, out, max_steps=2, merge_adapter=True, **options))
    again = figures_of(base, out, tmp_path / "again")
    assert (again["eval_nll"], again["eval_brier"]) == (metrics["eval_nll"], metrics["eval_brier"])
    assert calibrated(base, out, tmp_path / "scaled", "weights") == 0
    temperature = json.loads((tmp_path / "scaled" / "temperature.json").read_text(encoding="utf-8"))["temperature"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(out)
    merged, scaled, plain = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (out / "merged", tmp_path / "scaled" / "model", base / "model")
    )
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = adapted(ids).logits
        assert torch.allclose(merged(ids).logits, logits, atol=1e-5)
        assert torch.allclose(scaled(ids).logits, logits / temperature, atol=1e-5)
        assert not torch.allclose(plain(ids).logits, logits, atol=1e-2)


def test_prompt_tuning_is_evaluated_and_calibrated_but_neither_merged_nor_trained_further(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options make none, but one that PEFT has saved is a model like others."""
    prompt = tmp_path / "prompt"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(prompt)
    fused, full = (figures_of(base, prompt, tmp_path / mode, fused_head=mode) for mode in ("on", "off"))
    assert fused["eval_nll"] == pytest.approx(full["eval_nll"], rel=1e-6)
    further = command(base, tmp_path / "further", lora_r=None, lora_target_modules=None, lora_dropout=None,
                      fused_head="on")  # fmt: skip
    further[further.index(str(base / "model"))] = str(prompt)
    with pytest.raises(ValueError, match="kind PROMPT_TUNING, which PEFT does not train further once it is saved"):
        LanguageModelling.main(further)
    assert calibrated(base, prompt, tmp_path / "calibrated", "none") == 0
    figures = json.loads((tmp_path / "calibrated" / "test_results.json").read_text(encoding="utf-8"))
    assert figures["test_nll_scaled"] > 0
    capsys.readouterr()
    assert calibrated(base, prompt, tmp_path / "scaled", "weights") == 2
    assert (
        "kind PROMPT_TUNING, which cannot be merged into weights: leave out --apply weights" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="cannot be merged into weights: leave --merge_adapter out"):
        save_merged(AutoModelForCausalLM, prompt, str(base / "model"))


@pytest.mark.parametrize("dora", [False, True])
def test_a_resumed_adapter_is_bit_equal(dora: bool, base: Path, tmp_path: Path) -> None:
    given = {"use_dora": dora}
    whole = LanguageModelling.main(command(base, tmp_path / "whole", **given))
    with pytest.raises(SystemExit) as ended:
        LanguageModelling.main(command(base, tmp_path / "parts", stop_at_step=2, **given))
    assert ended.value.code == 0 and (tmp_path / "parts" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    parts = LanguageModelling.main(command(base, tmp_path / "parts", **given))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and any("lora_magnitude_vector" in name for name in ours) == dora
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    assert parts["eval_nll"] == whole["eval_nll"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("chosen layers", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("output layer", {"lora_target_modules": ["q_proj", "lm_head"]}),
        ("saved beside", {"lora_target_modules": "q_proj", "lora_modules_to_save": "lm_head"}),
        ("DoRA", {"use_dora": True}),
        ("bf16", {"bf16": True}),
    ],
)
@pytest.mark.parametrize("loss", ["dpsm"])
def test_the_fused_head_stays_in_use(
    loss: str, kind: str, options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """With fused_head on, a model whose head cannot score is an error; and the figures are those without it."""
    metrics = {}
    for fused in ("on", "off"):
        given = {"fused_head": fused, "scoring_rule": loss, "max_steps": 2, "lora_dropout": 0.0, **options}
        metrics[fused] = LanguageModelling.main(command(base, tmp_path / fused, **given))
    for name in ("train_loss", "eval_nll", "eval_brier"):
        tolerance = 2e-2 if kind == "bf16" else 1e-5
        assert metrics["on"][name] == pytest.approx(metrics["off"][name], rel=tolerance), name


def test_summarization_trains_one_too(tmp_path: Path) -> None:
    save_summarizer(tmp_path / "model")
    common = {"dataset_name": "python-docstrings", "do_train": True, "do_eval": True, "max_train_samples": 8,
              "max_eval_samples": 4, "max_source_length": 48, "max_target_length": 16, "max_steps": 2,
              "predict_with_generate": True, "learning_rate": 0.01, "merge_adapter": True}  # fmt: skip
    given = {**common, **LORA, **CALM, "lora_target_modules": ["q_proj", "v_proj"]}
    metrics = Summarization.main(words(model_name_or_path=tmp_path / "model", output_dir=tmp_path / "out", **given))
    assert metrics["eval_nll"] > 0 and "eval_rougeL" in metrics
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_2_SEQ_LM" and (tmp_path / "out" / "merged" / "model.safetensors").is_file()


class TestWhatIsRefused:
    """Contradictions, by name, before anything is loaded; and what the model does not have."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"lora_r": None, "lora_target_modules": None, "lora_dropout": 0.1},
                "lora_dropout has no effect without --lora_r",
            ),
            (
                {"lora_r": None, "lora_target_modules": None, "lora_dropout": None, "use_dora": True},
                "use_dora has no effect",
            ),
            ({"lora_r": 0}, "lora_r 0 must be at least 1"),
            ({"lora_dropout": 1.0}, r"lora_dropout 1.0 must lie in \[0, 1\)"),
            ({"lora_alpha": 0}, "lora_alpha 0 must be at least 1"),
            ({"lora_target_modules": ["all-linear", "q_proj"]}, "all-linear stands alone"),
            ({"lora_target_modules": ["query"]}, "no layer of that name.*q_proj"),
            ({"lora_modules_to_save": ["head"]}, "lora_modules_to_save head.*no layer of that name"),
            ({"merge_adapter": True, "do_train": None}, "merge_adapter writes what was trained"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            LanguageModelling.main(command(base, tmp_path / "out", **options))

    def test_a_fresh_model(self, base: Path, tmp_path: Path) -> None:
        scratch = {"model_type": "gpt2", "tokenizer_name": "train-bpe", "tokenizer_vocab_size": 300}
        given = {**scratch, "train_file": base / "train.txt", "do_train": True, "lora_r": 4, **CALM}
        with pytest.raises(ValueError, match="lora_r 4 adapts a pretrained model"):
            LanguageModelling.main(words(output_dir=tmp_path, **given))

    def test_an_adapter_on_an_adapter(
        self, trained: tuple[Path, dict[str, float]], base: Path, tmp_path: Path
    ) -> None:
        given = command(base, tmp_path / "out")
        given[given.index(str(base / "model"))] = str(trained[0])
        with pytest.raises(ValueError, match="is an adapter already"):
            LanguageModelling.main(given)

    def test_an_adapter_whose_base_is_gone(self, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
        config = json.loads((trained[0] / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(tmp_path / "gone")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match="gone, which is not there"):
            adapters.base_of(tmp_path)

    def test_four_bits_without_bitsandbytes(self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            LanguageModelling.main(command(base, tmp_path / "out", load_in_4bit=True))


def test_an_adapter_of_another_machine_finds_smollm2(smollm2: Path, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "/home/somebody/.cache/huggingface/dpsm_hf/smollm2-135m", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert adapters.base_of(tmp_path) == str(smollm2)
