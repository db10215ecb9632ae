"""Two processes give the outcome of one: figures, best checkpoint, texts, and the sums of every block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]

# uneven sets, so that the last batches are filled up; batches of other sizes
SHARED = """
    --tokenizer_name train-bpe --tokenizer_vocab_size 300 --use_cpu --scoring_rule ce --do_train --do_eval --do_predict
    --learning_rate 1e-2 --lr_scheduler_type constant --logging_steps 2 --eval_strategy steps --eval_steps 2
    --save_strategy best --evaluate_best --early_stopping_patience 1 --fit_temperature --sample_outputs 2
    --max_eval_samples 7 --max_predict_samples 5 --max_train_samples 8 --disable_tqdm true
"""
CLM = """
    run_clm_dpsm.py --dataset_name python-docs --model_type gpt2 --block_size 32 --max_steps 14
    --config_overrides n_embd=32,n_layer=1,n_head=2,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0
    --eval_delay 7 --calibration_split_percentage 1
"""
SUMMARIES = """
    run_summarization_dpsm.py --dataset_name python-docstrings --model_type bart --max_steps 4 --max_source_length 32
    --max_target_length 8 --predict_with_generate --config_overrides
    d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2,dropout=0
"""


def run(arguments: str, folder: Path, processes: int) -> dict[str, Any]:
    words = f"{arguments} {SHARED}".split()
    sizes = {1: ("4", "3"), 2: ("2", "2")}[processes]
    launcher = [sys.executable]
    if processes > 1:
        # --multi_gpu starts several processes, --use_cpu keeps them on the CPU: accelerate's own --cpu wants MPI
        launcher += "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no".split()
        launcher += f"--dynamo_backend no --num_processes {processes} --main_process_port 0".split()
    done = subprocess.run(
        [*launcher, *words, "--output_dir", str(folder), "--per_device_train_batch_size", sizes[0],
         "--per_device_eval_batch_size", sizes[1]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    outcome: dict[str, Any] = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    return outcome


@pytest.mark.parametrize("arguments", [CLM, SUMMARIES], ids=["clm", "summaries"])
def test_two_processes_find_out_what_one_does(arguments: str, tmp_path: Path) -> None:
    one, two = (run(arguments, tmp_path / str(n), n) for n in (1, 2))
    assert two["best_step"] == one["best_step"] and (arguments != CLM or one["best_step"] < one["efficiency"]["steps"])
    assert two["samples"] == one["samples"] and len(one["samples"]) == 2
    assert two["documents"] == one["documents"]
    volatile = ("runtime", "per_second", "seconds", "preparation_time")
    for checkpoint, splits in one["metrics"].items():
        for split, figures in splits.items():
            wanted = {k: v for k, v in figures.items() if not k.endswith(volatile) and not k.endswith("loss")}
            found = two["metrics"][checkpoint][split]
            assert {k: found[k] for k in wanted} == pytest.approx(wanted, rel=2e-3, abs=2e-3)
            name = f"documents/{checkpoint}-{split}.npz"
            with np.load(tmp_path / "1" / name) as left, np.load(tmp_path / "2" / name) as right:
                assert set(left) == set(right) and str(left["labels"]) == str(right["labels"])
                assert np.array_equal(left["count"].sum(1), right["count"].sum(1)), "the same rows in every block"
                for score in ("nll", "brier", "spherical_scaled"):
                    np.testing.assert_allclose(right[score], left[score], rtol=1e-3)
    assert two["efficiency"]["flops_per_step"] == pytest.approx(one["efficiency"]["flops_per_step"], rel=0.2)
    assert two["efficiency"]["steps"] == one["efficiency"]["steps"]
