"""``dpsm split``: no text is in two splits, whatever the order of the data; sizes and files are as they are said."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dpsm_hf.__main__ import main
from dpsm_hf.data.python_text import load_python_docstrings
from dpsm_hf.data.subsets import split_by_group

SIZES = {"test": 30, "calibration": 20, "train": None}


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """200 real pairs, of which the first ten stand there three times, one of them with white space around it."""
    rows = load_python_docstrings()["train"].select(range(200))
    again = [{**row, "document": f"\n{row['document']} ", "module": "again"} for row in rows.select(range(10))]
    every = [*rows, *again, *rows.select(range(10))]
    return Dataset.from_list([{**row, "place": place} for place, row in enumerate(every)])


def texts(rows: Dataset) -> list[str]:
    return [text.strip() for text in rows["document"]]


def test_no_text_is_in_two_splits_and_every_row_is_in_one(pairs: Dataset) -> None:
    found = split_by_group(pairs, ["document"], SIZES)
    assert list(found) == list(SIZES) and sum(map(len, found.values())) == len(pairs)
    names = [{*texts(rows)} for rows in found.values()]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    # whole groups: at most the two further rows of the last one
    assert 30 <= len(found["test"]) <= 32 and 20 <= len(found["calibration"]) <= 22
    for rows in found.values():
        assert rows["place"] == sorted(rows["place"])


def test_which_split_a_text_is_in_depends_on_the_text_and_the_salt_alone(pairs: Dataset) -> None:
    def split(data: Dataset, **options: Any) -> dict[str, set[str]]:
        return {name: {*texts(rows)} for name, rows in split_by_group(data, ["document"], SIZES, **options).items()}

    one = split(pairs)
    assert split(pairs.shuffle(seed=3)) == one
    assert split(pairs.remove_columns("summary")) == one
    assert split(pairs, salt="b") != one


def test_by_two_columns_and_with_sizes_alone(pairs: Dataset) -> None:
    found = split_by_group(pairs, ["document", "module"], {"b": 3, "a": 4})
    assert list(found) == ["b", "a"] and [len(rows) for rows in found.values()][1] >= 4


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"test": 300}, "220 rows, too few for 300 in the split 'test'"),
        ({"test": 220, "train": None}, "no row of 220 is left for the split 'train'"),
        ({"a": None, "b": None}, "one of them may be what the others leave"),
        ({}, "need a size each"),
    ],
)
def test_what_cannot_be_divided(sizes: dict[str, int | None], said: str, pairs: Dataset) -> None:
    with pytest.raises(ValueError, match=said):
        split_by_group(pairs, ["document"], sizes)


def test_rows_of_nothing_and_columns_of_other_kinds() -> None:
    rows = [
        {"text": text, "id": place // 2, "tags": [place // 3]}
        for place, text in enumerate(["", None, " ", "a", "a"] * 20)
    ]
    data = Dataset.from_list(rows)
    found = split_by_group(data, ["text"], {"test": 5, "train": None})
    assert 5 <= len(found["test"]) <= 44 and len(found["test"]) + len(found["train"]) == 100
    assert sum(text == "a" for text in found["test"]["text"]) in (0, 40), "rows with a text stay together"
    blank = split_by_group(data.filter(lambda row: row["text"] != "a"), ["text"], {"test": 5, "train": None})
    assert len(blank["test"]) == 5, "rows without one do not"
    for column in ("id", "tags"):
        split = split_by_group(data, [column], {"test": 9, "train": None})
        assert len(split["test"]) < 12
        assert not {str(value) for value in split["test"][column]} & {str(value) for value in split["train"][column]}


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_files_and_what_they_hold(
    pairs: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "pairs.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in pairs).encode()))
    words = [str(source), "--group_by", "document", "--sizes", "test=30", "calibration=20", "train=rest"]
    assert main(["split", *words, "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert record["source"] == "pairs.jsonl.gz"
    assert record["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["sizes"] == {"test": 30, "calibration": 20, "train": "rest"}
    expected = split_by_group(pairs, ["document"], SIZES)
    shown = capsys.readouterr().out
    for name, rows in expected.items():
        path = tmp_path / "out" / f"{name}.jsonl"
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == list(rows)
        assert record["splits"][name] == {
            "rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }  # fmt: skip
        assert f"{path}: {len(rows)} rows" in shown
    # nothing is written over
    assert main(["split", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "test.jsonl is there already" in capsys.readouterr().err


def test_the_command_divides_a_named_set(tmp_path: Path) -> None:
    words = ["python-docstrings", "--split", "test", "--group_by", "document", "--sizes", "dev=5", "rest=rest"]
    assert main(["split", *words, "--output_dir", str(tmp_path)]) == 0
    total = sum(len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("dev", "rest"))
    assert total == len(load_python_docstrings()["test"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--group_by", "dokument", "--sizes", "a=1"], "'dokument' is not a column.*Did you mean 'document'"),
        (["--group_by", "document", "--sizes", "a"], "--sizes a: write NAME=ROWS"),
        (["--group_by", "document", "--sizes", "a=0"], "--sizes a=0: write NAME=ROWS with a whole number above 0"),
        (["--group_by", "document", "--sizes", "../a=3"], "--sizes ../a=3: write NAME=ROWS"),
        (["--group_by", "document", "--sizes", "a=1", "a=2"], "two sizes of a"),
        (["--group_by", "document", "--sizes", "a=rest", "b=rest"], "only one split"),
        (["--group_by", "document", "--sizes", "a=1", "A=2"], "two sizes of A"),
        (
            ["--group_by", "document", "--sizes", "a=1", "--split", "dev"],
            "--split: .* has no split 'dev'; it has 'train'",
        ),
        (["--group_by", "document", "--sizes", "a=999999"], "--sizes a=999999: there are .* rows, too few"),
    ],
)
def test_mistakes_of_the_command_are_named(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", "python-docstrings", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["split", str(tmp_path / "none.jsonl"), "--group_by", "a", "--sizes", "b=1", "--output_dir", str(tmp_path)]
    assert main(words) == 2
    assert "none.jsonl" in capsys.readouterr().err


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_numbers_keep_every_digit(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "score": 0.12345678901234568 + i, "large": 2**60 + i, "one": None} for i in range(6)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    words = [str(source), "--group_by", "text", "--sizes", "test=2", "train=rest", "--output_dir", str(tmp_path / "o")]
    assert main(["split", *words]) == 0
    written = [json.loads(line) for name in ("test", "train") for line in (tmp_path / "o" / f"{name}.jsonl").open()]
    assert sorted(written, key=lambda row: row["text"]) == rows


@pytest.mark.parametrize(
    ("content", "name", "words", "said"),
    [
        ("a\n\nb\n", "a.txt", [], "a.txt has lines, which may be parts of longer texts"),
        (
            '{"text": "a"}\n',
            "a.jsonl",
            ["--split", "test"],
            "--split test is for a named data set, and .*a.jsonl is a file",
        ),
        ('{"text": "a"}\n', "a.jsonl", ["--config", "x"], "--config x is for a named data set"),
    ],
)
def test_what_a_file_is_not_asked(
    content: str, name: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    given = [str(tmp_path / name), "--group_by", "text", "--sizes", "a=1", "--output_dir", str(tmp_path / "o"), *words]
    assert main(["split", *given]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_bytes_are_named_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Dataset.from_dict({"text": ["a", "b"], "raw": [b"\xff", b"\x00"]}).to_parquet(str(tmp_path / "a.parquet"))
    words = [str(tmp_path / "a.parquet"), "--group_by", "text", "--sizes", "a=1", "b=rest"]
    assert main(["split", *words, "--output_dir", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "a column holds what JSON cannot" in said and "there are text (str), raw (bytes)" in said
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_what_is_killed_leaves_no_part_of_a_split(sent: signal.Signals, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": f"row {i} " * 20} for i in range(60_000)])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dpsm_hf", "split", str(source), "--group_by", "text", "--sizes", "test=30000",
               "train=rest", "--output_dir", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (
        not (draft := next(out.glob(".draft-*/*.jsonl"), None) if out.is_dir() else None) or not draft.stat().st_size
    ):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(sent)
    assert process.wait() != 0
    assert not list(out.glob("*.json*"))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0, "the next call is not in its way"
    assert json.loads((out / "splits.json").read_text())["splits"]["test"]["rows"] == 30_000
