"""Data files that readers crash on, or fail at without their name: both scripts say which file, and what to do."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpsm_hf.data.loading import load_text_datasets
from dpsm_hf.tasks import get_task

ROWS = [{"text": f"Line {index} of a text with some words in it.", "summary": f"Line {index}."} for index in range(60)]
TINY = {
    "language-modelling": ["--model_type", "gpt2", "--config_overrides", "n_embd=8,n_layer=1,n_head=1,n_positions=32"],
    "summarization": ["--model_type", "bart", "--config_overrides", "d_model=16,encoder_layers=1,decoder_layers=1"],
}


def load(path: Path, tmp_path: Path, streaming: bool = False):
    return load_text_datasets(
        train_file=str(path),
        streaming=streaming,
        validation_split_percentage=None,
        cache_dir=str(tmp_path / "cache"),
    )["train"]


def write_json(path: Path, lines: list[str]) -> Path:
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def bad_texts(rows: int, at: int) -> pa.Array:
    """Return texts of which one is not UTF-8."""
    data = [b"a text"] * rows
    data[at] = b"sch\xf6n"
    return pa.Array.from_buffers(pa.string(), rows, pa.array(data, type=pa.binary()).buffers())


OBJECTS = [json.dumps(row) for row in ROWS]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["null", *OBJECTS], r"null for a row \(line 1\).*leave that row out"),
        (["", " null", *OBJECTS], r"null for a row \(line 2\)"),
        ([*OBJECTS, "null"], r"null for a row \(line 61\)"),
        (["null"], r"null for a row \(line 1\)"),
        (["\ufeffnull", *OBJECTS], r"null for a row \(line 1\)"),
        (["[null,", ",\n".join(OBJECTS), "]"], r"null for a row \(row 0 of the list\)"),
        (["[", ",\n".join([*OBJECTS, "null"]), "]"], r"null for a row \(row 60 of the list\)"),
        ([OBJECTS[0], '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"], r"nested too deeply \(line 2\)"),
        (["["] * 100_000, r"nested too deeply \(the list\)"),
        (['{"text":'] * 100_000 + ["1"] + ["}"] * 100_000, r"nested too deeply \(its first value\)"),
    ],
)
def test_json_that_readers_crash_on(tmp_path, name, lines, message, streaming):
    path = write_json(tmp_path / name, lines)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load(path, tmp_path, streaming)


def test_json_that_only_looks_like_it_is_read(tmp_path):
    texts = ["null", "[" * 300, "{" * 300, "a: [ b", 'she said "null"', "nullify"]
    for name, lines in (
        ("a.jsonl", [json.dumps({"text": text}) for text in texts * 200]),
        ("a.json", [json.dumps([{"text": text} for text in texts * 200], indent=1)]),
        ("b.json", [json.dumps(texts * 200)]),
    ):
        assert load(write_json(tmp_path / name, lines), tmp_path)["text"][:] == texts * 200


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_texts_that_are_not_utf8(tmp_path, streaming):
    path = write_parquet(tmp_path / "a.parquet", number=list(range(2500)), text=bad_texts(2500, 1234))
    with pytest.raises(ValueError, match=r"a.parquet' is damaged in column 'text', in one of the rows 1000 to 1999"):
        load(path, tmp_path, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_without_rows(tmp_path, streaming):
    path = write_parquet(tmp_path / "a.parquet", text=pa.array([], type=pa.string()))
    with pytest.raises(ValueError, match=r"train split is empty \(0 rows\).*a.parquet"):
        load(path, tmp_path, streaming)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "folder"])
def test_a_folder_is_no_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}' is a folder.*--dataset_name"):
        load(tmp_path / name, tmp_path)


def test_a_damaged_file_in_a_folder_is_named_too(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_json(folder / "train.jsonl", ["null", *OBJECTS])
    with pytest.raises(ValueError, match=r"train.jsonl' has null for a row"):
        load_text_datasets(str(folder), cache_dir=str(tmp_path / "cache"))
    (folder / "train.jsonl").unlink()
    write_parquet(folder / "train.parquet", text=bad_texts(3, 1))
    with pytest.raises(ValueError, match=r"train.parquet' is damaged in column 'text'"):
        load_text_datasets(str(folder), cache_dir=str(tmp_path / "cache"))


def run(name: str, folder: Path, path: Path, *words: str) -> dict[str, float]:
    own = ["--block_size", "16"] if name == "language-modelling" else []
    return get_task(name).main(
        [
            *("--train_file", str(path), "--tokenizer_name", "train-bpe", "--tokenizer_vocab_size", "300"),
            *("--do_train", "--max_steps", "1", "--use_cpu", "--report_to", "none", "--save_strategy", "no"),
            *("--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "out"), *TINY[name], *own, *words),
        ]
    )


@pytest.mark.parametrize("name", sorted(TINY))
def test_views_of_strings_are_texts_in_both_scripts(tmp_path, name):
    columns = {key: pa.array([row[key] for row in ROWS], type=pa.string_view()) for key in ROWS[0]}
    assert run(name, tmp_path, write_parquet(tmp_path / "a.parquet", **columns))["train_loss"] > 0


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_file_is_no_folder_for_results(tmp_path, name, below):
    path = write_json(tmp_path / "a.jsonl", OBJECTS)
    with pytest.raises(NotADirectoryError, match=rf"--output_dir {path}{below}: {path} is a file, not a folder"):
        run(name, tmp_path, path, "--output_dir", f"{path}{below}")


@pytest.mark.parametrize("name", sorted(TINY))
def test_columns_that_hold_no_text(tmp_path, name):
    path = write_json(tmp_path / "a.jsonl", [json.dumps({"n": index, "m": [index]}) for index in range(50)])
    with pytest.raises(ValueError, match="text"):
        run(name, tmp_path, path)
    with pytest.raises(ValueError, match="not a column|the columns there are|its columns are"):
        column = "--text_column_name" if name == "language-modelling" else "--text_column"
        run(name, tmp_path, path, column, "texts")


def test_the_process_survives(tmp_path):
    """In a process of its own: without the look beforehand, the reader ends it with a signal."""
    path = write_json(tmp_path / "a.json", ["null", *OBJECTS])
    code = f"from dpsm_hf.data.loading import load_text_datasets; load_text_datasets(train_file={str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "has null for a row" in done.stderr
