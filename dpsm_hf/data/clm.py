"""Causal language modelling data: normalise texts, tokenize, put end tokens between documents, pack, collate."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from transformers import PreTrainedTokenizerBase

from .loading import AnyDataset, AnyDatasetDict, check_columns, column_names

logger = logging.getLogger(__name__)

PACKINGS = ("split", "batch")
BOUNDARIES = ("auto", "row", "blank_line")
IGNORED = -100
_TEXTS = ("string", "large_string", "string_view", "null")
_TOKENIZED = Features({"input_ids": List(Value("int32"))})
_FEATURES = Features(
    {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": List(Value("int64"))}
)


@dataclass(frozen=True)
class ClmPreprocessing:
    """How the texts of a split become rows of ``block_size`` tokens.

    With ``packing="batch"`` and everything else off, the rows are those of the upstream ``run_clm.py``: texts are
    joined 1,000 at a time, and the incomplete row at the end of each thousand is dropped. ``packing="split"`` joins
    the whole split (in a stream, each shard), so only the last row can be shorter; it is kept if it has at least
    ``min_remainder`` tokens.

    Args:
        block_size: Tokens of a row.
        packing: ``split`` or ``batch``.
        min_remainder: Fewest tokens of a last, shorter row (``split`` only).
        drop_empty_lines: Drop rows of blank text.
        unicode_nfkc: Normalise texts to Unicode's NFKC form.
        lowercase: Lower-case texts.
        add_eos_between_documents: Put the end-of-sequence token after every document.
        document_boundary: What ends a document: ``row``, each row of the data set; ``blank_line``, a row of blank
            text, which the end token replaces (for sets whose rows are the lines of a text).

    Raises:
        ValueError: A value out of range or an unknown name.
    """

    block_size: int
    packing: str = "split"
    min_remainder: int = 32
    drop_empty_lines: bool = False
    unicode_nfkc: bool = False
    lowercase: bool = False
    add_eos_between_documents: bool = False
    document_boundary: str = "row"

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(
                f"block_size {self.block_size} is too small: each token is trained on the next, so give 2 or more."
            )
        if self.packing not in PACKINGS:
            raise ValueError(f"packing {self.packing!r} is not one of {', '.join(PACKINGS)}.")
        if self.min_remainder < 2:
            raise ValueError(f"min_remainder {self.min_remainder} must be at least 2: one token predicts nothing.")
        if self.document_boundary not in ("row", "blank_line"):
            raise ValueError(f"document_boundary {self.document_boundary!r} is not row or blank_line.")


def choose_text_column(
    dataset: AnyDataset, wanted: str | None, split: str, *, option: str = "--text_column_name"
) -> str:
    """Pick the column to model: the wanted one, else ``text``, else the first.

    Args:
        dataset: One split.
        wanted: A column's name, or None.
        split: The split's name, for messages.
        option: The command-line option that names the column, for messages.

    Returns:
        The column's name.

    Raises:
        ValueError: The wanted column is missing, or the column does not hold text.
    """
    check_columns(dataset, {option: wanted}, split)
    names = column_names(dataset)
    if not names:
        raise ValueError(f"The {split} split has no columns: give data with a text in every row.")
    column = wanted if wanted is not None else "text" if "text" in names else names[0]
    feature = dataset.features.get(column) if dataset.features is not None else None
    if feature is not None and getattr(feature, "dtype", None) not in _TEXTS:
        raise ValueError(
            f"The column {column!r} of the {split} split holds {feature}, not text. Name a text column with "
            f"{option}; the columns are {', '.join(map(repr, names))}."
        )
    if wanted is None and column != "text" and isinstance(dataset, Dataset) and len(dataset):
        row = dataset[0]
        longer = [name for name in names if isinstance(row[name], str) and len(row[name]) > len(row[column] or "")]
        if longer:
            logger.warning(
                "The %s split has no column 'text', and its first, %r, is taken, though %s has more text: name a "
                "column with %s.",
                split, column, " and ".join(map(repr, longer)), option,
            )  # fmt: skip
    return column


def prepare_clm_datasets(
    raw: AnyDatasetDict | Mapping[str, AnyDataset],
    tokenizer: PreTrainedTokenizerBase,
    options: ClmPreprocessing,
    *,
    text_column: str | None = None,
    text_column_option: str = "--text_column_name",
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> AnyDatasetDict:
    """Turn every split into rows with ``input_ids``, ``attention_mask`` and ``labels``.

    Args:
        raw: The splits, all map-style or all streaming.
        tokenizer: Called with its own special-token settings, as upstream does.
        options: See `ClmPreprocessing`.
        text_column: Column to use; ``text``, or else the first, when None.
        text_column_option: The command-line option that names it, for messages.
        num_proc: Processes for tokenizing map-style splits.
        overwrite_cache: Recompute instead of reading the cache of ``datasets``.

    Returns:
        The same splits, each row at most ``block_size`` tokens long.

    Raises:
        ValueError: The column is missing or holds no text, ``add_eos_between_documents`` is set and the tokenizer has
            no end token, or a split gives no row.
    """
    if options.add_eos_between_documents and tokenizer.eos_token_id is None:
        raise ValueError(
            "--add_eos_between_documents needs a tokenizer with an end-of-sequence token; this one has no eos_token."
        )
    prepared = {}
    for split, dataset in raw.items():
        encode = functools.partial(
            encode_texts,
            tokenizer=tokenizer,
            column=choose_text_column(dataset, text_column, split, option=text_column_option),
            options=options,
        )
        if isinstance(dataset, Dataset):
            rows = _prepare_map_style(dataset, encode, tokenizer, options, split, num_proc, overwrite_cache)
            empty = len(rows) == 0
        else:
            rows = _prepare_stream(dataset, encode, tokenizer, options)
            empty = next(iter(rows), None) is None
        if empty:
            raise ValueError(
                f"The {split} split gives no training row: its text is too short for block_size {options.block_size}"
                + (f" and min_remainder {options.min_remainder}" if options.packing == "split" else "")
                + ". Use a smaller --block_size or more text."
            )
        prepared[split] = rows
    streaming = all(isinstance(part, IterableDataset) for part in prepared.values())
    return IterableDatasetDict(prepared) if streaming else DatasetDict(prepared)


def normalize_text(text: str | None, options: ClmPreprocessing) -> str:
    """Apply the Unicode and letter-case options to one text; a missing text counts as empty.

    Args:
        text: A text or None.
        options: ``unicode_nfkc`` and ``lowercase`` are read.

    Raises:
        ValueError: The value is neither a string nor None.
    """
    text = "" if text is None else text
    if not isinstance(text, str):
        raise ValueError(
            f"The column to model must hold text; a row holds {type(text).__name__} ({str(text)[:40]}). Name another "
            "column with --text_column_name."
        )
    if options.unicode_nfkc:
        text = unicodedata.normalize("NFKC", text)
    return text.lower() if options.lowercase else text


def encode_texts(
    batch: Mapping[str, Sequence[str | None]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    options: ClmPreprocessing,
) -> dict[str, list[list[int]]]:
    """Normalise and tokenize a batch of texts, with end tokens where documents end.

    Args:
        batch: Columns of a ``datasets`` batch.
        tokenizer: The tokenizer.
        column: The text column.
        options: See `ClmPreprocessing`.

    Returns:
        ``input_ids``: one list for each text that is kept. A blank row that ends a document becomes one end token.
    """
    texts = [normalize_text(text, options) for text in batch[column]]
    by_line = options.add_eos_between_documents and options.document_boundary == "blank_line"
    if options.drop_empty_lines and not by_line:
        texts = [text for text in texts if text.strip()]
    # verbose=False: no warning about texts longer than the model's limit, since they are cut into rows
    rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    if options.add_eos_between_documents:
        end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        if by_line:
            rows = [row if text.strip() else [end] for text, row in zip(texts, rows, strict=True)]
        else:
            rows = [row if not row or row[-1] == end else [*row, end] for row in rows]
    return {"input_ids": rows}


class Packer:
    """Cut a stream of token lists into rows of ``block_size``; incomplete rows are held for the next call.

    Args:
        options: ``block_size`` and ``min_remainder`` are read.
        end: The end token where blank lines end documents: several in a row become one, and the text ends with one.
            Else None.
    """

    def __init__(self, options: ClmPreprocessing, end: int | None = None) -> None:
        self.block_size = options.block_size
        self.min_remainder = min(options.min_remainder, options.block_size)
        self.end = end
        self.held: list[int] = []
        self.last: int | None = end  # no end token for blank lines before the first document

    def add(self, token_lists: Iterable[Sequence[int]]) -> list[list[int]]:
        """Add the tokens of further texts, one list for each, and return the rows that are now full."""
        for tokens in token_lists:
            if not tokens or (self.end is not None and len(tokens) == 1 and tokens[0] == self.end == self.last):
                continue
            self.held.extend(tokens)
            self.last = tokens[-1]
        full = len(self.held) // self.block_size * self.block_size
        rows = [self.held[start : start + self.block_size] for start in range(0, full, self.block_size)]
        self.held = self.held[full:]
        return rows

    def finish(self) -> list[list[int]]:
        """End the stream and return its last rows, the incomplete one only if it has ``min_remainder`` tokens."""
        rows = []
        if self.end is not None and self.last != self.end:
            rows = self.add([[self.end]])
        rest, self.held, self.last = self.held, [], self.end
        return [*rows, rest] if len(rest) >= self.min_remainder else rows

    def __call__(self, batch: Mapping[str, Any], indices: list[int], total: int) -> dict[str, list[list[int]]]:
        """Pack a batch for ``Dataset.map``, which passes batches in order; that with index ``total - 1`` ends it."""
        if indices[0] == 0:
            self.held, self.last = [], self.end
        rows = self.add(batch["input_ids"])
        if indices[-1] == total - 1:
            rows = [*rows, *self.finish()]
        return _columns(rows)


def pack_batch(batch: Mapping[str, Any], *, block_size: int) -> dict[str, list[list[int]]]:
    """Join the token lists of one batch and cut them into full rows; the rest is dropped, as upstream does.

    Args:
        batch: ``input_ids`` of a batch of texts.
        block_size: Tokens of a row.

    Returns:
        The columns of the rows; none when the batch has fewer tokens than a row.
    """
    joined = [token for tokens in batch["input_ids"] for token in tokens]
    full = len(joined) // block_size * block_size
    return _columns([joined[start : start + block_size] for start in range(0, full, block_size)])


def _columns(rows: list[list[int]]) -> dict[str, list[list[int]]]:
    return {
        "input_ids": rows,
        "attention_mask": [[1] * len(row) for row in rows],
        "labels": [list(row) for row in rows],
    }


def _packer(tokenizer: PreTrainedTokenizerBase, options: ClmPreprocessing) -> Packer:
    by_line = options.add_eos_between_documents and options.document_boundary == "blank_line"
    return Packer(options, tokenizer.eos_token_id if by_line else None)  # type: ignore[arg-type]


def _prepare_map_style(
    dataset: Dataset,
    encode: Callable[..., dict[str, list[list[int]]]],
    tokenizer: PreTrainedTokenizerBase,
    options: ClmPreprocessing,
    split: str,
    num_proc: int | None,
    overwrite_cache: bool,
) -> Dataset:
    workers = num_proc if num_proc is not None and num_proc > 1 else None
    cached = not overwrite_cache
    tokenized = dataset.map(
        encode,
        batched=True,
        remove_columns=dataset.column_names,
        features=_TOKENIZED,
        num_proc=workers,
        load_from_cache_file=cached,
        desc=f"Tokenizing {split}",
    )
    label = f"Packing {split} into rows of {options.block_size}"
    if options.packing == "batch":
        return tokenized.map(
            functools.partial(pack_batch, block_size=options.block_size),
            batched=True,
            remove_columns=tokenized.column_names,
            features=_FEATURES,
            num_proc=workers,
            load_from_cache_file=cached,
            desc=label,
        )
    # in one process, since rows span batches, which must come in order
    return tokenized.map(
        _packer(tokenizer, options),
        batched=True,
        with_indices=True,
        fn_kwargs={"total": len(tokenized)},
        remove_columns=tokenized.column_names,
        features=_FEATURES,
        load_from_cache_file=cached,
        desc=label,
    )


def _prepare_stream(
    dataset: IterableDataset,
    encode: Callable[..., dict[str, list[list[int]]]],
    tokenizer: PreTrainedTokenizerBase,
    options: ClmPreprocessing,
) -> IterableDataset:
    tokenized = dataset.map(encode, batched=True, remove_columns=column_names(dataset), features=_TOKENIZED)
    if options.packing == "batch":
        pack = functools.partial(pack_batch, block_size=options.block_size)
        return tokenized.map(pack, batched=True, remove_columns=["input_ids"], features=_FEATURES)
    # each shard is packed on its own, so that loader workers and processes can share out the shards
    count = max(1, tokenized.num_shards)
    shards = [tokenized.shard(num_shards=count, index=index) for index in range(count)] if count > 1 else [tokenized]
    arguments = {"shards": shards, "tokenizer": tokenizer, "options": options}
    return IterableDataset.from_generator(_packed_rows, features=_FEATURES, gen_kwargs=arguments)


def _packed_rows(
    shards: list[IterableDataset], tokenizer: PreTrainedTokenizerBase, options: ClmPreprocessing
) -> Iterator[dict[str, list[int]]]:
    packer = _packer(tokenizer, options)
    for shard in shards:
        # not `for row in shard`: in a loader worker that would divide the shard among the workers again
        for batch in shard.iter(batch_size=100):
            yield from map(_row, packer.add(batch["input_ids"]))
    yield from map(_row, packer.finish())


def _row(tokens: list[int]) -> dict[str, list[int]]:
    return {name: values[0] for name, values in _columns([tokens]).items()}


@dataclass(frozen=True)
class ClmCollator:
    """Stack rows into a batch and pad them to ``block_size``; padding is neither attended to nor scored.

    All batches get the same width, which torch.compile and gathering over processes need.

    Args:
        block_size: Width of every batch, in tokens.
        pad_token_id: For ``input_ids``; any id of the vocabulary works, since the attention mask hides it.
    """

    block_size: int
    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Make the batch.

        Args:
            rows: ``input_ids`` and ``labels``, each at most ``block_size`` long.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` (-100 where padded), each [rows, block_size], int64.
        """
        batch = {
            "input_ids": torch.full((len(rows), self.block_size), self.pad_token_id),
            "attention_mask": torch.zeros(len(rows), self.block_size, dtype=torch.int64),
            "labels": torch.full((len(rows), self.block_size), IGNORED),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, :length] = torch.as_tensor(row["labels"])
        return batch
