"""`accelerate launch` of the scripts on two processes gives the model of one process on the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest

from tests.tasks.frozen_run import arguments, save_models

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def run(command: list[str], folder: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "all_results.json").read_text())


# --multi_gpu starts several processes, --use_cpu keeps them on the CPU: accelerate's own --cpu wants MPI
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "0",
]  # fmt: skip


def test_language_modelling_on_two_processes_equals_one(tmp_path: Path) -> None:
    texts = sorted(topics.topics.values(), key=len)
    (tmp_path / "train.txt").write_text("\n".join(texts[-8:-2]), encoding="utf-8")
    (tmp_path / "dev.txt").write_text("\n".join(texts[20:30]), encoding="utf-8")
    results = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = [
            str(ROOT / "run_clm_dpsm.py"), "--model_type", "gpt2", "--tokenizer_name", "train-bpe",
            "--config_overrides", "n_embd=32,n_layer=1,n_head=2,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
            "--tokenizer_vocab_size", "400", "--train_file", str(tmp_path / "train.txt"), "--block_size", "32",
            "--validation_file", str(tmp_path / "dev.txt"), "--do_train", "--do_eval", "--max_steps", "6",
            "--learning_rate", "1e-2", "--per_device_train_batch_size", str(8 // processes), "--use_cpu",
            "--per_device_eval_batch_size", "3", "--alpha_warmup_steps", "3", "--logging_steps", "1",
            "--save_strategy", "no", "--output_dir", str(out),
        ]  # fmt: skip
        results[processes] = run((LAUNCH if processes == 2 else [sys.executable]) + arguments, out)
    one, two = results[1], results[2]
    assert two["eval_tokens"] == one["eval_tokens"]
    for key in ("eval_nll", "eval_brier", "eval_ece_15", "train_loss", "perplexity"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key


def test_two_processes_share_the_outputs_of_frozen_layers(tmp_path: Path) -> None:
    save_models(tmp_path)
    results = {}
    for processes, cache in ((1, "off"), (2, str(tmp_path / "cache"))):
        out, batch = tmp_path / str(processes), {"per_device_train_batch_size": 4 // processes, "save_strategy": "no"}
        words = arguments(tmp_path, "llama", out, frozen_cache=cache, max_train_samples=8, **batch)
        command = [str(ROOT / "run_clm_dpsm.py"), *words]
        results[processes] = run((LAUNCH if processes == 2 else [sys.executable]) + command, out)
    assert results[2]["train_frozen_cache_mb"] > 0
    for key in ("eval_nll", "eval_brier", "train_loss"):
        assert results[2][key] == pytest.approx(results[1][key], rel=1e-4), key
