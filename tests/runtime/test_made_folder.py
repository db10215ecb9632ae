"""A folder that is made once: whole or not there, anew where it is damaged, by one process of several."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpsm_hf.runtime.made_folder import RECORD_NAME, made_once, problem_of

ROOT = Path(__file__).resolve().parents[2]
SOURCE = {"file": "words.txt", "format": 1}

# Makes a folder slowly, and says so in a file of its own.
WORKER = """
import sys, time
from pathlib import Path
from dpsm_hf.runtime.made_folder import made_once

def make(folder):
    (folder / "part").mkdir()
    (folder / "part" / "words.txt").write_text("abc")
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "numbers.txt").write_text("123")

made_once(Path(sys.argv[1]), {"file": "words.txt", "format": 1}, make)
print((Path(sys.argv[1]) / "numbers.txt").read_text(), flush=True)
"""


def make(folder: Path) -> None:
    (folder / "words.txt").write_text("abc", encoding="utf-8")
    (folder / "numbers.txt").write_text("123", encoding="utf-8")


def refuse(folder: Path) -> None:
    raise AssertionError(f"{folder} was made although there was no need to")


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", WORKER, str(folder), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def test_is_made_once_and_found_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "made"
    assert made_once(folder, SOURCE, make) == folder
    assert made_once(folder, SOURCE, refuse) == folder
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    assert record["source"] == SOURCE and sorted(record["files"]) == ["numbers.txt", "words.txt"]
    assert sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock") == ["made"]


@pytest.mark.parametrize("damage", ["other text", "gone", "no record", "half a record", "other source"])
def test_is_made_anew_where_it_is_damaged(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made_once(tmp_path / "made", SOURCE, make)
    source = dict(SOURCE)
    if damage == "other text":
        (folder / "words.txt").write_text("abd", encoding="utf-8")
    elif damage == "gone":
        (folder / "words.txt").unlink()
    elif damage == "no record":
        (folder / RECORD_NAME).unlink()
    elif damage == "half a record":
        (folder / RECORD_NAME).write_text('{"source": {"file"', encoding="utf-8")
    else:
        source["format"] = 2
    assert problem_of(folder, source) is not None
    with caplog.at_level(logging.WARNING):
        made_once(folder, source, make)
    assert "made anew" in caplog.text and str(folder) in caplog.text
    assert problem_of(folder, source) is None and (folder / "words.txt").read_text(encoding="utf-8") == "abc"


def test_what_others_have_added_is_left_alone(tmp_path: Path) -> None:
    folder = made_once(tmp_path / "made", SOURCE, make)
    (folder / "note.txt").write_text("mine", encoding="utf-8")
    made_once(folder, SOURCE, refuse)
    assert (folder / "note.txt").exists()


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        make(folder)
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        made_once(tmp_path / "made", SOURCE, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]
    made_once(tmp_path / "made", SOURCE, make)
    with pytest.raises(ValueError, match="no room"):
        made_once(tmp_path / "made", {**SOURCE, "format": 2}, fail)
    assert problem_of(tmp_path / "made", SOURCE) is None


def test_of_two_processes_one_makes_it_and_both_have_it(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    both = [start(folder, 1.0), start(folder, 1.0)]
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert sorted(said) == [["123"], ["making", "123"]]
    assert [process.returncode for process in both] == [0, 0]


@pytest.mark.skipif(sys.platform == "win32", reason="a process is killed as POSIX does it")
def test_a_killed_process_leaves_no_half_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    killed = start(folder, 60.0)
    assert killed.stdout is not None and killed.stdout.readline() == "making\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not folder.exists()
    began = time.monotonic()
    made_once(folder, SOURCE, make)
    assert time.monotonic() - began < 10 and sorted(path.name for path in folder.iterdir()) == sorted(
        ["numbers.txt", "words.txt", RECORD_NAME]
    )
    assert not (tmp_path / ".made.draft").exists()
