"""The command ``dpsm split``: divide one file or data set into splits, so that no text is in two of them.

    dpsm split dialogues.jsonl.gz --group_by document --sizes test=500 calibration=200 validation=200 train=rest \\
        --output_dir splits

writes test.jsonl, calibration.jsonl, validation.jsonl and train.jsonl, and splits.json, which says where they come
from and what they hold (SHA-256). Which split a text is in depends on the texts alone: not on the order of the data,
a seed or the machine. Texts count as the same where they are equal but for white space at their ends; texts that
differ in one word do not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.loading import check_columns, file_builder, load_text_datasets
from ..data.subsets import split_by_group
from ..runtime.content import file_sha256
from ..runtime.files import check_folder, write_json

#: The file that says what the splits are made of.
RECORD_NAME = "splits.json"
_REST, _TRAIN = "rest", "train"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the splits and print what they hold.

    Args:
        argv: arguments without the command's name.

    Raises:
        ValueError: for a source, column or size that there is not, and for files that are there already.
    """
    options = parser().parse_args(argv)
    sizes = check_sizes(options.sizes)
    folder = check_folder(options.output_dir, "--output_dir")
    paths = {name: folder / f"{name}.jsonl" for name in sizes}
    if there := [str(path) for path in (*paths.values(), folder / RECORD_NAME) if path.exists()]:
        raise ValueError(f"{there[0]} is there already: name another --output_dir, or delete it.")
    source, is_file = options.source, Path(options.source).is_file()
    data = _load(options, is_file=is_file)
    columns = [*options.group_by]
    check_columns(data, {f"--group_by {name}": name for name in columns}, options.split or _TRAIN)
    try:
        splits = split_by_group(data, columns, sizes, options.salt)
    except ValueError as error:
        raise ValueError(f"--sizes {' '.join(options.sizes)}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "source": Path(source).name if is_file else source,
        "source_sha256": file_sha256(Path(source)) if is_file else None,
        "group_by": columns, "sizes": {name: _REST if n is None else n for name, n in sizes.items()},
        "salt": options.salt, "splits": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=folder) as draft:  # what is killed leaves no split behind
        for name, rows in splits.items():
            _write(rows, Path(draft) / paths[name].name)
        for path in paths.values():
            (Path(draft) / path.name).replace(path)
    for name, rows in splits.items():
        record["splits"][name] = {"rows": len(rows), "sha256": file_sha256(paths[name])}
        print(f"{paths[name]}: {len(rows):,} rows")
    write_json(record, folder / RECORD_NAME)
    return 0


def _write(rows: Dataset, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in tqdm(rows, desc=path.stem, disable=None):
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except TypeError as error:
                kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
                raise ValueError(f"a column holds what JSON cannot ({error}); there are {kinds}.") from None


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made = argparse.ArgumentParser(
        prog="dpsm split", description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("source", help="a csv, json, jsonl or parquet file, or what --dataset_name takes")
    made.add_argument("--config", help="configuration of a named data set")
    made.add_argument("--split", help="split of a named data set that is divided (train)")
    made.add_argument(
        "--group_by", nargs="+", required=True, metavar="COLUMN",
        help="columns whose text decides: rows with the same stay together",
    )  # fmt: skip
    made.add_argument(
        "--sizes", nargs="+", required=True, metavar="NAME=ROWS",
        help=f"splits in the order in which they are filled; one of them may be NAME={_REST}",
    )  # fmt: skip
    made.add_argument("--salt", default="", help="any word; another one gives another division")
    made.add_argument("--output_dir", required=True, help="folder for the files")
    return made


def check_sizes(words: Sequence[str]) -> Mapping[str, int | None]:
    """Return the rows of each split, None for what is left, from words like ``test=500`` and ``train=rest``.

    Raises:
        ValueError: naming the word that is not one.
    """
    sizes: dict[str, int | None] = {}
    for word in words:
        name, _, size = word.partition("=")
        if not (word.isascii() and name.isidentifier()) or not (size == _REST or (size.isdecimal() and int(size) > 0)):
            raise ValueError(f"--sizes {word}: write NAME=ROWS with a whole number above 0, or NAME={_REST}.")
        if name.lower() in map(str.lower, sizes):
            raise ValueError(f"--sizes {word}: there are two sizes of {name}.")
        sizes[name] = None if size == _REST else int(size)
    if list(sizes.values()).count(None) > 1:
        raise ValueError(f"--sizes {' '.join(words)}: only one split can be what the others leave ({_REST}).")
    return sizes


def _load(options: argparse.Namespace, *, is_file: bool) -> Dataset:
    source, split = options.source, options.split
    if is_file:
        for name in ("split", "config"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} {getattr(options, name)} is for a named data set, and {source} is a file.")
        if file_builder(source) == "text":
            raise ValueError(
                f"{source} has lines, which may be parts of longer texts: give a csv, json, jsonl or parquet file "
                "with a text in each row."
            )
        return load_text_datasets(train_file=source, validation_split_percentage=None)[_TRAIN]  # type: ignore[return-value]
    loaded = load_text_datasets(source, options.config, required_splits=[], validation_split_percentage=None)
    if (split or _TRAIN) not in loaded:
        raise ValueError(f"--split: {source} has no split {split or _TRAIN!r}; it has {', '.join(map(repr, loaded))}.")
    return loaded[split or _TRAIN]  # type: ignore[return-value]


if __name__ == "__main__":
    raise SystemExit(main())
