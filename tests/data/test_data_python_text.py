"""The embedded text sets: real, deterministic, and without leaks between splits."""

import os
import subprocess
import sys

import pytest

from dpsm_hf.data import python_text
from dpsm_hf.data.python_text import (
    MINIMUM_BODY_WORDS,
    SPLITS,
    load_python_docs,
    load_python_docstrings,
    split_of,
    split_summary,
)


@pytest.fixture(scope="module")
def docs():
    return load_python_docs()


@pytest.fixture(scope="module")
def pairs():
    return load_python_docstrings()


def test_columns_and_splits(docs, pairs):
    assert tuple(docs) == tuple(pairs) == SPLITS
    for split in SPLITS:
        assert docs[split].column_names == ["text", "module", "source"]
        assert pairs[split].column_names == ["document", "summary", "module"]


def test_sizes_are_those_of_a_python(docs, pairs):
    characters = {split: sum(map(len, docs[split]["text"])) for split in SPLITS}
    total = sum(characters.values())
    assert 1_500_000 < total < 4_000_000
    assert 0.7 < characters["train"] / total < 0.9
    assert min(characters["validation"], characters["test"]) > 0.05 * total
    assert 900 < sum(len(pairs[split]) for split in SPLITS) < 3_000
    assert min(len(pairs[split]) for split in ("validation", "test")) > 50


def test_both_sources_are_there(docs):
    assert set(docs["train"]["source"]) == {"topic", "standard-library"}
    assert any("assert" in text for text in docs["train"]["text"])


def test_no_module_is_in_two_splits(docs, pairs):
    for parts in (docs, pairs):
        modules = [set(parts[split]["module"]) for split in SPLITS]
        assert not modules[0] & modules[1] and not modules[0] & modules[2] and not modules[1] & modules[2]
        for split in SPLITS:
            assert all(split_of(module) == split for module in set(parts[split]["module"]))


def test_no_text_occurs_twice(docs, pairs):
    texts = [text for split in SPLITS for text in docs[split]["text"]]
    documents = [text for split in SPLITS for text in pairs[split]["document"]]
    assert len(texts) == len(set(texts))
    assert len(documents) == len(set(documents))


def test_texts_are_clean(docs):
    for text in docs["train"]["text"]:
        assert text and text == text.strip()


def test_pairs_are_a_summary_line_and_a_body(pairs):
    for split in SPLITS:
        for row in pairs[split]:
            assert len(row["summary"].split()) > 1 and "\n" not in row["summary"]
            assert len(row["document"].split()) >= MINIMUM_BODY_WORDS


def test_another_process_reads_the_same():
    """A fresh interpreter with another hash seed gives the same rows in the same order and splits."""
    code = (
        "import sysconfig, hashlib; from pathlib import Path; from dpsm_hf.data import python_text as p;"
        "rows = [*p._read_tree(Path(sysconfig.get_path('stdlib'), 'email'), 'x')];"
        "result = hashlib.sha256(repr([(r, p.split_of(r.module)) for r in rows]).encode()).hexdigest(), len(rows)"
    )
    here: dict[str, tuple[str, int]] = {}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(result)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    ).stdout
    assert there.strip() == str(here["result"]) and here["result"][1] > 100


def test_test_folders_are_left_out(docs):
    assert not {"test", "__pycache__"} & {module for split in SPLITS for module in docs[split]["module"]}


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum.\n\nOf all numbers.", ("Return the sum.", "Of all numbers.")),
        ("Return the sum\nof numbers.\n\nMore.", ("", "Return the sum\nof numbers.\n\nMore.")),
        ("removedirs(name)\n\nSuper-rmdir.", ("", "removedirs(name)\n\nSuper-rmdir.")),
        ("sorting.py\n\nA demo.", ("", "sorting.py\n\nA demo.")),
        ("-----  ----\n\nA demo.", ("", "-----  ----\n\nA demo.")),
        ("One line only.", ("", "One line only.")),
        ("", ("", "")),
    ],
)
def test_split_summary(docstring, expected):
    assert split_summary(docstring) == expected


def test_reading_survives_bad_files(tmp_path):
    """Files that are not UTF-8 or not Python are skipped; nothing is imported; duplicates count once."""
    (tmp_path / "good.py").write_text('"""Good module.\n\n    Indented."""\nraise SystemExit("imported")\n')
    (tmp_path / "copy.py").write_text('"""Good module.\n\n    Indented."""\n')
    (tmp_path / "latin.py").write_bytes(b'"""\xff\xfe broken"""\n')
    (tmp_path / "two.py").write_text('"""Old."""\nprint "old"\n')
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    (tmp_path / "pkg" / "tests" / "t.py").write_text('"""A test."""\n')
    (tmp_path / "pkg" / "a.py").write_text(
        'class A:\n    """A class."""\n    async def f(self):\n        """A coroutine."""\n'
    )
    rows = list(python_text._without_duplicates(list(python_text._read_tree(tmp_path, "x"))))
    assert [(row.module, row.text) for row in rows] == [
        ("copy", "Good module.\n\nIndented."),
        ("pkg", "A class."),
        ("pkg", "A coroutine."),
    ]


def test_python_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(python_text, "_docstrings", python_text._docstrings.__wrapped__)
    monkeypatch.setattr(python_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match="no Python sources"):
        load_python_docstrings()


def test_python_without_the_reference_is_an_error(monkeypatch):
    monkeypatch.setattr(python_text, "_documents", python_text._documents.__wrapped__)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="pydoc_data"):
        load_python_docs()


def test_site_packages_are_added_on_request(monkeypatch, tmp_path):
    """With small folders in place of the real ones, which take long to read."""
    (tmp_path / "somepackage.py").write_text('"""Text of an installed package that no library module has."""\n')
    library = os.path.join(python_text.sysconfig.get_path("stdlib"), "json")
    monkeypatch.setattr(python_text.sysconfig, "get_path", lambda name: library if name == "stdlib" else str(tmp_path))
    monkeypatch.setattr(python_text, "_docstrings", python_text._docstrings.__wrapped__)
    monkeypatch.setattr(python_text, "_documents", python_text._documents.__wrapped__)
    found = [
        {module for split in SPLITS for module in load_python_docs(include)[split]["module"]}
        for include in (False, True)
    ]
    assert found[1] - found[0] == {"somepackage"}
