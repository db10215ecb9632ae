"""Labels that a text is made to begin with: found, kept out of the figures, reported apart, not fitted on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration

from dpsm_hf import DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer
from dpsm_hf.evaluation.forced_tokens import forced_labels, forced_token_ids
from tests.tiny import VOCAB, make_data

BOS, EOS = 0, 2


def test_only_the_beginning_of_the_scored_labels_is_forced() -> None:
    targets = torch.tensor([[0, 7, 5, 0, 2], [-100, 9, 0, 4, 2], [5, 0, 4, 2, -100], [0, 2, -100, -100, -100]])
    found = forced_labels(targets, torch.tensor([0, 9]))
    assert found.int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert not forced_labels(targets, torch.tensor([], dtype=torch.int64)).any()


def test_which_tokens_a_text_may_be_made_to_begin_with() -> None:
    tokenizer = SimpleNamespace(all_special_ids=[0, 1, 2, 3, 40], unk_token_id=3, mask_token_id=None, pad_token_id=1)
    core: Any = SimpleNamespace(
        generation_config=SimpleNamespace(forced_bos_token_id=41, bos_token_id=0, eos_token_id=2), config=None
    )
    assert forced_token_ids(core, tokenizer) == (0, 40, 41)
    assert forced_token_ids(core) == (0, 41)
    gpt2: Any = SimpleNamespace(generation_config=SimpleNamespace(bos_token_id=5, eos_token_id=5), config=None)
    assert forced_token_ids(gpt2) == (), "the token that ends a text does not begin it, even if it is the same"


def trainer(folder: Path, **options: Any) -> DPSMSeq2SeqTrainer:
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, dropout=0.0,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=1, decoder_start_token_id=EOS, forced_bos_token_id=BOS,
    ))  # fmt: skip
    args = DPSMSeq2SeqConfig(
        output_dir=str(folder), calibration_metrics="all", use_cpu=True, disable_tqdm=True, **options
    )
    return DPSMSeq2SeqTrainer(model=model, args=args)


def data(seed: int = 0) -> Dataset:
    return make_data("bart", 6, seed=seed).map(lambda row: {"labels": [BOS, *row["labels"][1:]]})


def test_forced_tokens_are_reported_apart_and_nowhere_else(tmp_path: Path) -> None:
    rows = data()
    apart, among = (trainer(tmp_path, ignore_forced_tokens=value) for value in (True, False))
    mine, theirs = apart.evaluate(rows), among.evaluate(rows)
    assert mine["eval_loss"] == theirs["eval_loss"], "the loss is not changed"
    assert mine["eval_forced_tokens"] == 6 and mine["eval_tokens"] == theirs["eval_tokens"] - 6
    assert not any("forced" in name for name in theirs)
    batch = {name: torch.tensor(rows[:][name]) for name in ("input_ids", "attention_mask", "labels")}
    log_p = F.log_softmax(apart.model(**batch).logits.detach(), -1)
    labels = batch["labels"]
    nll = -log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    assert mine["eval_forced_nll"] == pytest.approx(nll[:, 0].mean().item(), rel=1e-5)
    assert mine["eval_nll"] == pytest.approx(nll[:, 1:][labels[:, 1:] != -100].mean().item(), rel=1e-5)
    assert apart.panel is not None and apart.panel.record(15)["forced"]["metrics"]["tokens"] == 6


def test_no_temperature_is_fitted_on_them(tmp_path: Path) -> None:
    """A forced token that is all but certain, or all but impossible, would pull the temperature to itself."""
    rows = Dataset.from_list([
        {"input_ids": [5, 6, EOS], "attention_mask": [1, 1, 1], "labels": [BOS, 7, 7, token, 7, EOS]}
        for token in (7, 9, 11)
    ])  # fmt: skip
    found = {}
    for ignored in (True, False):
        for bias in (-8.0, -4.0):
            made = trainer(tmp_path, ignore_forced_tokens=ignored)
            made.model.final_logits_bias[0, [BOS, 7, 9, EOS]] = torch.tensor([bias, 4.0, 1.0, 2.0])
            found[ignored, bias] = made.fit_temperature(rows).temperature
    assert found[True, -8.0] == pytest.approx(found[True, -4.0], rel=0.02)
    assert found[False, -8.0] > 1.1 * found[False, -4.0] > 1.1 * found[True, -4.0]
