"""Summarisation data: find the columns, filter the pairs of text and summary, and tokenize them.

Functions on batches are pure, so they work in `datasets.Dataset.map` (several processes, cache) and with
`IterableDataset`. Loading is in `dpsm_hf.data.loading`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# (text column, summary column) by the data set's name without the organisation, in lower case.
SUMMARIZATION_COLUMNS: dict[str, tuple[str, str]] = {
    "aeslc": ("email_body", "subject_line"),
    "amazon_reviews_multi": ("review_body", "review_title"),
    "arxiv-summarization": ("article", "abstract"),
    "big_patent": ("description", "abstract"),
    "billsum": ("text", "summary"),
    "cnn_dailymail": ("article", "highlights"),
    "dialogsum": ("dialogue", "summary"),
    "gigaword": ("document", "summary"),
    "multi_news": ("document", "summary"),
    "newsroom": ("text", "summary"),
    "orange_sum": ("text", "summary"),
    "pn_summary": ("article", "summary"),
    "psc": ("extract_text", "summary_text"),
    "pubmed-summarization": ("article", "abstract"),
    "python-docstrings": ("document", "summary"),
    "reddit_tifu": ("documents", "tldr"),
    "samsum": ("dialogue", "summary"),
    "scientific_papers": ("article", "abstract"),
    "thaisum": ("body", "summary"),
    "wiki_summary": ("article", "highlights"),
    "wikihow": ("text", "headline"),
    "xglue": ("news_body", "news_title"),
    "xlsum": ("text", "summary"),
    "xsum": ("document", "summary"),
}


@dataclasses.dataclass(frozen=True)
class TokenizationSettings:
    """The settings of `tokenize_pairs`.

    Args:
        text_column: Column with the full texts.
        summary_column: Column with the summaries.
        max_source_length: Tokens kept of a source, special tokens and prefix included.
        max_target_length: Tokens kept of a summary, special tokens included.
        source_prefix: Text put before every source ("summarize: " for T5).
        pad_to_max_length: Pad every row to the two lengths instead of padding each batch in the collator.
        ignore_pad_token_for_loss: Write -100 in place of padding in labels.
    """

    text_column: str
    summary_column: str
    max_source_length: int = 1024
    max_target_length: int = 128
    source_prefix: str = ""
    pad_to_max_length: bool = False
    ignore_pad_token_for_loss: bool = True

    def __post_init__(self) -> None:
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1 token.")


@dataclasses.dataclass(frozen=True)
class FilterCounts:
    """How many pairs were kept, dropped for an empty text or summary, and dropped as too short; None for a stream."""

    kept: int | None
    empty: int | None
    short: int | None


def known_columns(dataset_name: str | None) -> tuple[str, str] | None:
    """Return the (text, summary) columns of a well-known data set.

    Args:
        dataset_name: A name with or without its organisation, such as `xsum` or `EdinburghNLP/xsum`; None for files.

    Returns:
        The pair of column names, or None when the data set is not in `SUMMARIZATION_COLUMNS`.
    """
    if dataset_name is None:
        return None
    return SUMMARIZATION_COLUMNS.get(dataset_name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower())


def resolve_columns(
    column_names: Sequence[str],
    dataset_name: str | None = None,
    text_column: str | None = None,
    summary_column: str | None = None,
) -> tuple[str, str]:
    """Decide which columns hold texts and summaries.

    In this order: an explicit name; the columns of a known data set; else, as in the upstream script, the first column
    for the texts and the second for the summaries, with a warning because it is a guess.

    Args:
        column_names: Columns of the data set, in order.
        dataset_name: Name of the data set, to look up its columns; None for local files.
        text_column: Value of --text_column.
        summary_column: Value of --summary_column.

    Returns:
        `(text_column, summary_column)`.

    Raises:
        ValueError: If a column is missing, both are the same column, or there are fewer than two to guess from.
    """
    present = list(column_names)
    listed = ", ".join(repr(name) for name in present) or "none"
    table = known_columns(dataset_name)
    chosen: list[str] = []
    for position, (flag, given) in enumerate((("--text_column", text_column), ("--summary_column", summary_column))):
        if given is not None:
            name, origin = given, f"{flag} is '{given}'"
        elif table is not None:
            name, origin = table[position], f"'{dataset_name}' is expected to hold a column '{table[position]}'"
        elif len(present) >= 2:
            name, origin = present[position], ""
            logger.warning("%s was not given: column %d, '%s', is taken.", flag, position + 1, name)
        else:
            raise ValueError(
                f"Texts and summaries need two columns; the columns there are: {listed}. "
                "Name them with --text_column and --summary_column."
            )
        if name not in present:
            raise ValueError(f"{origin}, but the columns there are: {listed}. Pass {flag} with one of them.")
        chosen.append(name)
    if chosen[0] == chosen[1]:
        raise ValueError(
            f"Texts and summaries would both come from column '{chosen[0]}'; the columns there are: {listed}. "
            "Name two different ones with --text_column and --summary_column."
        )
    return chosen[0], chosen[1]


def has_both_sides(batch: Mapping[str, Sequence[Any]], text_column: str, summary_column: str) -> list[bool]:
    """Return for each pair whether neither text nor summary is missing or blank.

    Args:
        batch: Columns of one batch.
        text_column: Column with the texts.
        summary_column: Column with the summaries.

    Returns:
        One boolean for each row.

    Raises:
        ValueError: If a value is not text.
    """
    texts, summaries = _texts(batch, text_column), _texts(batch, summary_column)
    return [bool(text.strip()) and bool(summary.strip()) for text, summary in zip(texts, summaries, strict=True)]


def has_enough_words(batch: Mapping[str, Sequence[Any]], text_column: str, min_source_words: int) -> list[bool]:
    """Return for each text whether it has at least `min_source_words` words separated by white space."""
    return [len(text.split()) >= min_source_words for text in _texts(batch, text_column)]


def filter_pairs(
    dataset: Any,
    text_column: str,
    summary_column: str,
    *,
    min_source_words: int = 0,
    split: str = "data",
    num_proc: int | None = None,
    load_from_cache_file: bool | None = None,
) -> tuple[Any, FilterCounts]:
    """Drop pairs with an empty text or summary, then pairs with a short text, and log how many of each.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`.
        text_column: Column with the texts.
        summary_column: Column with the summaries.
        min_source_words: Texts with fewer words are dropped; 0 keeps all, as upstream does.
        split: Name of the split in messages.
        num_proc: Processes for a `Dataset`.
        load_from_cache_file: False recomputes instead of reading the cache (`Dataset` only).

    Returns:
        The kept pairs with all their columns, and the counts.

    Raises:
        ValueError: If a value is not text, `min_source_words` is negative, or nothing is left.
    """
    if min_source_words < 0:
        raise ValueError(f"--min_source_words is {min_source_words}; use 0 (off) or a positive number of words.")
    streaming = not hasattr(dataset, "__len__")
    options: dict[str, Any] = {"batched": True}
    if not streaming:
        options |= {"num_proc": num_proc, "load_from_cache_file": load_from_cache_file}
    filled = dataset.filter(
        has_both_sides, fn_kwargs={"text_column": text_column, "summary_column": summary_column}, **options
    )
    kept = filled
    if min_source_words > 0:
        kept = filled.filter(
            has_enough_words, fn_kwargs={"text_column": text_column, "min_source_words": min_source_words}, **options
        )
    if streaming:
        logger.info("Pairs of the streamed %s set are filtered as they come; they are not counted.", split)
        return kept, FilterCounts(kept=None, empty=None, short=None)
    counts = FilterCounts(kept=len(kept), empty=len(dataset) - len(filled), short=len(filled) - len(kept))
    logger.info(
        "%s set: %d pairs kept, %d dropped for an empty text or summary, %d dropped for a text under %d words.",
        split,
        counts.kept,
        counts.empty,
        counts.short,
        min_source_words,
    )
    if not len(kept):
        raise ValueError(
            f"The {split} set has no pair left of {len(dataset)}: {counts.empty} have an empty '{text_column}' or "
            f"'{summary_column}' and {counts.short} have a '{text_column}' under {min_source_words} words. "
            "Check the columns, or lower --min_source_words."
        )
    return kept, counts


def tokenize_pairs(
    batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, settings: TokenizationSettings
) -> dict[str, list[Any]]:
    """Tokenize a batch of pairs into `input_ids`, `attention_mask` and `labels`.

    Args:
        batch: Columns of one batch, without empty texts or summaries (see `filter_pairs`).
        tokenizer: Any tokenizer; summaries are tokenized as `text_target` (for mBART's language codes).
        settings: Columns, lengths, prefix and padding.

    Returns:
        The tokenizer's columns for the sources, and `labels`.

    Raises:
        ValueError: If a value is not text, or ``pad_to_max_length`` is set and the tokenizer has no pad token.
    """
    if settings.pad_to_max_length and tokenizer.pad_token_id is None:
        raise ValueError(
            f"--pad_to_max_length needs a pad token, and {type(tokenizer).__name__} has none: leave the option out, "
            "or set the tokenizer's pad_token."
        )
    padding = "max_length" if settings.pad_to_max_length else False
    sources = [settings.source_prefix + text for text in _texts(batch, settings.text_column)]
    targets = _texts(batch, settings.summary_column)
    encoded = dict(tokenizer(sources, max_length=settings.max_source_length, padding=padding, truncation=True))
    labels = tokenizer(text_target=targets, max_length=settings.max_target_length, padding=padding, truncation=True)
    rows = labels["input_ids"]
    if settings.pad_to_max_length and settings.ignore_pad_token_for_loss:
        # by the mask, not by the id: where the pad token is the end token too, the real end token must stay a label
        rows = [
            [token if kept else -100 for token, kept in zip(row, mask, strict=True)]
            for row, mask in zip(rows, labels["attention_mask"], strict=True)
        ]
    encoded["labels"] = rows
    return encoded


def tokenize_split(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizationSettings,
    *,
    split: str = "data",
    num_proc: int | None = None,
    load_from_cache_file: bool | None = None,
) -> Any:
    """Tokenize a split of pairs, drop its text columns, and warn if summaries reach the length limit.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset` of non-empty pairs.
        tokenizer: Any tokenizer.
        settings: Columns, lengths, prefix and padding.
        split: Name of the split in messages.
        num_proc: Processes for a `Dataset`.
        load_from_cache_file: False recomputes instead of reading the cache (`Dataset` only).

    Returns:
        The data set with the tokenizer's columns and `labels`.

    Raises:
        ValueError: See `tokenize_pairs`.
    """
    options: dict[str, Any] = {
        "batched": True,
        "fn_kwargs": {"tokenizer": tokenizer, "settings": settings},
        "remove_columns": dataset.column_names,
    }
    if not hasattr(dataset, "__len__"):
        return dataset.map(tokenize_pairs, **options)
    tokenized = dataset.map(
        tokenize_pairs,
        num_proc=num_proc,
        load_from_cache_file=load_from_cache_file,
        desc=f"Running tokenizer on the {split} set",
        **options,
    )
    limit = settings.max_target_length
    at_limit = sum(sum(token != -100 for token in row) >= limit for row in tokenized["labels"]) if limit else 0
    if at_limit and not settings.pad_to_max_length:
        logger.warning(
            "%s set: %d of %d summaries reach the limit of %d tokens and may be truncated; generated text is scored "
            "against the truncated summary.",
            split,
            at_limit,
            len(tokenized),
            limit,
        )
    return tokenized


def _texts(batch: Mapping[str, Sequence[Any]], column: str) -> list[str]:
    """Return a column as strings, None as the empty one; raise for any other value."""
    texts: list[str] = []
    for index, value in enumerate(batch[column]):
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"Column '{column}' must hold text; row {index} of a batch holds {type(value).__name__} "
                f"({str(value)[:40]}). Choose other columns with --text_column and --summary_column, or join lists "
                "into one text first."
            )
        texts.append(value or "")
    return texts
