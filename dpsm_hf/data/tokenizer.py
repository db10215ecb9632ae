"""Tokenizers: pretrained ones by name, or a byte-level BPE trained on the run's own train split."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .loading import AnyDataset

logger = logging.getLogger(__name__)

TRAIN_BPE = "train-bpe"
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_MAX_LENGTH = 1024
# Enough for the vocabulary of a small model, and a bound for streams.
MAX_TRAINING_ROWS = 500_000

# BART's numbering of its special tokens.
SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_RECORD = "train-bpe.json"
_BYTES = 256


def train_bpe_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    sequence_template: bool = False,
    model_max_length: int = DEFAULT_MAX_LENGTH,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; its alphabet is the 256 bytes, so it can reproduce any text exactly.

    Args:
        texts: Training texts.
        vocab_size: Number of tokens including the special ones; the result has fewer if the texts have too little to
            merge.
        sequence_template: Put ``<s>`` before and ``</s>`` after every sequence, as for encoder-decoders; otherwise no
            special tokens are added, as for GPT-2.
        model_max_length: The model's limit in tokens, saved with the tokenizer.

    Returns:
        The tokenizer, with ``<s>``, ``<pad>``, ``</s>`` and ``<unk>`` as ids 0 to 3.

    Raises:
        ValueError: ``vocab_size`` is too small for a merge, or there is no text.

    Source:
        Sennrich et al. 2016 (BPE); Radford et al. 2019 (over bytes).
    """
    check_vocab_size(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counter(texts)
    backend.train_from_iterator(counted, trainer=trainer)
    if counted.characters == 0:
        raise ValueError("There is no text to train a tokenizer on: the train split is empty or blank.")
    if sequence_template:
        start, end = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}",
            pair=f"{start} $A {end} {end} $B {end}",
            special_tokens=[(token, backend.token_to_id(token)) for token in (start, end)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
    if len(tokenizer) < vocab_size:
        logger.warning(
            "The tokenizer has %s tokens rather than %s: its training text (%s characters) has no more to merge.",
            len(tokenizer),
            vocab_size,
            counted.characters,
        )
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    """Raise for a vocabulary without room for the bytes, the special tokens and one merge.

    Args:
        vocab_size: Number of tokens.

    Raises:
        ValueError: It is 260 or less.
    """
    least = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size <= least:
        raise ValueError(
            f"--tokenizer_vocab_size {vocab_size} is too small: {_BYTES} bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens take {least}, so give at least {least + 1} (a few thousand work well)."
        )


def resolve_tokenizer(
    tokenizer_name: str,
    *,
    output_dir: str | os.PathLike[str],
    training_texts: Callable[[], Iterable[str]],
    vocab_size: int | None = None,
    sequence_template: bool = False,
    model_max_length: int = DEFAULT_MAX_LENGTH,
    resuming: bool = False,
    main_process_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **pretrained_options: Any,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name, or train one if the name is ``train-bpe``.

    A trained tokenizer is saved in ``output_dir/tokenizer`` with its size and a sha256 of its training texts. The main
    process trains it; the other processes, and later runs with the same size and texts, load it.

    Args:
        tokenizer_name: A hub name, a folder, or ``train-bpe``.
        output_dir: Folder of the run.
        training_texts: Returns the texts of the train split, each time from the start.
        vocab_size: Size for ``train-bpe``; 4096 when None.
        sequence_template: See `train_bpe_tokenizer`.
        model_max_length: See `train_bpe_tokenizer`; replaces the value of a saved tokenizer.
        resuming: Whether the run continues a checkpoint, whose tokenizer must not change.
        main_process_first: Returns a context in which the main process runs before the others, such as
            ``training_args.main_process_first``.
        pretrained_options: Passed to ``AutoTokenizer.from_pretrained`` for any other name.

    Returns:
        The tokenizer.

    Raises:
        ValueError: The size is too small, there is no text, or a resumed run would get another tokenizer.
    """
    if tokenizer_name != TRAIN_BPE:
        return AutoTokenizer.from_pretrained(tokenizer_name, **pretrained_options)
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    check_vocab_size(size)
    folder = Path(output_dir) / "tokenizer"
    with main_process_first():
        record = {"vocab_size": size, "sequence_template": sequence_template, "texts": fingerprint(training_texts())}
        kept = _read_record(folder)
        if kept == record:
            logger.info("Using the tokenizer that was trained for this run before, in %s.", folder)
        elif kept is not None and resuming:
            raise ValueError(
                f"The tokenizer in {str(folder)!r} was trained with {_differences(kept, record)}, and the checkpoint "
                "to resume was trained with it. Repeat the run's own settings, or start afresh with another "
                "--output_dir."
            )
        else:
            logger.info("Training a byte-level BPE tokenizer of %s tokens on the train split.", size)
            trained = train_bpe_tokenizer(training_texts(), size, sequence_template=sequence_template)
            _save(trained, record, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = model_max_length
    return tokenizer


def column_texts(dataset: AnyDataset, columns: Iterable[str], limit: int = MAX_TRAINING_ROWS) -> Iterator[str]:
    """Yield the non-empty texts of some columns of a split, row by row.

    Args:
        dataset: The train split, map-style or streaming.
        columns: Names of text columns.
        limit: Largest number of rows to read.
    """
    names = list(columns)
    for row in islice(dataset.select_columns(names), limit):
        for name in names:
            if row[name]:
                yield row[name]


def fingerprint(texts: Iterable[str]) -> str:
    """Return the sha256 (hexadecimal) of a sequence of texts; where each text ends counts too."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class _Counter:
    """Count the characters of texts while iterating over them; the BPE trainer does not report an empty iterator."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text.strip())
            yield text


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _save(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], folder: Path) -> None:
    # written to a temporary folder and moved, so that a killed run leaves no incomplete tokenizer
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(draft)
    (draft / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    draft.replace(folder)


def _differences(kept: dict[str, Any], wanted: dict[str, Any]) -> str:
    parts = [f"{key} {kept.get(key)!r} instead of {wanted[key]!r}" for key in wanted if kept.get(key) != wanted[key]]
    return ", ".join(part if not part.startswith("texts") else "other training texts" for part in parts)
