"""Load the splits of a run: from the hub, from local files, or the text that comes with Python."""

from __future__ import annotations

import difflib
import functools
import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import parquet

from .file_checks import check_file
from .python_text import load_python_docs, load_python_docstrings

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
AnyDatasetDict: TypeAlias = DatasetDict | IterableDatasetDict

EMBEDDED_DATASETS = {"python-docs": load_python_docs, "python-docstrings": load_python_docstrings}
SITE_PACKAGES = "site-packages"
FILE_BUILDERS = {"csv": "csv", "json": "json", "jsonl": "json", "txt": "text", "parquet": "parquet"}

# Names of the errors that the readers of `datasets` raise for a file without rows.
_NO_ROWS = {"SchemaInferenceError", "EmptyDataError", "StopIteration"}

_LOCAL_REMEDY = (
    "Use local files with --train_file and --validation_file (csv, json, jsonl, txt or parquet), a folder with such "
    "files as --dataset_name, or the real text that comes with every Python: --dataset_name python-docs (language "
    "modelling) or python-docstrings (summarisation)."
)


def load_text_datasets(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    calibration_file: str | None = None,
    required_splits: Sequence[str] = ("train",),
    validation_split_percentage: int | None = 5,
    calibration_split_percentage: int = 5,
    streaming: bool = False,
    keep_linebreaks: bool = True,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    remedy: str = _LOCAL_REMEDY,
) -> AnyDatasetDict:
    """Load the splits of a run, by name or from files.

    Args:
        dataset_name: ``python-docs``, ``python-docstrings``, a hub data set or a local folder.
        dataset_config_name: Configuration of a hub data set; ``site-packages`` adds the installed packages'
            docstrings to the two embedded sets.
        train_file: A csv, json, jsonl, txt or parquet file; all but parquet may be gzipped (``.gz``).
        validation_file: The same for the validation split.
        test_file: The same for the test split.
        calibration_file: The same for the calibration split.
        required_splits: Splits that must exist and hold at least one row.
        validation_split_percentage: Percentage of train to hold out for validation if the source has no such split;
            None or 0 holds out none.
        calibration_split_percentage: Percentage of train to hold out for calibration if that split is required and
            the source has none.
        streaming: Return iterable data sets, which are read while training.
        keep_linebreaks: Keep the line ends of txt files.
        cache_dir: Where ``datasets`` keeps its files.
        token: Hub token.
        trust_remote_code: Accepted for old command lines; ``datasets`` no longer runs code from the hub.
        remedy: The advice in the error message for a hub data set that is not found, naming the caller's options.

    Returns:
        The splits by name.

    Raises:
        ConnectionError: The hub cannot be reached.
        FileNotFoundError: A file or a hub data set does not exist.
        ValueError: The sources contradict each other, an extension is unknown, a file cannot be read or is not UTF-8,
            or a required split is missing or empty.
    """
    given = {"train": train_file, "validation": validation_file, "test": test_file, "calibration": calibration_file}
    files = {split: path for split, path in given.items() if path is not None}
    check_sources(dataset_name, files)
    if trust_remote_code and dataset_name is not None:
        logger.warning("trust_remote_code has no effect on data sets: the datasets library runs no code from the hub.")
    if dataset_name is None:
        raw = _load_files(files, streaming, keep_linebreaks, cache_dir)
    elif dataset_name in EMBEDDED_DATASETS:
        raw = _load_embedded(dataset_name, dataset_config_name, streaming)
    else:
        raw = _load_named(dataset_name, dataset_config_name, streaming, cache_dir, token, remedy)
    described = repr(dataset_name) if dataset_name is not None else "the given files"
    splits: dict[str, AnyDataset] = {str(name): part for name, part in raw.items()}
    if "validation" not in splits and "train" in splits and validation_split_percentage:
        check_not_empty(splits["train"], "train", described)
        required = "validation" in required_splits
        splits = hold_out(splits, "validation", validation_split_percentage, required=required)
    if "calibration" in required_splits and "calibration" not in splits and "train" in splits:
        check_not_empty(splits["train"], "train", described)
        splits = hold_out(splits, "calibration", calibration_split_percentage, at_end=True)
    for split in required_splits:
        if split not in splits:
            raise ValueError(
                f"There is no {split!r} split in {described}; it has {', '.join(map(repr, splits)) or 'none'}. "
                f"Give one with --{split}_file, or leave out the option that needs it."
            )
        check_not_empty(splits[split], split, described)
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def hold_out(
    splits: dict[str, AnyDataset], name: str, percentage: int, *, at_end: bool = False, required: bool = True
) -> dict[str, AnyDataset]:
    """Cut a split from the first or last rows of train (in a stream, from the first or last of every 100 rows).

    Args:
        splits: All splits, with ``train``.
        name: Name of the new split.
        percentage: Percentage of the rows of train.
        at_end: Take the last rows.
        required: Whether a train split that is too small is an error; otherwise it is left whole.

    Returns:
        The splits, with a shorter ``train`` and the new one.

    Raises:
        ValueError: The percentage is out of range, or train has too few rows.
    """
    check_percentage(name, percentage)
    train = splits["train"]
    if isinstance(train, IterableDataset):
        lowest, beyond = (100 - percentage, 100) if at_end else (0, percentage)
        held_out = train.filter(functools.partial(_in_share, lowest=lowest, beyond=beyond), with_indices=True)
        kept = train.filter(functools.partial(_not_in_share, lowest=lowest, beyond=beyond), with_indices=True)
        return {**splits, "train": kept, name: held_out}
    rows = len(train)
    number = max(1, round(rows * percentage / 100))
    if number >= rows:
        if not required:
            return splits
        raise ValueError(
            f"The train split has {rows} row(s), too few to hold out {percentage} % for {name}: give a --{name}_file."
        )
    cut = rows - number if at_end else number
    first, last = train.select(range(cut)), train.select(range(cut, rows))
    return {**splits, "train": first if at_end else last, name: last if at_end else first}


