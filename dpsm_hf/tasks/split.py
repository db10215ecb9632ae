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
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.loading import check_columns, column_names, file_builder, load_text_datasets
from ..data.subsets import split_by_group
from ..runtime.files import check_folder, write_json

#: The file that says what the splits are made of.
RECORD_NAME = "splits.json"
_REST = "rest"


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
    data = _load(source, options.config, None if is_file else options.split)
    columns = [*options.group_by]
    check_columns(data, {f"--group_by {name}": name for name in columns}, "source's")
    try:
        splits = split_by_group(data, columns, sizes, options.salt)
    except ValueError as error:
        raise ValueError(f"--sizes {' '.join(options.sizes)}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "source": Path(source).name if is_file else source,
        "source_sha256": _sha256(Path(source)) if is_file else None,
        "group_by": columns, "sizes": {name: _REST if n is None else n for name, n in sizes.items()},
        "salt": options.salt, "splits": {},
    }  # fmt: skip
    for name, rows in splits.items():
        rows.to_json(paths[name], force_ascii=False)
        record["splits"][name] = {"rows": len(rows), "sha256": _sha256(paths[name])}
        print(f"{paths[name]}: {len(rows):,} rows")
    write_json(record, folder / RECORD_NAME)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made = argparse.ArgumentParser(
        prog="dpsm split", description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("source", help="a csv, json, jsonl, txt or parquet file, or what --dataset_name takes")
    made.add_argument("--config", help="configuration of a data set of the hub")
    made.add_argument("--split", default="train", help="split of a named data set that is divided (train)")
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
        if not name.isidentifier() or not (size == _REST or (size.isdecimal() and int(size) > 0)):
            raise ValueError(f"--sizes {word}: write NAME=ROWS with a whole number above 0, or NAME={_REST}.")
        if name in sizes:
            raise ValueError(f"--sizes {word}: there are two sizes of {name}.")
        sizes[name] = None if size == _REST else int(size)
    if list(sizes.values()).count(None) > 1:
        raise ValueError(f"--sizes {' '.join(words)}: only one split can be what the others leave ({_REST}).")
    return sizes


def _load(source: str, config: str | None, split: str | None) -> Dataset:
    if split is None:
        file_builder(source)
        options: dict[str, Any] = {"train_file": source}
    else:
        options = {"dataset_name": source, "dataset_config_name": config}
    wanted = split or "train"
    loaded = load_text_datasets(**options, required_splits=[wanted], validation_split_percentage=None)
    found: Any = loaded[wanted]
    if not column_names(found):
        raise ValueError(f"{source} has no columns.")
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
