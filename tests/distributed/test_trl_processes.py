"""`DPSMSFTTrainer` in two real processes (gloo): what one process trains, logs and evaluates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("dpsm_hf.trl", reason="TRL is not installed", exc_type=ImportError)

from datasets import Dataset

from dpsm_hf.trl.even_batches import filled_up
from tests.distributed.processes import results_of
from tests.distributed.trl_worker import CASES, run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of every case in two processes."""
    return results_of("trl_worker", tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize(("arm", "setting"), CASES)
def test_two_processes_equal_one(arm: str, setting: str, two: dict[str, Any]) -> None:
    whole, parts = run(arm, setting), two[f"{arm}/{setting}"]
    assert len(parts["norms"]) == len(parts["logs"]) == 2
    assert parts["norms"] == pytest.approx(whole["norms"], rel=1e-6)
    for found, wanted in zip(parts["logs"], whole["logs"], strict=True):
        assert found["num_tokens"] == wanted["num_tokens"]
        names = {"loss", "nll", "brier", "entropy", "token_accuracy", "confidence"} & wanted.keys()
        assert len(names) == (2 if arm == "SFTTrainer" else 6)
        for name in names:
            assert found[name] == pytest.approx(wanted[name], rel=2e-6), name
    torch.testing.assert_close(parts["weights"], whole["weights"], rtol=1e-5, atol=1e-6)
    if arm != "SFTTrainer":  # whose figures are means over batches, which are smaller with two processes
        for name in ("eval_nll", "eval_brier", "eval_token_accuracy", "eval_ece_15"):
            assert parts["metrics"][name] == pytest.approx(whole["metrics"][name], rel=1e-6), name


@pytest.mark.parametrize("setting", ["chat", "padding-free"])
def test_cross_entropy_is_sft_trainer_there_too(setting: str, two: dict[str, Any]) -> None:
    theirs, ours = two[f"SFTTrainer/{setting}"], two[f"alpha 0/{setting}"]
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
    for found, wanted in zip(ours["logs"], theirs["logs"], strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert found[name] == pytest.approx(wanted[name], rel=2e-6), name


@pytest.mark.parametrize(("rows", "batch_size", "processes"), [(7, 2, 2), (9, 4, 2), (16, 4, 2), (5, 1, 2), (2, 4, 3)])
def test_every_process_has_rows_of_its_own(rows: int, batch_size: int, processes: int) -> None:
    columns = {"input_ids": [[i, i, i] for i in range(rows)], "labels": [[i, i, i] for i in range(rows)]}
    dataset = Dataset.from_dict({**columns, "seq_lengths": [[2, 1]] * rows})
    filled = filled_up(dataset, batch_size, processes)
    kept = [row for row in filled if row["labels"] != [-100]]
    assert kept == list(dataset)
    if (rows, batch_size) in ((5, 1), (2, 4)):  # nothing to gain, or nothing to be done
        assert filled is dataset
        return
    assert len(filled) % (batch_size * processes) == 0 and len(filled) - rows < batch_size * processes
    batches = [filled[i : i + batch_size] for i in range(0, len(filled), batch_size)]
    assert all(any(labels != [-100] for labels in batch["labels"]) for batch in batches)
    fillers = [row for row in filled if row["labels"] == [-100]]
    assert all(len(row["input_ids"]) == 1 and row["seq_lengths"] == [1] for row in fillers)