def check_percentage(name: str, percentage: int) -> None:
    """Raise for a percentage of the train split that leaves one side empty.

    Raises:
        ValueError: Naming the option and the percentage.
    """
    if not 0 < percentage < 100:
        raise ValueError(f"--{name}_split_percentage {percentage} must lie between 1 and 99.")


def _in_share(row: dict[str, Any], index: int, lowest: int, beyond: int) -> bool:
    return lowest <= index % 100 < beyond


def _not_in_share(row: dict[str, Any], index: int, lowest: int, beyond: int) -> bool:
    return not _in_share(row, index, lowest, beyond)


def check_sources(dataset_name: str | None, files: Mapping[str, str]) -> None:
    """Raise for contradicting or missing sources before anything is loaded.

    Args:
        dataset_name: The named data set, or None.
        files: Paths by split.

    Raises:
        ValueError: Both a name and files, neither, an unknown extension, or extensions of different kinds.
    """
    if dataset_name is not None and files:
        options = " and ".join(f"--{split}_file" for split in files)
        raise ValueError(f"--dataset_name {dataset_name} and {options} contradict each other: give one or the other.")
    if dataset_name is None and not files:
        raise ValueError("Give a data set with --dataset_name, or files with --train_file or --validation_file.")
    builders = {path: file_builder(path) for path in files.values()}
    if len(set(builders.values())) > 1:
        raise ValueError(f"All data files must be of one kind, but these differ: {', '.join(builders)}.")


def file_builder(path: str) -> str:
    """Return the `datasets` builder for a file by its extension, ignoring ``.gz``.

    Args:
        path: Path of a data file.

    Returns:
        ``csv``, ``json``, ``text`` or ``parquet``.

    Raises:
        ValueError: The extension is unknown.
    """
    suffixes = [suffix.lstrip(".").lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] == "gz"
    extension = suffixes[-2] if compressed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    builder = FILE_BUILDERS.get(extension)
    if builder is None and Path(path).is_dir():
        raise ValueError(
            f"The data file {path!r} is a folder: name a file in it, or give the folder with --dataset_name."
        )
    if builder is None or (compressed and builder == "parquet"):
        raise ValueError(
            f"The data file {path!r} must end in {', '.join('.' + known for known in FILE_BUILDERS)} "
            "(or one of the text kinds followed by .gz)."
        )
    return builder


def check_columns(dataset: AnyDataset, wanted: Mapping[str, str | None], split: str) -> None:
    """Raise if a data set lacks a column.

    Args:
        dataset: One split.
        wanted: Column name by the option that named it; None is skipped.
        split: The split's name, for the message.

    Raises:
        ValueError: A column is missing; the message lists those that are there.
    """
    present = column_names(dataset)
    for option, name in wanted.items():
        if name is not None and name not in present:
            close = difflib.get_close_matches(name, present, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{option} {name!r} is not a column of the {split} split; its columns are "
                f"{', '.join(map(repr, present))}.{hint}"
            )


