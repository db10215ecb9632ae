"""Model cards, written by real trainings and read as the hub reads them; their snippets are run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from dpsm_hf import CalibrationCallback, DPSMConfig, DPSMTrainer
from tests.tiny import VOCAB, make_data, make_model


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]")


def make(folder: Path, model: Any = None, **options: Any) -> DPSMTrainer:
    defaults: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=2,
        per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    return DPSMTrainer(
        model or make_model("gpt2"), DPSMConfig(**{**defaults, **options}), train_dataset=make_data("gpt2", 8),
        eval_dataset=make_data("gpt2", 8, seed=2), processing_class=tokenizer(),
    )  # fmt: skip


def card_of(trainer: Trainer, **given: Any) -> ModelCard:
    trainer.create_model_card(**given)
    return ModelCard.load(Path(str(trainer.args.output_dir)) / "README.md")


def code(card: ModelCard, heading: str) -> str:
    found = re.search(rf"## {heading}\n+```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_hub_reads_tags_data_set_and_results(tmp_path: Path) -> None:
    trainer = make(tmp_path / "tiny")
    trainer.train()
    trainer.use_temperature(2.0)
    metrics = trainer.evaluate()
    card = card_of(trainer, tasks="text-generation", dataset="python-docs", tags=["mine"])
    data = card.data
    assert {"mine", "generated_from_trainer", "dpsm", "calibration"} == set(data.tags)
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "tiny")
    assert data.metrics == ["accuracy", "brier_score", "ece", "nll", "perplexity"]
    results = {
        (result.metric_type, result.metric_name.rpartition("temperature ")[2] == "2"): result
        for result in data.eval_results
    }
    assert {(r.task_type, r.dataset_name, r.dataset_split) for r in data.eval_results} == {
        ("text-generation", "python-docs", "validation")
    }
    for kind, name in (("nll", "nll"), ("ece", "ece_15"), ("brier_score", "brier"), ("perplexity", "perplexity")):
        assert results[kind, False].metric_value == pytest.approx(metrics[f"eval_{name}"], rel=1e-5)
        assert results[kind, True].metric_value == pytest.approx(metrics[f"eval_{name}_scaled"], rel=1e-5)
    assert results["accuracy", False].metric_value == pytest.approx(metrics["eval_token_accuracy"], rel=1e-5)


def test_the_table_has_the_figures_before_and_after_the_temperature_and_the_null_level(tmp_path: Path) -> None:
    trainer = make(tmp_path / "tiny", label_smoothing_factor=0.1)
    trainer.train()
    trainer.use_temperature(2.0)
    found = trainer.with_all_metrics(trainer.evaluate())
    for _ in range(2):  # a second call replaces the first
        text = card_of(trainer).text
    assert text.count("## Training objective") == text.count("## Use") == 1
    assert "schedule linear: alpha 0 -> 1 over 1 steps (of 2)" in text and "label_smoothing_factor=0.1" in text
    assert "More information needed" not in text and "the validation set after 2 steps" in text
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 9 and all(len(line) == 3 for line in table)
    rows = {line[0]: line[1:] for line in table}
    ece = rows["calibration error (ECE, 15 bins)"]
    interval = f"(95 %: {found['eval_ece_15_low']:.4f} to {found['eval_ece_15_high']:.4f})"
    assert ece == [f"{found['eval_ece_15']:.4f} {interval}", f"{found['eval_ece_15_scaled']:.4f}"]
    null = rows["… a perfectly calibrated model would show about"]
    assert null == [f"{found['eval_ece_15_null']:.4f}", f"{found['eval_ece_15_null_scaled']:.4f}"]
    assert "![Reliability diagram: accuracy against confidence](reliability_diagram.png)" in text
    with Image.open(tmp_path / "tiny" / "reliability_diagram.png") as image:
        image.verify()


@pytest.mark.parametrize("adapter", [False, True])
def test_its_lines_of_use_run_and_apply_the_temperature(
    adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model("gpt2")
    if adapter:
        model.save_pretrained("base")
        model = get_peft_model(type(model).from_pretrained("base"), LoraConfig(task_type="CAUSAL_LM", r=2))
    trainer = make(tmp_path / "tiny", model)
    trainer.train()
    trainer.use_temperature(2.0)
    trainer.evaluate()
    trainer.save_model()
    card = card_of(trainer)
    assert card.data.library_name == ("peft" if adapter else "transformers")
    names: dict[str, Any] = {}
    exec(code(card, "Use").replace("The text goes here", "w5 w6 w7"), names)
    ids = torch.tensor([[5, 6, 7]])
    trainer.model.eval()
    with torch.no_grad():
        expected = (trainer.model(input_ids=ids).logits / 2.0).softmax(-1)
    torch.testing.assert_close(names["probabilities"].detach(), expected)
    assert capsys.readouterr().out.count("w5 w6 w7") == 1
    assert ("PEFT" in card.text) == adapter


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        AdaLoraConfig(task_type="CAUSAL_LM", total_step=9, init_r=3, target_modules=["c_attn"], fan_in_fan_out=True),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_lines_to_repeat_it_make_the_same_adapter(config: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path / "tiny", get_peft_model(make_model("gpt2"), config))
    trainer.create_model_card()
    lines = code(card_of(trainer), "Reproduce").split("args =")[0]
    names: dict[str, Any] = {"model": make_model("gpt2")}
    exec(lines, names)
    own, made = (model.peft_config["default"].to_dict() for model in (trainer.model, names["model"]))
    apart = ("base_model_name_or_path",)
    assert {k: v for k, v in made.items() if k not in apart} == {k: v for k, v in own.items() if k not in apart}
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (trainer.model, names["model"])]
    assert shapes[0] == shapes[1]


def test_the_arguments_to_repeat_it_make_the_same_config(tmp_path: Path) -> None:
    trainer = make(tmp_path / "tiny", alpha_schedule="cosine", alpha_end=0.5, weight_decay=0.1, seed=7)
    trainer.train()
    source = code(card_of(trainer), "Reproduce").partition("\nDPSMTrainer(")[0]
    names: dict[str, Any] = {}
    exec(source, names)
    again = names["args"]
    assert (again.alpha_schedule, again.alpha_end, again.weight_decay, again.seed) == ("cosine", 0.5, 0.1, 7)
    assert (again.learning_rate, again.max_steps, again.per_device_train_batch_size) == (1e-2, 2, 4)
    assert str(tmp_path) not in source and "score_smoothing" not in source, "a default or a path of this machine"


def test_it_reports_the_weights_that_are_loaded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"metric_for_best_model": "nll", "save_strategy": "steps"}
    trainer = make(tmp_path / "tiny", load_best_model_at_end=True, save_steps=1, max_steps=3, **options)
    trainer.train()
    assert trainer.state.best_global_step == 1, "the first is not the best"
    text = card_of(trainer).text
    assert "after 1 steps" in text
    trainer.remove_callback(CalibrationCallback)  # the log tells as much
    assert "after 1 steps" in card_of(trainer).text


def test_without_an_evaluation_or_with_plain_arguments(tmp_path: Path) -> None:
    data = make_data("gpt2", 4)
    args = TrainingArguments(str(tmp_path / "tiny"), use_cpu=True, disable_tqdm=True, report_to="none")
    card = card_of(DPSMTrainer(make_model("gpt2"), args, train_dataset=data))
    assert not card.data.eval_results and "## Calibration" not in card.text
    assert "from dpsm_hf import DPSMConfig, DPSMTrainer" in card.text


def test_the_text_of_another_class_is_kept(tmp_path: Path) -> None:
    class Writer(Trainer):
        def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None) -> None:
            path = Path(str(self.args.output_dir)) / "README.md"
            path.write_text("---\ntags:\n- other\n---\n\n# Another card\n\nIts own words.\n", encoding="utf-8")

    from dpsm_hf import DPSMMixin

    class Both(DPSMMixin, Writer):
        pass

    args = DPSMConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", eval_strategy="no")
    trainer = Both(make_model("gpt2"), args, eval_dataset=make_data("gpt2", 4))
    trainer.evaluate()
    for _ in range(2):
        card = card_of(trainer, dataset_name="hub/data")
    assert "Its own words." in card.text and card.text.count("## Training objective") == 1
    assert card.data.tags == ["other", "dpsm", "calibration"]
    assert {result.dataset_name for result in card.data.eval_results} == {"hub/data"}
