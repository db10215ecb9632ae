"""Training at alpha > 0 with `DPSMSFTTrainer`, against one by hand from full logits, one document at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, set_seed

from dpsm_hf import AlphaScheduleCallback, CalibrationCallback
from tests.reference import reference_loss
from tests.trl.sft import (
    DPSMSFTConfig,
    DPSMSFTTrainer,
    SFTConfig,
    SFTTrainer,
    data,
    logged,
    settings,
    small_model,
    small_tokenizer,
    trained,
)

ALPHAS = (0.0, 0.5, 1.0)
RAMP = {"alpha_schedule": "linear", "alpha_warmup_steps": 2, "max_steps": 3}
WHOLE = {"per_device_train_batch_size": 8}
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def documents(dataset: Dataset) -> list[tuple[Tensor, Tensor]]:
    """The ids and labels of a tokenized set, packed rows cut at their documents."""
    found = []
    for row in dataset:
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        found += zip(ids.split(lengths), labels.split(lengths), strict=True)
    return found


def by_hand(model: nn.Module, rows: list[tuple[Tensor, Tensor]], rate: float = 0.5) -> list[float]:
    """Train on all rows at each step, alpha by alpha; returns the losses."""
    losses = []
    count = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for alpha in ALPHAS:
        total = torch.zeros(())
        for ids, labels in rows:
            scored = labels[1:] != -100
            logits = model(input_ids=ids[None]).logits[0, :-1][scored]
            total = total + reference_loss(logits, labels[1:][scored], "dpsm", alpha=alpha).sum() / count
        gradients = torch.autograd.grad(total, parameters)
        losses.append(float(total.detach()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
    return losses


def adapted() -> Any:
    model = small_model()
    set_seed(3)
    return get_peft_model(model, LORA)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat, 1 x 8": ("messages", WHOLE),
    "chat, 4 x 2": ("messages", SPLIT),
    "prompt-completion, 4 x 2": ("prompt_text", SPLIT),
    "assistant only, 4 x 2": ("messages", {**SPLIT, "assistant_only_loss": True}),
    "packing, bfd": ("messages", {**WHOLE, "packing": True, "max_length": 96}),
    "packing, wrapped": (
        "messages",
        {"per_device_train_batch_size": 32, "packing": True, "packing_strategy": "wrapped", "max_length": 48},
    ),
    "padding-free, 4 x 2": ("messages", {**SPLIT, "padding_free": True, "max_length": None}),
    "LoRA, 4 x 2, checkpointing": ("messages", {**SPLIT, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_what_the_formula_says(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    make = adapted if "LoRA" in case else small_model
    options = settings(tmp_path, fused_head="on", **RAMP, **options)
    trainer, _ = trained(DPSMSFTTrainer, options, data(kind), model=make())
    expected = make()
    losses = by_hand(expected, documents(trainer.train_dataset))
    assert len(trainer.train_dataset) <= trainer.get_total_train_batch_size(trainer.args)  # all rows at each step
    assert logged(trainer, "alpha") == list(ALPHAS)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-5)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6, msg=name)


def test_packed_documents_are_those_of_the_set(tmp_path: Path) -> None:
    found = []
    for options in ({}, {"packing": True}):
        config = DPSMSFTConfig(**settings(tmp_path, max_length=128, **options))
        trainer = DPSMSFTTrainer(
            small_model(), config, train_dataset=data("messages"), processing_class=small_tokenizer()
        )
        found.append(sorted(ids.tolist() for ids, _ in documents(trainer.train_dataset)))
    assert found[0] == found[1]


def test_evaluation_is_of_tokens_and_keeps_what_trl_logs(tmp_path: Path) -> None:
    held_out = data("messages", 14).select(range(8, 14))
    metrics = []
    for kind, own in ((SFTTrainer, {}), (DPSMSFTTrainer, {"scoring_rule": "ce"})):
        trainer, _ = trained(kind, settings(tmp_path, **own), data("messages"))
        metrics.append(trainer.evaluate(held_out))
    theirs, ours = metrics
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    rows = documents(trainer._prepare_dataset(held_out, small_tokenizer(), trainer.args, False, None, "held out"))
    with torch.no_grad():
        logits = [trainer.model(input_ids=ids[None]).logits[0, :-1] for ids, _ in rows]
    stacked, targets = torch.cat(logits), torch.cat([labels[1:] for _, labels in rows])
    assert ours["eval_nll"] == pytest.approx(float(reference_loss(stacked, targets, "ce").mean()), rel=1e-5)
    assert ours["eval_brier"] == pytest.approx(float(reference_loss(stacked, targets, "brier").mean()), rel=1e-5)
    entropy = -(stacked.softmax(-1) * stacked.log_softmax(-1)).sum(-1).mean()
    assert trainer.panel is not None  # the name in the log is TRL's, a mean over batches; here it is over tokens
    assert trainer.panel.metrics()["entropy"] == pytest.approx(float(entropy), rel=1e-5)


def test_padding_free_evaluation_scores_the_same_tokens(tmp_path: Path) -> None:
    found = []
    for options in ({}, {"padding_free": True}):
        config = DPSMSFTConfig(**settings(tmp_path, max_length=None, **options))
        trainer = DPSMSFTTrainer(
            small_model(), config, train_dataset=data("messages"), processing_class=small_tokenizer()
        )
        found.append(trainer.evaluate(data("messages", 14)))
    padded, flat = found
    assert flat["eval_nll"] == pytest.approx(padded["eval_nll"], rel=1e-6)
    assert flat["eval_ece_15"] == pytest.approx(padded["eval_ece_15"], rel=1e-4)


def test_a_temperature_is_fitted_on_conversations(tmp_path: Path) -> None:
    rows = data("messages", 20)
    config = DPSMSFTConfig(**settings(tmp_path, fit_temperature=True))
    more = dict(train_dataset=rows.select(range(8)), processing_class=small_tokenizer())
    with pytest.raises(ValueError, match="calibration_dataset is eval_dataset itself"):
        DPSMSFTTrainer(
            small_model(), config, eval_dataset=rows.select(range(8, 14)),
            calibration_dataset=rows.select(range(8, 14)), **more,
        )  # fmt: skip
    trainer = DPSMSFTTrainer(
        small_model(), config, eval_dataset=rows.select(range(8, 14)),
        calibration_dataset=rows.select(range(14, 20)), **more,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_nll_scaled"] > 0 and metrics["eval_temperature"] > 0
    again = trainer.evaluate()  # with the temperature that is known by now
    for name in ("eval_entropy", "eval_mean_token_accuracy"):
        assert metrics[name] == pytest.approx(again[name], rel=1e-12)  # the passes of the fit are no evaluations


def test_users_metrics_get_logits(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def shape(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"rows": float(len(prediction.label_ids))}

    trainer, _ = trained(DPSMSFTTrainer, settings(tmp_path), data("messages"), compute_metrics=shape)
    metrics = trainer.evaluate(data("messages", 4))
    assert metrics["eval_rows"] == 4 and seen[0][0] == 4 and seen[0][2] == 400
    assert metrics["eval_nll"] > 0


def test_a_resumed_run_ends_with_the_same_weights_and_tokens(tmp_path: Path) -> None:
    options = settings(tmp_path / "one", max_steps=4, save_strategy="steps", save_steps=2, alpha_warmup_steps=4)
    whole, _ = trained(DPSMSFTTrainer, options, data("messages"))
    card = (tmp_path / "one" / "README.md").read_text()
    assert "Dynamic Proper-Score Mixing" in card and "- dpsm" in card and "- sft" in card
    again = DPSMSFTTrainer(
        small_model(), DPSMSFTConfig(**options), train_dataset=data("messages"), processing_class=small_tokenizer()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert logged(again, "num_tokens") == logged(whole, "num_tokens")
    assert logged(again, "entropy") == logged(whole, "entropy")


def test_experts_are_balanced_with_the_weight_of_the_arguments(tmp_path: Path) -> None:
    def experts() -> MixtralForCausalLM:
        set_seed(1)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, pad_token_id=1,
                bos_token_id=0, eos_token_id=2,
            )
        )  # fmt: skip

    found: list[tuple[Trainer, list[float]]] = []
    for kind, own in ((SFTTrainer, {}), (DPSMSFTTrainer, {"scoring_rule": "ce"})):
        options = settings(tmp_path, router_aux_loss_coef=0.5, **own)
        found.append(trained(kind, options, data("messages"), model=experts()))
    (theirs, their_norms), (ours, our_norms) = found
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    assert logged(ours, "aux_loss") == pytest.approx(logged(theirs, "aux_loss"), rel=1e-5)
    assert our_norms == pytest.approx(their_norms, rel=1e-5)
    held_out = data("messages", 12).select(range(8, 12))
    expected = theirs.evaluate(held_out)["eval_aux_loss"]
    assert ours.evaluate(held_out)["eval_aux_loss"] == pytest.approx(expected, rel=1e-5)


def test_plain_arguments_train_with_announced_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = DPSMSFTTrainer(
        small_model(), SFTConfig(**settings(tmp_path)), train_dataset=data("messages"),
        processing_class=small_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "alpha") == [0.0, 1.0]
    said = capsys.readouterr()
    assert "DPSM | " in said.out + said.err and "args=DPSMSFTConfig(scoring_rule=" in said.out + said.err
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(AlphaScheduleCallback) == kinds.count(CalibrationCallback) == 1
