"""Kill both scripts at random moments, resume them, and compare the result with that of an undisturbed run.

``python -m benchmarks.kills --kills 20`` (about half an hour on two cores). A moment is up to half a second after the
folder of a checkpoint or a file of an evaluation appeared, so that saving, evaluation and training are all hit; the
table counts how often each. Campaigns and their runner are killed by ``tests/campaign/test_campaign_kills.py``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

COMMON = {
    "max_steps": 24, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 3, "logging_steps": 1, "learning_rate": 0.01, "per_device_train_batch_size": 4,
    "tokenizer_name": "train-bpe", "tokenizer_vocab_size": 300, "max_train_samples": 64, "max_eval_samples": 24,
    "max_predict_samples": 8, "do_train": True, "do_eval": True, "do_predict": True, "fit_temperature": True,
    "use_cpu": True, "report_to": "none", "seed": 3,
}  # fmt: skip
TASKS = {
    "clm": {
        **COMMON, "model_type": "gpt2", "config_overrides": "n_embd=16,n_layer=1,n_head=2,resid_pdrop=0.1",
        "dataset_name": "python-docs", "block_size": 48,
    },
    "summarization": {
        **COMMON, "model_type": "bart", "dataset_name": "python-docstrings", "max_source_length": 48,
        "config_overrides": "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,"
        "decoder_attention_heads=2,encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=64",
        "max_target_length": 12, "predict_with_generate": True,
    },
}  # fmt: skip
#: Parts of the names of metrics that differ between runs: times, and what depends on how often a run was resumed.
VOLATILE = ("runtime", "per_second", "seconds", "memory", "preparation", "total_flos", "train_loss")
COLUMNS = ("task", "run", "kills", "in_training", "in_evaluation", "in_saving", "before_and_after", "equal", "differs")


def start(task: str, folder: Path) -> subprocess.Popen[str]:
    """Start a run, or resume it."""
    words = [f"--{name}={value}" for name, value in {**TASKS[task], "output_dir": folder}.items()]
    log = (folder.parent / f"{folder.name}.log").open("a", encoding="utf-8")
    return subprocess.Popen([sys.executable, "-m", "dpsm_hf", task, *words], stdout=log, stderr=log, text=True)


def stage(folder: Path) -> str:
    """Return what a run was doing when it was killed, judged by the files that it left."""
    if not list(folder.glob("checkpoint-*")) or (folder / "model.safetensors").exists():
        return "before_and_after"
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    if not (newest / "trainer_state.json").exists():
        return "in_saving"
    written = max(path.stat().st_mtime for path in newest.rglob("*"))
    drawn = max((path.stat().st_mtime for path in folder.glob("calibration/*")), default=0.0)
    return "in_evaluation" if drawn > written else "in_training"


def result(folder: Path) -> dict[str, Any]:
    """Return the weights, the metrics and the log of a finished run, without those of `VOLATILE`."""
    outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return {
        "weights": load_file(folder / "model.safetensors"),
        "metrics": _figures(outcome["metrics"]),
        "log": [_figures(entry) for entry in state["log_history"]],
    }


def _figures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _figures(v) for key, v in value.items() if not any(word in key for word in VOLATILE)}
    return value


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the names of the parts of two results that are not equal to the last bit."""
    weights = one["weights"].keys() == other["weights"].keys() and all(
        torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items()
    )
    found = [] if weights else ["weights"]
    return " ".join([*found, *(name for name in ("metrics", "log") if one[name] != other[name])])


def wait_for_moment(process: subprocess.Popen[str], folder: Path, draw: random.Random) -> bool:
    """Wait for a random moment to kill a run; return False if it has ended before."""
    pattern = draw.choice(["checkpoint-*", "checkpoint-*", "calibration/*.json"])
    there, wanted = set(folder.glob(pattern)), draw.randint(1, 4)
    while len(set(folder.glob(pattern)) - there) < wanted:
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    time.sleep(draw.choice([0.0, 0.005, 0.05, 0.5]) * draw.random())
    return process.poll() is None


def killed(task: str, folder: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Run a task to its end, killing it at most so many times; return how often in each stage."""
    stages: Counter[str] = Counter()
    while True:
        process = start(task, folder)
        if stages.total() < kills and wait_for_moment(process, folder, draw):
            process.send_signal(signal.SIGKILL)
            process.wait()
            stages[stage(folder)] += 1
        elif code := process.wait():
            raise SystemExit(f"{task} failed with {code}; its output is in {folder.parent / folder.name}.log")
        else:
            return stages


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kills.csv"))
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    for task in TASKS:
        if start(task, root / task).wait():
            raise SystemExit(f"{task} fails without being killed; see {root / task}.log")
        whole = result(root / task)
        left, run = arguments.kills, 0  # kills still to do
        while left > 0:
            run += 1
            folder = root / f"{task}-{run}"
            stages = killed(task, folder, min(left, 5), draw)
            left -= max(1, stages.total())  # an unharmed run counts as one, so that the loop ends
            differs = difference(whole, result(folder))
            counts = {name: stages[name] for name in COLUMNS[3:7]}
            rows.append(
                {"task": task, "run": run, "kills": stages.total(), **counts, "equal": not differs, "differs": differs}
            )
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if all(row["equal"] for row in rows):
        shutil.rmtree(root)
    else:
        raise SystemExit(f"not all results are equal; the folders are in {root}")


if __name__ == "__main__":
    main()
