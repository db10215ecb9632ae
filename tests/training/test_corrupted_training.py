"""Trainers on corrupted targets: what is fed, what is scored, what is counted; any split of a step does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.data.corruption import SummarySwaps
from dpsm_hf.training.corruption import COUNTS_FILE, Corruption
from tests import cases
from tests.corrupted_run import CASES, STEPS, build, corruption, last_checkpoint, result, run
from tests.tiny import SEQ2SEQ, make_model

SPLITS = ((4, 2), (2, 4), (1, 8))


@pytest.fixture(scope="module")
def whole() -> dict[Any, Any]:
    """Steps of eight rows in one micro-batch."""
    return {case: run(*case, 8, 1) for case in CASES}


@pytest.fixture(scope="module")
def clean() -> dict[str, Any]:
    """The same without corruption."""
    found = {}
    for name in {name for name, _ in CASES}:
        trainer = build(name, None, 8, 1)
        trainer.train()
        found[name] = result(trainer)
    return found


def by_input(rows: list[Any]) -> dict[Any, Any]:
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flips_change_targets_alone(case: Any, whole: Any, clean: Any) -> None:
    name, kind = case
    steps = whole[case]["rows"]
    flipped = {step for step in steps if any(row[3] != clean_target(name, row) for row in steps[step])}
    assert flipped == ({s for s in range(STEPS) if corruption(kind).flips.flips_step(s)} if kind != "swaps" else set())
    if kind != "swaps":
        assert 0 < len(flipped) < STEPS
    if kind != "flips":
        return
    for step, rows in steps.items():
        expected = by_input(clean[name]["rows"][step])
        for source, labels, decoder, _ in rows:
            # what the model is fed, and the labels of the batch, are the clean ones
            assert (labels, decoder) == expected[source][:2]


def clean_target(name: str, row: Any) -> tuple[int, ...]:
    return row[1] if name in SEQ2SEQ else row[1][1:]


@pytest.mark.parametrize("case", [c for c in CASES if c[1] != "flips"], ids=str)
def test_swaps_exchange_summaries_within_the_step(case: Any, whole: Any, clean: Any) -> None:
    name, _ = case
    swapped = 0
    for step, rows in whole[case]["rows"].items():
        expected = by_input(clean[name]["rows"][step])
        assert sorted(row[1] for row in rows) == sorted(labels for labels, _, _ in expected.values())
        decoders = {labels: decoder for labels, decoder, _ in expected.values()}
        for source, labels, decoder, _ in rows:
            swapped += labels != expected[source][0]
            assert decoder == decoders[labels], "the decoder is fed another summary than it is to write"
    record = whole[case]["record"]
    assert record["swapped_summaries"] == swapped > 0 and record["pairs"] == 8 * STEPS
    # 3.2 of 8, rounded up or down
    assert all(entry["swapped_summaries"] in (3, 4) and entry["pairs"] == 8 for entry in whole[case]["logs"])


@pytest.mark.parametrize("case", [c for c in CASES if c[1] != "swaps"], ids=str)
def test_flipped_tokens_are_counted(case: Any, whole: Any) -> None:
    name, kind = case
    rows = whole[case]["rows"]
    flips = corruption(kind).flips
    for entry in whole[case]["logs"]:
        step = entry["step"] - 1
        targets = [(clean_target(name, row), row[3]) for row in rows[step]]
        changed = sum(a != b for old, new in targets for a, b in zip(old, new, strict=True))
        assert entry["flipped_tokens"] == changed
        assert entry["target_tokens"] == sum(len(old) for old, _ in targets)
        if flips.flips_step(step):
            for old, new in targets:
                number = sum(a != b for a, b in zip(old, new, strict=True))
                assert int(0.3 * len(old)) <= number <= int(0.3 * len(old)) + 1
        else:
            assert changed == 0
    record = whole[case]["record"]
    for key in ("flipped_tokens", "target_tokens"):
        assert record[key] == sum(entry[key] for entry in whole[case]["logs"])
    assert record["flip_steps"] == 2 and "counted_from_step" not in record


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_split_of_a_step_is_corrupted_alike(case: Any, split: Any, whole: Any) -> None:
    parts = run(*case, *split)
    assert {step: sorted(rows) for step, rows in parts["rows"].items()} == {
        step: sorted(rows) for step, rows in whole[case]["rows"].items()
    }
    assert parts["logs"] == whole[case]["logs"] and parts["record"] == whole[case]["record"]
    for mine, other in zip(parts["parameters"], whole[case]["parameters"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def first_log(trainer: Any) -> dict[str, float]:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_the_loss_is_that_of_the_flipped_targets(name: str, fused_head: str) -> None:
    trainer = build(name, corruption("flips", steps=1.0), 8, 1, max_steps=1, scoring_rule="ce", fused_head=fused_head)
    model = make_model(name)
    trainer.train()
    logged = first_log(trainer)
    total = tokens = 0.0
    for source, labels, decoder, targets in trainer.rows[0]:
        fed = {"input_ids": torch.tensor([source])}
        if decoder:
            fed["decoder_input_ids"] = torch.tensor([decoder])
        else:
            fed["input_ids"] = fed["input_ids"][:, : len(labels)]
        with torch.no_grad():
            logits = model(**fed).logits[0]
        logits = logits if decoder else logits[:-1]
        total += float(F.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
        tokens += len(targets)
    assert logged["nll"] == pytest.approx(total / tokens, rel=1e-4)
    # Trainer counts one token more a row for GPT-2
    count = tokens + (8 if name == "gpt2" else 0)
    assert logged["loss"] == pytest.approx(total / count, rel=1e-4)


def test_evaluation_during_training_is_clean() -> None:
    """The weights do not move, so evaluation and clean training score the same."""
    trainer = build(
        "gpt2", corruption("flips", share=1.0, steps=1.0), 8, 1, learning_rate=0.0, eval_strategy="steps",
        eval_steps=1, weight_decay=0.0,
    )  # fmt: skip
    clean = build("gpt2", None, 8, 1).evaluate()
    trainer.train()
    evaluated = [entry["eval_nll"] for entry in trainer.state.log_history if "eval_nll" in entry]
    assert evaluated == pytest.approx([clean["eval_nll"]] * STEPS, rel=1e-6)
    assert trainer.corruption_record()["flipped_tokens"] == trainer.corruption_record()["target_tokens"] > 0


def test_the_counts_are_in_the_metrics_of_the_training() -> None:
    trainer = build("bart", corruption("both"), 8, 1)
    metrics = trainer.train().metrics
    record = trainer.corruption_record()
    assert {key: metrics[f"train_{key}"] for key in record} == record
    assert set(record) == {"target_tokens", "flipped_tokens", "flip_steps", "pairs", "swapped_summaries"}


def test_tokens_after_the_last_log_are_counted_too() -> None:
    every, last = run("gpt2", "flips", 8, 1), run("gpt2", "flips", 8, 1, logging_steps=3)
    assert last["record"] == every["record"]
    assert [entry["step"] for entry in last["logs"]] == [3]
    assert last["logs"][0]["flipped_tokens"] == sum(entry["flipped_tokens"] for entry in every["logs"][:3])


def test_without_corruption_nothing_is_logged_or_counted(clean: Any, tmp_path: Path) -> None:
    assert clean["gpt2"]["record"] is None
    assert all(set(entry) == {"step"} for entry in clean["gpt2"]["logs"])
    trainer = build("gpt2", Corruption(), 8, 1, save_strategy="steps", save_steps=2, output_dir=str(tmp_path))
    trainer.train()
    assert not list(tmp_path.rglob(COUNTS_FILE))
    for mine, other in zip(result(trainer)["parameters"], clean["gpt2"]["parameters"], strict=True):
        assert torch.equal(mine, other)


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("logging_steps", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_corrupts_and_counts_what_the_whole_one_does(
    case: Any, logging_steps: int, whole: Any, tmp_path: Path
) -> None:
    name, kind = case
    options = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path), "logging_steps": logging_steps}
    first = build(name, corruption(kind), 4, 2, **options)
    first.add_callback(_StopAt(2))
    first.train()
    second = build(name, corruption(kind), 4, 2, **options)
    second.train(resume_from_checkpoint=True)
    together = {**first.rows, **second.rows}
    assert set(second.rows) == {2, 3}
    assert {s: sorted(rows) for s, rows in together.items()} == {
        s: sorted(rows) for s, rows in whole[case]["rows"].items()
    }
    assert second.corruption_record() == whole[case]["record"]
    if logging_steps == 1:
        assert result(second)["logs"] == whole[case]["logs"]
    elif kind != "swaps":
        expected = sum(entry["flipped_tokens"] for entry in whole[case]["logs"][:3])
        assert [entry["flipped_tokens"] for entry in result(second)["logs"]] == [expected]


def test_a_run_that_was_clean_before_says_since_when_it_counts(tmp_path: Path, whole: Any) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    first = build("gpt2", None, 8, 1, **options)
    first.add_callback(_StopAt(2))
    first.train()
    second = build("gpt2", corruption("flips"), 8, 1, **options)
    second.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    record, complete = second.corruption_record(), whole["gpt2", "flips"]
    assert record["counted_from_step"] == 2
    for key in ("flipped_tokens", "target_tokens"):
        assert record[key] == sum(entry[key] for entry in complete["logs"][2:])
    assert record["flip_steps"] == sum(corruption("flips").flips.flips_step(s) for s in (2, 3))
    # and goes on saying so after another resume
    third = build("gpt2", corruption("flips"), 8, 1, **options)
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert third.corruption_record() == record
    saved = json.loads((tmp_path / "checkpoint-4" / COUNTS_FILE).read_text())
    assert saved["from_step"] == 2


def test_a_checkpoint_that_is_not_there_is_the_error_it_was(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)) as plain:
        build("gpt2", None, 8, 1).train(resume_from_checkpoint=str(tmp_path / "none"))
    with pytest.raises(type(plain.value)) as corrupted:
        build("gpt2", corruption("flips"), 8, 1).train(resume_from_checkpoint=str(tmp_path / "none"))
    assert str(corrupted.value) == str(plain.value)


def test_shifted_labels_of_the_collator_are_flipped_alike() -> None:
    """A collator may bring the targets itself; then those are flipped."""
    trainer = build("gpt2", corruption("flips", steps=1.0), 8, 1, max_steps=1)
    stock = trainer.data_collator

    def collate(rows: Any) -> Any:
        batch = stock(rows)
        batch["shift_labels"] = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        return batch

    trainer.data_collator = collate
    trainer.train()
    plain = build("gpt2", corruption("flips", steps=1.0), 8, 1, max_steps=1)
    plain.train()
    assert sorted(trainer.rows[0]) == sorted(plain.rows[0])
    assert first_log(trainer)["nll"] == pytest.approx(first_log(plain)["nll"], rel=1e-6)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_a_loss_function_of_the_user_leaves_no_place_for_flips() -> None:
    with pytest.raises(ValueError, match="compute_loss_func would replace"):
        DPSMTrainer(
            model=make_model("gpt2"), args=DPSMConfig(output_dir="unused", scoring_rule="ce", use_cpu=True),
            corruption=corruption("flips"), compute_loss_func=lambda *_, **__: torch.zeros(()),
        )  # fmt: skip


def test_a_batch_without_labels_cannot_be_flipped() -> None:
    trainer = build("gpt2", corruption("flips"), 8, 1, scoring_rule="ce")
    trainer.data_collator = lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    with pytest.raises(ValueError, match=r"'labels'.*only input_ids"):
        trainer.train()


def test_summaries_need_an_encoder_decoder_and_two_pairs() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel reads source and target as one text"):
        build("gpt2", Corruption(swaps=SummarySwaps(0.2)), 8, 1)
    with pytest.raises(ValueError, match=r"1 pair .*--per_device_train_batch_size"):
        build("bart", Corruption(swaps=SummarySwaps(0.2)), 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: {**batch, "decoder_attention_mask": batch["attention_mask"]}, "have decoder_attention_mask"),
        (lambda batch: {key: value for key, value in batch.items() if key != "input_ids"}, "have no input_ids"),
    ],
)
def test_a_batch_whose_summaries_cannot_be_swapped(change: Any, message: str) -> None:
    trainer = build("bart", corruption("swaps"), 8, 1)
    stock = trainer.data_collator
    trainer.data_collator = lambda rows: change(stock(rows))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_plain_training_has_the_bits_it_had() -> None:
    """`corruption=None` adds nothing: equal to Transformers' own trainer."""
    ours, stock = (
        cases.parameters_and_logs("gpt2", stock=s, scoring_rule="ce", fused_head="off", per_device_train_batch_size=8)
        for s in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours["parameters"], stock["parameters"], strict=True))
