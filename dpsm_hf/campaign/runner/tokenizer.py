"""The tokenizer that runs with ``tokenizer_name=train-bpe`` share: trained once, before the first of them.

    python -m dpsm_hf.campaign.runner.tokenizer TASK SETTINGS FOLDER

trains it in a process of its own, by the code of the task, so that it is the one that each run would train itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ...runtime.child_process import end_with_runner
from ...runtime.files import read_json, write_json
from ...tasks import get_task
from ..spec.design import Run
from .launching import fill_in

#: The module to start for training one.
MODULE = "dpsm_hf.campaign.runner.tokenizer"
TRAIN_BPE = "train-bpe"  # as in data.tokenizer, whose import would import torch
# The arguments that determine the texts it is trained on, its size and its maximal length.
_DECIDING = (
    "dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file", "calibration_file",
    "max_train_samples", "text_column_name", "text_column", "summary_column", "keep_linebreaks", "streaming",
    "max_steps", "validation_split_percentage", "calibration_split_percentage", "fit_temperature", "min_source_words",
    "tokenizer_vocab_size", "model_type", "block_size", "cache_dir", "trust_remote_code",
)  # fmt: skip


def shared_tokenizer(run: Run, directory: Path) -> Path | None:
    """Return the folder of the tokenizer that a run shares with others; None if it has its own."""
    # a given configuration has its own token ids, which only the script can adapt to a new tokenizer
    if run.arguments.get("tokenizer_name") != TRAIN_BPE or run.arguments.get("config_name") is not None:
        return None
    # files count by their content, if it is known: the file of a name may change
    contents = {key: value for key, value in run.contents.items() if key in _DECIDING}
    text = json.dumps({"task": run.task, **tokenizer_settings(run, directory), **contents}, sort_keys=True)
    return directory / "tokenizer" / hashlib.sha256(text.encode()).hexdigest()[:12]


def tokenizer_settings(run: Run, directory: Path) -> dict[str, Any]:
    """Return the arguments of a run's script that determine its tokenizer; corruption and subsets do not."""
    own = fill_in(run.arguments, directory)
    if not own.get("streaming"):
        own.pop("max_steps", None)  # which only a stream needs
    return {"tokenizer_name": TRAIN_BPE, **{key: own[key] for key in _DECIDING if key in own}}


def train_tokenizer(task: str, settings: Path, folder: Path) -> None:
    """Train a tokenizer as a run of the task would, and move it to its folder when it is complete."""
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    whole = {**read_json(settings), "output_dir": str(draft), "do_train": True, "report_to": "none"}
    write_json(whole, draft / "settings.json")
    run = get_task(task).parse([str(draft / "settings.json")])
    run.load_data()
    tokenizer = run.load_tokenizer(run.training_texts)
    # saved again, because load_tokenizer sets the maximal length and runs read it from the files
    tokenizer.save_pretrained(draft / "tokenizer")
    (draft / "tokenizer").replace(folder)
    shutil.rmtree(draft)


if __name__ == "__main__":
    end_with_runner()
    train_tokenizer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
