"""With cross-entropy, `DPSMSFTTrainer` is `SFTTrainer`: loss, gradient norm and what TRL logs, setting by setting."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.trl.sft import DPSMSFTTrainer, SFTTrainer, data, logged, settings, trained

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

#: The table of docs/trl.md: the data, arguments of the configuration, keywords of the trainer.
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text": ("text", {}, {}),
    "chat": ("messages", {}, {}),
    "prompt-completion": ("prompt_text", {}, {}),
    "prompt-completion as messages": ("prompt_messages", {}, {}),
    "prompt-completion, all tokens scored": ("prompt_text", {"completion_only_loss": False}, {}),
    "assistant only": ("messages", {"assistant_only_loss": True}, {}),
    "packing, bfd": ("messages", {"packing": True, "max_length": 96, "per_device_train_batch_size": 2}, {}),
    "packing, wrapped": (
        "messages",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 48, "per_device_train_batch_size": 2},
        {},
    ),
    "padding-free": ("messages", {"padding_free": True, "max_length": None}, {}),
    "gradient accumulation": (
        "prompt_text",
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {},
    ),
    "gradient checkpointing": ("messages", {"gradient_checkpointing": True}, {}),
    "LoRA": ("messages", {}, {"peft_config": LORA}),
    "bf16": ("messages", {"bf16": True}, {}),
}
#: Beyond the table.
FURTHER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "packing, bfd_split": (
        "messages",
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 48, "per_device_train_batch_size": 2},
        {},
    ),
    "neftune": ("messages", {"neftune_noise_alpha": 5.0}, {}),
    "formatting function": (
        "prompt_text",
        {"completion_only_loss": False},
        {"formatting_func": lambda row: row["prompt"] + row["completion"]},
    ),
    "label smoothing": ("messages", {"label_smoothing_factor": 0.1}, {}),
    "DoRA": ("messages", {}, {"peft_config": replace(LORA, use_dora=True)}),
}


@pytest.mark.parametrize("setting", [*SETTINGS, *FURTHER])
def test_cross_entropy_is_sft_trainer(setting: str, tmp_path: Path) -> None:
    kind, options, more = (SETTINGS | FURTHER)[setting]
    found = []
    for trainer_class, own in ((SFTTrainer, {}), (DPSMSFTTrainer, {"scoring_rule": "ce", "fused_head": "on"})):
        found.append(trained(trainer_class, settings(tmp_path, **options, **own), data(kind), **deepcopy(more)))
    (theirs, their_norms), (ours, our_norms) = found
    # under autocast the two round the head's matmul to bf16 (eps 8e-3) in different places
    tolerance = 1e-3 if setting == "bf16" else 1e-5
    assert len(our_norms) == 2
    assert our_norms == pytest.approx(their_norms, rel=tolerance)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=tolerance)
    for name in ("entropy", "mean_token_accuracy"):
        assert len(logged(ours, name)) == 2
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=10 * tolerance, abs=1e-6)
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
