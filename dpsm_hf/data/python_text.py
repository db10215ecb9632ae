"""Real English text that comes with every Python: the language reference and the docstrings of its libraries."""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib
import inspect
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value

SPLITS = ("train", "validation", "test")
MINIMUM_BODY_WORDS = 30

# Folders that hold tests or installed packages rather than the library itself.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "_bundled",
    "_vendor",
}
# Salt of the hash of a module's name. Modules differ much in size; with this salt, text and summarisation pairs are
# both split near 80/10/10. It was chosen by these sizes only, before any training.
_SPLIT_SALT = "dpsm-hf-32"
_SHARES = (0.8, 0.9)
_SIGNATURE = re.compile(r"[\w.]+\s?\(.*\)(\s*->.*)?:?\s*$")


@dataclass(frozen=True)
class Docstring:
    """A docstring without indentation, its top-level module, and its source (such as ``standard-library``)."""

    text: str
    module: str
    source: str


def split_of(name: str) -> str:
    """Return the split of a module or topic, chosen by the sha256 of its name: the same on every machine.

    Args:
        name: Top-level module name or topic.

    Returns:
        ``train``, ``validation`` or ``test``.
    """
    digest = hashlib.sha256(f"{_SPLIT_SALT}:{name}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[sum(position >= share for share in _SHARES)]


def load_python_docs(include_site_packages: bool = False) -> DatasetDict:
    """Load the language reference and all docstrings of the standard library for language modelling.

    Args:
        include_site_packages: Add the docstrings of installed packages.

    Returns:
        Splits train, validation and test with the columns ``text``, ``module`` (top-level module or topic)
        and ``source`` (``topic``, ``standard-library`` or ``site-packages``). No text occurs twice and no module
        is in two splits.

    Raises:
        RuntimeError: This Python was installed without its sources or without ``pydoc_data``.
    """
    rows = _documents(include_site_packages)
    return _in_splits(
        [({"text": row.text, "module": row.module, "source": row.source}, row.module) for row in rows],
        ("text", "module", "source"),
    )


def load_python_docstrings(include_site_packages: bool = False) -> DatasetDict:
    """Load docstrings as pairs for summarisation; by PEP 257 the first line summarises the rest.

    Args:
        include_site_packages: Add the docstrings of installed packages.

    Returns:
        Splits train, validation and test with the columns ``document`` (the body, at least 30 words), ``summary``
        (the summary line) and ``module``. No document occurs twice.

    Raises:
        RuntimeError: This Python was installed without its sources.
    """
    pairs = []
    seen: set[str] = set()
    for row in _docstrings(include_site_packages):
        summary, document = split_summary(row.text)
        if summary and len(document.split()) >= MINIMUM_BODY_WORDS and document not in seen:
            seen.add(document)
            pairs.append(({"document": document, "summary": summary, "module": row.module}, row.module))
    return _in_splits(pairs, ("document", "summary", "module"))


def split_summary(docstring: str) -> tuple[str, str]:
    """Split a docstring into summary line and body as PEP 257 defines them.

    Args:
        docstring: A docstring without indentation.

    Returns:
        The summary line and the body. The summary is empty if the first paragraph is longer than a line, a single
        word, or a call signature.
    """
    head, _, body = docstring.strip().partition("\n")
    words = re.findall(r"[^\W\d_]+", head)
    is_summary = body.startswith("\n") and len(head.split()) > 1 and len(words) > 1 and not _SIGNATURE.match(head)
    return (head.strip(), body.strip()) if is_summary else ("", docstring.strip())


def _in_splits(rows: list[tuple[dict[str, str], str]], columns: tuple[str, ...]) -> DatasetDict:
    features = Features({column: Value("string") for column in columns})
    parts: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for row, group in rows:
        parts[split_of(group)].append(row)
    return DatasetDict({split: Dataset.from_list(parts[split], features=features) for split in SPLITS})


@functools.cache
def _documents(include_site_packages: bool) -> tuple[Docstring, ...]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise RuntimeError(
            "python-docs needs pydoc_data, which this Python was installed without (on Debian and Ubuntu it comes "
            "with the package libpython3-stdlib)."
        ) from error
    reference = (Docstring(topics[name].strip(), name, "topic") for name in sorted(topics))
    return tuple(_without_duplicates([*reference, *_docstrings(include_site_packages)]))


@functools.cache
def _docstrings(include_site_packages: bool) -> tuple[Docstring, ...]:
    found = _read_tree(Path(sysconfig.get_path("stdlib")), "standard-library")
    if not found:
        raise RuntimeError(
            f"There are no Python sources in {sysconfig.get_path('stdlib')}: this Python was installed without them, "
            "so python-docs and python-docstrings cannot be read. Use another Python or --train_file."
        )
    if include_site_packages:
        for folder in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
            found.extend(_read_tree(Path(folder), "site-packages"))
    return tuple(_without_duplicates(found))


def _without_duplicates(rows: list[Docstring]) -> Iterator[Docstring]:
    seen: set[str] = set()
    for row in rows:
        if row.text and row.text not in seen:
            seen.add(row.text)
            yield row


def _read_tree(root: Path, source: str) -> list[Docstring]:
    """Return the docstrings of all modules under a folder, files sorted by name."""
    found: list[Docstring] = []
    collecting = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and looking for some takes two fifths of the time
    try:
        files = (path.relative_to(root) for path in root.rglob("*.py"))
        for path in sorted(files, key=lambda path: path.parts):
            if _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1]):
                module = path.parts[0].removesuffix(".py")
                found.extend(Docstring(text, module, source) for text in _read_docstrings(root / path))
    finally:
        if collecting:
            gc.enable()
    return found


def _read_docstrings(path: Path) -> Iterator[str]:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of Python warn about invalid escapes in old sources
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError, RecursionError):
        return  # templates, and files for other versions of Python
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None and (cleaned := inspect.cleandoc(text).strip()):
                yield cleaned
