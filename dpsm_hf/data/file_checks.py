"""Check a data file before `datasets` reads it: for what crashes its readers, or fails in them without a file name."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

# A line with no more brackets than this is not checked for nesting; readers crash at tens of thousands of levels.
_BRACKETS = 200
# Bytes from the start of a file that are parsed to see how deeply a value over many lines is nested.
_BEGINNING = 1 << 22
_BLANK = b" \t\r\n"


def check_file(path: str, option: str) -> None:
    """Raise for a data file that does not exist, cannot be read or would crash the process.

    Args:
        path: A csv, json, jsonl, txt or parquet file; all but parquet may be gzipped (``.gz``).
        option: The option that names it, for the message.

    Raises:
        FileNotFoundError: There is no such file, or it is a folder.
        ValueError: Naming the file, the place in it and the remedy.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(
            f"{option} {path!r} is a folder, not a file: name a file in it, or give the folder with --dataset_name."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option} {path!r}: there is no such file.")
    suffixes = {suffix.lower() for suffix in Path(path).suffixes[-2:]}
    if ".parquet" in suffixes:
        check_parquet(path)
        return
    check_utf8(path)
    if suffixes & {".json", ".jsonl"}:
        check_json(path)


def check_utf8(path: str) -> None:
    """Raise for a text file that is not UTF-8, naming the first wrong byte.

    Args:
        path: A file, possibly ending in ``.gz`` (the offset then counts in the unpacked text).

    Raises:
        ValueError: The file is not UTF-8, or ends in ``.gz`` and is not a complete gzip file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    start = b""
    try:
        with _opened(path) as file:
            while block := file.read(1 << 20):
                start = start or block[:4]
                pending = len(decoder.getstate()[0])
                decoder.decode(block)
                consumed += len(block)
            pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # error.start counts from the first byte that the decoder held back from the previous block
        offset = consumed - pending + error.start
        raise ValueError(
            f"The file {path!r} is not UTF-8: byte {offset} is 0x{error.object[error.start]:02x} ({error.reason}). "
            f"Convert it first, for instance with: iconv -f {_guess_encoding(start)} -t UTF-8 {path} > converted.txt"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"The file {path!r} is not a complete gzip file: {error}") from error


def check_parquet(path: str) -> None:
    """Raise for a parquet file that is damaged or whose texts are not UTF-8, which readers notice only row by row.

    Args:
        path: The file.

    Raises:
        ValueError: Naming the column and the row.
    """
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    try:
                        column.validate(full=True)
                    except pa.ArrowInvalid as error:
                        raise ValueError(
                            f"The file {path!r} is damaged in column {name!r}, in one of the rows {row} to "
                            f"{row + len(batch) - 1}: {error}. Texts in parquet must be UTF-8: write the file anew "
                            "from its source, with the texts decoded."
                        ) from error
                row += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The file {path!r} could not be read as parquet: {error}. It is damaged or of another kind: write it "
            "anew."
        ) from error


def check_json(path: str) -> None:
    """Raise for JSON that makes pyarrow's reader crash the process: a row that is null, or very deep nesting.

    Args:
        path: A file with one object per line, or with a list of objects; possibly ending in ``.gz``.

    Raises:
        ValueError: Naming the line or row and the remedy.
    """
    with _opened(path) as file:
        start = file.read(_BEGINNING)
    if start.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK).startswith(b"["):
        with _opened(path) as file:
            _check_list(path, _parsed(path, file.read(), "the list"))
        return
    depth = 0
    with _opened(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK).startswith(b"null"):
                raise ValueError(_null(path, f"line {number}"))
            opened = line.count(b"{") + line.count(b"[")
            if opened > _BRACKETS:
                _parsed(path, line, f"line {number}")
            depth = max(0, depth + opened - line.count(b"}") - line.count(b"]"))
            if depth > _BRACKETS:  # a value over many lines; or brackets inside texts, which then parse without error
                _parsed(path, start, "its first value")
                depth = 0


def _check_list(path: str, rows: Any) -> None:
    if isinstance(rows, list) and any(isinstance(row, dict) for row in rows) and None in rows:
        raise ValueError(_null(path, f"row {rows.index(None)} of the list"))


def _parsed(path: str, text: bytes, what: str) -> Any:
    """Parse a text and raise if it is nested too deeply; None if it is not valid JSON, which the reader reports."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(
            f"The file {path!r} is nested too deeply ({what}): readers crash on it. Write rows with plain texts."
        ) from None
    except ValueError:
        return None


def _null(path: str, where: str) -> str:
    return (
        f"The file {path!r} has null for a row ({where}), and readers crash on it: leave that row out, or write "
        'an object such as {"text": null}.'
    )


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    # readers also end a line at a lone carriage return
    return (part for line in file for part in (line.splitlines() if b"\r" in line else (line,)))


def _opened(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _guess_encoding(start: bytes) -> str:
    return "UTF-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "WINDOWS-1252"
