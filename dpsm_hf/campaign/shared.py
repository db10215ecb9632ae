"""What runs of a campaign share: tokenizers trained once, and the models that other runs start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.clm import choose_text_column
from ..data.loading import load_text_datasets
from ..data.summarization import resolve_columns
from ..data.tokenizer import TRAIN_BPE, column_texts, resolve_tokenizer
from .design import Campaign, Run, SharedTokenizer

#: Arguments that decide which texts a tokenizer is trained on, beside those of the vocabulary.
TOKENIZER_ARGUMENTS = (
    "dataset_name",
    "dataset_config_name",
    "train_file",
    "validation_file",
    "validation_split_percentage",
    "calibration_file",
    "calibration_split_percentage",
    "fit_temperature",
    "text_column_name",
    "text_column",
    "summary_column",
    "keep_linebreaks",
    "tokenizer_vocab_size",
)


def run_folder(directory: Path, run_id: str) -> Path:
    """Return the output folder of a run.

    Args:
        directory: of the campaign.
        run_id: `Run.id`.
    """
    return directory / "runs" / run_id


def tokenizer_folder(directory: Path, key: str) -> Path:
    """Return the folder of a shared tokenizer.

    Args:
        directory: of the campaign.
        key: `SharedTokenizer.key`.
    """
    return directory / "tokenizer" / key / "tokenizer"


def launch_arguments(run: Run, directory: Path) -> dict[str, Any]:
    """Return the script's arguments of a run with folders in place of what other steps of the campaign made.

    Args:
        run: the run.
        directory: of the campaign.

    Returns:
        Arguments by name, those of display included; ``output_dir`` and trackers are for the caller to add.
    """
    folders = {f"{{run:{key}}}": str(run_folder(directory, key)) for key in run.needs}
    folders |= {f"{{tokenizer:{key}}}": str(tokenizer_folder(directory, key)) for key in run.tokenizers}
    return {name: folders.get(value, value) if isinstance(value, str) else value for name, value in _all(run).items()}


def _all(run: Run) -> Mapping[str, Any]:
    return {**run.display, **run.arguments}


def make_tokenizers(campaign: Campaign, directory: Path) -> None:
    """Train the tokenizers that the campaign's runs share; those that are there already are kept.

    Args:
        campaign: the campaign.
        directory: its folder.

    Raises:
        ValueError: no text to train on, or a vocabulary that is too small.
        FileNotFoundError, ConnectionError: data that cannot be had.
    """
    for key in dict.fromkeys(key for run_id in campaign.order for key in campaign.runs[run_id].tokenizers):
        make_tokenizer(campaign.tokenizers[key], directory)


def make_tokenizer(tokenizer: SharedTokenizer, directory: Path) -> Path:
    """Train a byte-level BPE on the texts that the runs train on, or keep the one that is there.

    Args:
        tokenizer: what it is trained on.
        directory: folder of the campaign.

    Returns:
        Its folder.
    """
    given = dict(tokenizer.arguments)
    size = given.pop("tokenizer_vocab_size", None)
    # the texts of the calibration split must not be seen here either
    splits = ["train", "calibration"] if given.pop("fit_temperature", False) else ["train"]
    pairs = tokenizer.task == "summarization"
    named = {name: given.pop(name, None) for name in ("text_column_name", "text_column", "summary_column")}
    if pairs:
        given["validation_split_percentage"] = None
    folder = tokenizer_folder(directory, tokenizer.key)
    if (folder / "train-bpe.json").exists():
        return folder
    train = load_text_datasets(**given, required_splits=splits)["train"]
    columns: tuple[str, ...]
    if pairs:
        columns = resolve_columns(train.column_names, given.get("dataset_name"), *list(named.values())[1:])
    else:
        columns = (choose_text_column(train, named["text_column_name"], "train"),)
    folder.parent.mkdir(parents=True, exist_ok=True)
    resolve_tokenizer(
        TRAIN_BPE,
        output_dir=folder.parent,
        training_texts=lambda: column_texts(train, columns),
        vocab_size=size,
        sequence_template=pairs,
    )
    return folder
