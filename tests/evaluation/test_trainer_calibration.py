"""What `DPSMTrainer.evaluate` reports of calibration: temperature, bits per byte, end tokens, classes, selection."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    default_data_collator,
)
from transformers.utils import logging as hf_logging

from dpsm_hf import CalibrationCallback, DPSMConfig, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from dpsm_hf.calibration import METRICS
from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.evaluation.depth import DepthReader
from dpsm_hf.evaluation.evaluation import TokenBytes, frequent_labels
from dpsm_hf.evaluation.generation import generated_batch
from dpsm_hf.evaluation.text_metrics import rouge_scores
from dpsm_hf.models.language_model import align_targets
from dpsm_hf.models.token_bytes import token_bytes
from tests.evaluation_trainers import make_trainer
from tests.tiny import VOCAB, make_data

TEXTS = [f"Line {i} of a text, with a naïve café and 日本語 in it.\n" * 3 for i in range(30)]


# ---- text, end tokens, classes -------------------------------------------------------------------------------------


def text_trainer(folder: Path, **options: Any) -> tuple[DPSMTrainer, Any, Dataset]:
    tokenizer = train_bpe_tokenizer(TEXTS, 300)
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS[:5]]
    length = max(map(len, ids))
    rows = Dataset.from_dict({
        "input_ids": [row + [tokenizer.eos_token_id] * (length - len(row)) for row in ids],
        "labels": [row + [-100] * (length - len(row)) for row in ids],
    })  # fmt: skip
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2,
                        eos_token_id=tokenizer.eos_token_id, bos_token_id=None)  # fmt: skip
    args = DPSMConfig(output_dir=str(folder), calibration_metrics="all", use_cpu=True, disable_tqdm=True,
                             dataloader_pin_memory=False,
                      per_device_eval_batch_size=2, **options)  # fmt: skip
    trainer = DPSMTrainer(model=GPT2LMHeadModel(config), args=args, processing_class=tokenizer, eval_dataset=rows)
    trainer.remove_callback(CalibrationCallback)
    return trainer, tokenizer, rows


def test_bits_per_byte_and_end_tokens(tmp_path: Path) -> None:
    trainer, tokenizer, rows = text_trainer(tmp_path)
    metrics = trainer.evaluate()
    # the first token of a row is predicted by nothing
    scored = [row[1:] for row in rows["labels"]]
    text = [tokenizer.decode([t for t in row if t not in (-100, tokenizer.eos_token_id)]) for row in scored]
    size = sum(len(part.encode()) for part in text)
    total = metrics["eval_nll"] * metrics["eval_tokens"]
    assert metrics["eval_bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-9)
    assert metrics["eval_label_bytes"] * metrics["eval_tokens"] == pytest.approx(size)
    assert metrics["eval_eos_tokens"] == 5
    ends = [(i, row.index(tokenizer.eos_token_id) - 1) for i, row in enumerate(rows["labels"])]
    with torch.no_grad():
        log_p = trainer.model(torch.tensor(rows["input_ids"])).logits.log_softmax(-1)
    expected = -sum(log_p[i, j, tokenizer.eos_token_id].item() for i, j in ends) / 5
    assert metrics["eval_eos_nll"] == pytest.approx(expected, rel=1e-5)
    # a row that is cut in the middle of a text: the bytes are those of the labels, not of the tokens before them
    cut = rows.map(lambda row: {name: values[:20] for name, values in row.items()}, load_from_cache_file=False)
    metrics = trainer.evaluate(cut)
    size = sum(len(tokenizer.convert_ids_to_tokens(token)) for row in cut["labels"] for token in row[1:])
    assert metrics["eval_label_bytes"] * metrics["eval_tokens"] == pytest.approx(size) and metrics["eval_tokens"] == 95
    assert "eval_eos_tokens" not in metrics


def test_end_tokens_and_bytes_after_scaling_and_in_the_file(tmp_path: Path) -> None:
    trainer, _, _ = text_trainer(tmp_path)
    trainer.add_callback(CalibrationCallback())
    trainer.use_temperature(1.7)
    metrics = trainer.evaluate()
    ratio = metrics["eval_nll_scaled"] / metrics["eval_nll"]
    assert ratio != 1
    assert metrics["eval_bits_per_byte_scaled"] == pytest.approx(metrics["eval_bits_per_byte"] * ratio, rel=1e-9)
    record = json.loads((tmp_path / "calibration" / "eval-step-000000.json").read_text(encoding="utf-8"))
    assert sum(record["eos"]["curve"]["count"]) == metrics["eval_eos_tokens"] == 5
    for name in ("nll", "confidence", "ece_15"):
        assert record["eos"]["metrics"][name] == metrics[f"eval_eos_{name}"] != record["metrics"][name]


def test_added_tokens_have_bytes(tmp_path: Path) -> None:
    _, tokenizer, _ = text_trainer(tmp_path)
    from_tokenizer = TokenBytes()
    before = from_tokenizer.of(tokenizer)
    tokenizer.add_tokens(["naïve!"])
    assert from_tokenizer.of(tokenizer).tolist() == [*before.tolist(), len("naïve!".encode())]


def test_bytes_are_those_of_the_tokenizer_and_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, by_byte, _ = text_trainer(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr("dpsm_hf.evaluation.evaluation.token_bytes", lambda t: (asked.append(t), token_bytes(t))[1])
    by_word = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for tokenizer in (by_byte, by_word):
        trainer.processing_class = tokenizer
        for _ in range(2):
            assert ("eval_bits_per_byte" in trainer.evaluate()) == (tokenizer is by_byte)
    assert asked == [by_byte, by_word]


@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_classwise_error_of_the_most_frequent_tokens(fused_head: str, tmp_path: Path) -> None:
    trainer, _, rows = text_trainer(tmp_path, classwise_tokens=5, fused_head=fused_head)
    metrics = trainer.evaluate()
    assert trainer.panel is not None and trainer.panel.classwise is not None
    classes = trainer.panel.classwise.classes.tolist()
    labels = torch.tensor(rows["labels"])
    counts = torch.bincount(labels[labels != -100])
    assert counts[classes].tolist() == counts.sort(descending=True).values[:5].tolist()
    with torch.no_grad():
        p = trainer.model(torch.tensor(rows["input_ids"])).logits[:, :-1].double().softmax(-1)
    labels = labels[:, 1:]
    p, labels = p[labels != -100], labels[labels != -100]
    errors = []
    for k in classes:
        bins = torch.ceil(p[:, k] * 15).long() - 1
        gaps = [((labels == k).double() - p[:, k])[bins == b].sum().abs().item() for b in range(15)]
        errors.append(sum(gaps) / len(labels))
    assert metrics["eval_classwise_ece"] == pytest.approx(sum(errors) / 5, rel=1e-5)


def test_what_no_row_predicts_is_no_frequent_token(tmp_path: Path) -> None:
    data = make_data("gpt2", 11).map(lambda row: {"labels": [7, *row["labels"][1:]]})  # as a BOS would be
    trainer = make_trainer(tmp_path, eval_dataset=data, classwise_tokens=VOCAB)
    trainer.evaluate()
    found = trainer.panel.classwise.classes.tolist()
    scored = {label for row in data["labels"] for label in row[1:]} - {-100}
    assert set(found) == scored and len(scored) < VOCAB
    assert frequent_labels(data, 1).tolist() == [7] and found[0] != 7


def test_classes_are_not_taken_from_what_can_be_read_once() -> None:
    with pytest.raises(ValueError, match="this data set can be read only once"):
        frequent_labels(iter([{"labels": [1, 2]}]), 2)


def test_an_evaluation_within_an_evaluation(tmp_path: Path) -> None:
    data = make_data("gpt2", 11)
    expected = make_trainer(tmp_path, eval_dataset=data).evaluate()["eval_tokens"]
    trainer = make_trainer(tmp_path, eval_dataset=data)
    step, nested = trainer.prediction_step, []

    def step_and_evaluate(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        if not nested:
            nested.append(None)
            nested[0] = trainer.evaluate(data.select([0]), metric_key_prefix="inner")["inner_tokens"]
        return result

    trainer.prediction_step = step_and_evaluate
    assert trainer.evaluate()["eval_tokens"] == expected > nested[0] > 0


def test_nothing_scored_is_no_loss_of_zero(tmp_path: Path) -> None:
    ignored = make_data("gpt2", 4).map(lambda row: {"labels": [-100] * len(row["labels"])})
    metrics = make_trainer(tmp_path, eval_dataset=ignored).evaluate()
    assert math.isnan(metrics["eval_loss"]) and "eval_nll" not in metrics


def test_classes_need_labels_in_the_data(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, classwise_tokens=3)
    with pytest.raises(ValueError, match="the samples of this data set have no 'labels'"):
        trainer.evaluate(make_data("gpt2", 3).remove_columns("labels"))


# ---- depth, and what is generated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama_lora", "bart"])
def test_expected_depth(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, name, expected_depth=True)
    trainer.add_callback(CalibrationCallback())
    trainer.train()
    metrics = trainer.evaluate()
    data = trainer.eval_dataset
    batch = {key: torch.tensor(data[key]) for key in data.column_names}
    reader = DepthReader(trainer.model)
    targets = align_targets(batch["labels"], batch["labels"].shape[1], "aligned" if name == "bart" else "shifted")
    depths = reader.depths(batch, targets)
    assert metrics["eval_expected_depth"] == pytest.approx(depths.double().mean().item())
    low, high = (metrics[f"eval_expected_depth_{end}"] for end in ("low", "high"))
    assert 0 <= low < metrics["eval_expected_depth"] < high <= reader.layers == 2
    record = json.loads((tmp_path / "calibration" / "eval-step-000004.json").read_text(encoding="utf-8"))
    assert sum(record["expected_depth"]["counts"]) == metrics["eval_tokens"]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_what_is_generated_is_scored_as_the_model_scores_it(name: str, beams: int, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, name, predict_with_generate=True, generation_max_length=7, generation_num_beams=beams, max_steps=8
    )
    trainer.add_callback(CalibrationCallback())
    trainer.train()
    metrics = trainer.evaluate()
    data = trainer.eval_dataset
    inputs = {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask")}
    model = trainer.model.eval()
    options = {"max_length": 7, "num_beams": beams}
    with torch.no_grad():
        generated = model.generate(**inputs, **options)
        batch = generated_batch(model, inputs, generated, **options)
        log_p = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.double().log_softmax(-1)
    labels = batch["labels"]
    own = labels != -100
    chosen = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    means = torch.where(own, chosen, 0.0).sum(1) / own.sum(1)
    assert metrics["eval_summary_log_probability"] == pytest.approx(means.mean().item(), rel=1e-5)
    text = own & ~torch.isin(labels, torch.tensor([0, 1, 2]))
    assert metrics["eval_generated_tokens"] == text.sum().item() > 0
    assert metrics["eval_generated_confidence"] == pytest.approx(chosen[text].exp().mean().item(), rel=1e-5)
    assert metrics["eval_summaries"] == len(data)
    record = json.loads((tmp_path / "calibration" / "eval-step-000008.json").read_text(encoding="utf-8"))
    assert record["generated"]["metrics"]["ece_15"] == metrics["eval_generated_ece_15"]
    # the loss and the teacher-forced figures are those of the references
    alone = make_trainer(tmp_path / "alone", name, predict_with_generate=True, generated_calibration=False)
    alone.model.load_state_dict(trainer.model.state_dict())
    without = alone.evaluate()
    assert not any("generated" in key or "summar" in key for key in without)
    assert without["eval_nll"] == metrics["eval_nll"] and without["eval_loss"] == metrics["eval_loss"]


def test_rouge_of_words_where_texts_can_be_decoded(tmp_path: Path) -> None:
    tokenizer = train_bpe_tokenizer(TEXTS, 300)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Dataset.from_dict({"input_ids": [tokenizer(t)["input_ids"][:12] for t in TEXTS[:8]],
                              "labels": [tokenizer(t)["input_ids"][:6] for t in TEXTS[:8]]})  # fmt: skip
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                   decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=end,
                   bos_token_id=end, eos_token_id=end, decoder_start_token_id=end, max_position_embeddings=32)
    )  # fmt: skip
    args = DPSMSeq2SeqConfig(output_dir=str(tmp_path), calibration_metrics="all", use_cpu=True, disable_tqdm=True,
                             predict_with_generate=True,
                             generation_max_length=8, dataloader_pin_memory=False)  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = DPSMSeq2SeqTrainer(
        model=model, args=args, eval_dataset=rows, processing_class=tokenizer, data_collator=collator,
        compute_metrics=lambda prediction: {},
    )  # fmt: skip
    trainer.remove_callback(CalibrationCallback)
    metrics = trainer.evaluate()
    predictions = trainer.predict(rows).predictions
    words = [tokenizer.decode([t for t in row if t >= 0], skip_special_tokens=True) for row in predictions]
    wanted = [tokenizer.decode(row, skip_special_tokens=True) for row in rows["labels"]]
    assert metrics["eval_summary_text_quality"] == pytest.approx(rouge_scores(words, wanted)["rougeL"] / 100)


def test_a_generate_of_another_kind_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, "bart", predict_with_generate=True, generation_max_length=6)
    plain = trainer.model.generate
    monkeypatch.setattr(hf_logging.get_logger("transformers"), "propagate", True)
    # without the start token, as some wrappers return it
    monkeypatch.setattr(trainer.model, "generate", lambda *a, **k: torch.full_like(plain(*a, **k), 5))
    metrics = trainer.evaluate()
    assert "eval_nll" in metrics and not any("generated" in key for key in metrics)
    assert caplog.text.count("the calibration of generated tokens is left out: generated begins with") == 1


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_calibration_chooses_the_best_checkpoint_and_stops(streaming: bool, tmp_path: Path) -> None:
    data = make_data("gpt2", 11)
    trainer = make_trainer(
        tmp_path, eval_dataset=data.to_iterable_dataset() if streaming else data, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_smooth_ece",
        greater_is_better=False, max_steps=12, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_smooth_ece" in entry]
    best = min(logged, key=lambda entry: entry["eval_smooth_ece"])
    assert trainer.state.best_metric == best["eval_smooth_ece"]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    assert trainer.evaluate()["eval_smooth_ece"] == pytest.approx(best["eval_smooth_ece"], rel=1e-6)
    # without a tokenizer the bytes of a token are not known, and where no token is right nothing can be ranked
    unknown = {"label_bytes", "bits_per_byte", "confidence_auroc"}
    assert {f"eval_{name}" for name in METRICS if name not in unknown} <= set(best)


def test_intervals_contain_the_mean_scores(tmp_path: Path) -> None:
    metrics = make_trainer(tmp_path).evaluate()
    for name in ("nll", "perplexity", "brier"):
        assert metrics[f"eval_{name}_low"] < metrics[f"eval_{name}"] < metrics[f"eval_{name}_high"]


def test_a_collator_may_make_more_rows_than_it_was_given_samples(tmp_path: Path) -> None:
    # 11 samples in batches of 4: of the last one too every row counts, for one process fills nothing up
    trainer = make_trainer(tmp_path)
    once = trainer.evaluate()
    trainer.data_collator = lambda rows: default_data_collator([row for row in rows for _ in range(2)])
    twice = trainer.evaluate()
    assert twice["eval_tokens"] == 2 * once["eval_tokens"]
    assert twice["eval_nll"] == pytest.approx(once["eval_nll"], rel=1e-6)


def test_one_document_has_no_interval(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate(make_data("gpt2", 1))
    assert "eval_nll" in metrics and "eval_nll_low" not in metrics
