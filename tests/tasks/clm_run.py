"""Command lines of a tiny run of run_clm_dpsm.py, and real text for it in files of every kind."""

import gzip
import json

from datasets import Dataset

from dpsm_hf.data.python_text import load_python_docs

TINY = {
    "model_type": "gpt2",
    "config_overrides": "n_embd=16,n_layer=1,n_head=2,resid_pdrop=0.1",
    "tokenizer_name": "train-bpe",
    "tokenizer_vocab_size": 300,
    "block_size": 48,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "max_train_samples": 40,
    "max_eval_samples": 12,
    "logging_steps": 1,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
    "log_level": "warning",
}


def argv(folder, **options):
    """A command line of the tiny run; an option set to None is left out."""
    words = []
    for name, value in {**TINY, "output_dir": folder / "out", **options}.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def real_texts():
    """Eighty entries of more than a line from the language reference."""
    return [text for text in load_python_docs()["train"]["text"] if "\n" in text][:80]


def write(folder, extension, texts, name="train"):
    path = folder / f"{name}.{extension}"
    kind, _, packed = extension.partition(".")
    if kind == "txt":
        content = "\n\n".join(texts) + "\n"
    elif kind in ("json", "jsonl"):
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    else:
        rows = Dataset.from_dict({"number": list(range(len(texts))), "text": texts})
        rows.to_csv(str(path)) if kind == "csv" else rows.to_parquet(str(path))
        return path
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    return path
