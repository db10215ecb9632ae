"""The tokenizer and the chat template of a real model: SmolLM2, with a small Llama of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trl.sft import (
    DPSMSFTConfig,
    DPSMSFTTrainer,
    SFTTrainer,
    data,
    logged,
    settings,
    small_model,
    smollm2_tokenizer,
    trained,
)
from tests.trl.test_sft_training import RAMP, SPLIT, WHOLE, by_hand, documents


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return smollm2_tokenizer()


def small(tokenizer: Any) -> Any:
    # its padding is a token that is scored too; with an embedding of zeros it would make all logits equal, and which
    # of them is the largest is a matter of taste: for TRL the first, here each
    return small_model(len(tokenizer), pad=None)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("messages", {}), ("prompt_messages", {}), ("messages", {"packing": True, "max_length": 128})],
    ids=["chat", "prompt-completion", "packing"],
)
def test_cross_entropy_is_sft_trainer(kind: str, options: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    found = [
        trained(trainer, settings(tmp_path, **options, **own), data(kind), model=small(tokenizer), tokenizer=tokenizer)
        for trainer, own in ((SFTTrainer, {}), (DPSMSFTTrainer, {"scoring_rule": "ce", "fused_head": "on"}))
    ]
    (theirs, their_norms), (ours, our_norms) = found
    assert our_norms == pytest.approx(their_norms, rel=1e-5)
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-5), name


@pytest.mark.parametrize("split", [WHOLE, SPLIT], ids=["1 x 8", "4 x 2"])
def test_training_is_what_the_formula_says(split: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    options = settings(tmp_path, fused_head="on", **RAMP, **split)
    rows = data("prompt_messages")
    trainer, _ = trained(DPSMSFTTrainer, options, rows, model=small(tokenizer), tokenizer=tokenizer)
    scored = documents(trainer.train_dataset)
    prompt = tokenizer.apply_chat_template(rows[0]["prompt"], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert scored[0][1].eq(-100).sum() == len(prompt)  # the answer alone is scored, with the end of its turn
    assert "<|im_end|>" in tokenizer.decode(scored[0][1][scored[0][1] != -100])
    assert logged(trainer, "loss") == pytest.approx(by_hand(small(tokenizer), scored), rel=1e-5)


def test_the_template_says_nothing_of_answers(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generation"):  # TRL's error, since it knows no template to put in its place
        DPSMSFTTrainer(
            small(tokenizer), DPSMSFTConfig(**settings(tmp_path, assistant_only_loss=True)),
            train_dataset=data("messages"), processing_class=tokenizer,
        )  # fmt: skip
