"""Two processes, or a run killed and resumed, corrupt the same tokens and pairs as one uninterrupted process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpsm_hf.data.python_text import load_python_docstrings
from tests.corrupted_run import CASES, run
from tests.distributed.corruption_worker import SPLITS
from tests.distributed.processes import ROOT, launch, results_of

WORKER = str(ROOT / "tests" / "distributed" / "corruption_worker.py")
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(scope="module")
def whole() -> dict[Any, Any]:
    """Every case in this process, one micro-batch a step."""
    return {case: run(*case, 8, 1) for case in CASES}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Every case in two processes."""
    return results_of("corruption_worker", tmp_path_factory.mktemp("corruption"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each case did after it was killed in its third step and resumed from its second."""
    folder = tmp_path_factory.mktemp("killed")
    launch(WORKER, str(folder))
    return folder


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_corrupt_what_one_does(case: Any, split: Any, two: Any, whole: Any) -> None:
    one, many = whole[case], two[case, split]
    assert {s: sorted(rows) for s, rows in many["rows"].items()} == {s: sorted(r) for s, r in one["rows"].items()}
    assert many["logs"] == one["logs"] and many["record"] == one["record"]
    for mine, other in zip(many["parameters"], one["parameters"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_and_resumed_run_corrupts_what_the_whole_one_does(case: Any, resumed: Path, whole: Any) -> None:
    one, rest = whole[case], torch.load(resumed / f"{case[0]}-{case[1]}.pt", weights_only=False)
    assert set(rest["rows"]) == {2, 3}
    assert {s: sorted(rows) for s, rows in rest["rows"].items()} == {s: sorted(one["rows"][s]) for s in rest["rows"]}
    assert rest["logs"] == one["logs"] and rest["record"] == one["record"]


def test_the_summarisation_script_corrupts_alike_on_two_processes(tmp_path: Path) -> None:
    pairs = load_python_docstrings()["train"].select(range(60))
    for split, rows in (("train", pairs.select(range(48))), ("dev", pairs.select(range(48, 60)))):
        rows.to_json(str(tmp_path / f"{split}.jsonl"))
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = [
            str(ROOT / "run_summarization_dpsm.py"), "--model_type", "bart", "--tokenizer_name", "train-bpe",
            "--config_overrides", "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,"
            "decoder_attention_heads=2,encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=64,dropout=0",
            "--tokenizer_vocab_size", "400", "--train_file", str(tmp_path / "train.jsonl"), "--use_cpu",
            "--validation_file", str(tmp_path / "dev.jsonl"), "--do_train", "--do_eval", "--max_steps", "6",
            "--max_source_length", "48", "--max_target_length", "24", "--learning_rate", "1e-2", "--logging_steps",
            "2", "--per_device_train_batch_size", str(8 // processes), "--save_strategy", "no", "--output_dir",
            str(out), "--flip_target_tokens", "0.2", "--flip_steps", "0.5", "--swap_summaries", "0.3",
            "--flip_replacement", "unigram",
        ]  # fmt: skip
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision",
                    "no", "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "0"]  # fmt: skip
        launch(*(launcher if processes == 2 else []), *arguments)
        found[processes] = json.loads((out / "all_results.json").read_text())
    one, two = found[1], found[2]
    for key in ("target_tokens", "flipped_tokens", "flip_steps", "pairs", "swapped_summaries"):
        assert two[f"train_{key}"] == one[f"train_{key}"] > 0, key
    # the exchanged summaries pad otherwise, which changes the order of sums
    for key in ("train_loss", "eval_nll"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