def column_names(dataset: AnyDataset) -> list[str]:
    """Return the columns of a split in order; a stream that does not know them is read up to its first row.

    Args:
        dataset: One split.

    Returns:
        The names; empty for an empty stream.
    """
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def check_not_empty(dataset: AnyDataset, split: str, described: str) -> None:
    """Raise for a split without rows.

    Args:
        dataset: One split; of a stream the first row is read.
        split: Its name.
        described: Where it came from, for the message.

    Raises:
        ValueError: There are no rows.
    """
    empty = len(dataset) == 0 if isinstance(dataset, Dataset) else next(iter(dataset), None) is None
    if empty:
        raise ValueError(f"The {split} split of {described} is empty (0 rows).")


def _load_embedded(name: str, config_name: str | None, streaming: bool) -> AnyDatasetDict:
    if config_name not in (None, SITE_PACKAGES):
        raise ValueError(
            f"--dataset_config_name {config_name!r}: {name} has the configuration {SITE_PACKAGES!r} (adds the "
            "installed packages) or none (the standard library alone)."
        )
    loaded = EMBEDDED_DATASETS[name](include_site_packages=config_name == SITE_PACKAGES)
    if not streaming:
        return loaded
    return IterableDatasetDict({split: part.to_iterable_dataset() for split, part in loaded.items()})


def _load_named(
    name: str, config_name: str | None, streaming: bool, cache_dir: str | None, token: str | None, remedy: str
) -> AnyDatasetDict:
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name!r} is a file, where the name of a data set or a folder belongs. {remedy}")
    if "/" not in name and {suffix.lstrip(".") for suffix in folder.suffixes} & {*FILE_BUILDERS, "gz"}:
        raise FileNotFoundError(f"There is no file {name!r} in {Path.cwd()}.")
    if (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(name)
        return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in saved.items()}) if streaming else saved
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix == ".parquet" or {".json", ".jsonl"} & set(path.suffixes[-2:]):
            check_file(str(path), f"--dataset_name {name}:")
    try:
        loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir, token=token, streaming=streaming)
    except ConnectionError as error:
        raise ConnectionError(
            f"The data set {name!r} cannot be loaded because the Hugging Face hub cannot be reached ({error}). "
            + remedy
        ) from None
    except DatasetNotFoundError:
        raise FileNotFoundError(
            f"There is no data set {name!r}: not on the Hugging Face hub (or it is private or gated, and --token does "
            f"not open it), and not as a local folder. {remedy}"
        ) from None
    except DatasetGenerationError as error:
        raise ValueError(f"The data set {name!r} could not be read: {error.__cause__ or error}") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"The data set {name!r} is a loading script, and the datasets library runs no scripts any more. Use a "
            f"copy of it in parquet form, or export it. {remedy}"
        ) from error
    return loaded


def _load_files(
    files: Mapping[str, str], streaming: bool, keep_linebreaks: bool, cache_dir: str | None
) -> AnyDatasetDict:
    builder = file_builder(next(iter(files.values())))
    for split, path in files.items():
        if Path(path).is_file() and Path(path).stat().st_size == 0:
            raise ValueError(f"The {split} split is empty (0 rows): --{split}_file {path!r} has no bytes.")
        check_file(path, f"--{split}_file")
        if builder == "parquet" and not parquet.read_metadata(path).num_rows:
            raise ValueError(f"The {split} split is empty (0 rows): --{split}_file {path!r} holds none.")
    loaded = {
        split: _load_file(builder, split, path, streaming, keep_linebreaks, cache_dir) for split, path in files.items()
    }
    return IterableDatasetDict(loaded) if streaming else DatasetDict(loaded)


def _load_file(
    builder: str, split: str, path: str, streaming: bool, keep_linebreaks: bool, cache_dir: str | None
) -> AnyDataset:
    # utf-8-sig drops the byte order mark that Windows editors write; the csv and json readers drop it themselves
    options: dict[str, Any] = (
        {"keep_linebreaks": keep_linebreaks, "encoding": "utf-8-sig"} if builder == "text" else {}
    )
    try:
        part = datasets.load_dataset(
            builder,
            data_files={split: glob.escape(path)},
            split=split,
            cache_dir=cache_dir,
            streaming=streaming,
            **options,
        )
        if streaming:
            next(iter(part), None)  # a stream reports errors only when its first row is read
    except Exception as error:  # the readers raise many kinds of errors, none of which names the file
        cause = error.__cause__ or error
        if type(cause).__name__ in _NO_ROWS or "corresponds to no data" in str(cause):
            raise ValueError(f"The {split} split is empty (0 rows): --{split}_file {path!r} holds none.") from error
        raise ValueError(f"--{split}_file {path!r} could not be read as {builder}: {cause}") from error
    return part
