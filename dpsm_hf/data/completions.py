"""Pairs of a prompt and its completion for a causal language model, of which only the completion is scored."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .loading import AnyDataset, check_columns, column_names

logger = logging.getLogger(__name__)

#: What stands for the prompt in a template.
PLACE = "{prompt}"

IGNORED = -100
_FEATURES = Features(
    {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": List(Value("int64"))}
)


@dataclass(frozen=True)
class CompletionFormat:
    """How a pair becomes the text of a row.

    Args:
        prompt_column: Column of the prompts.
        completion_column: Column of the completions.
        template: Text of the prompt, in which ``{prompt}`` stands for the column's text.
        chat: Put both into the tokenizer's chat template, as the messages of a user and of an assistant. Without it a
            row is the prompt's text, the completion's and the end-of-sequence token.

    Raises:
        ValueError: The template has no ``{prompt}``, or both columns are the same.
    """

    prompt_column: str
    completion_column: str
    template: str = PLACE
    chat: bool = False

    def __post_init__(self) -> None:
        if PLACE not in self.template:
            raise ValueError(f"--prompt_template {self.template!r} has no {PLACE}, where the prompt's text goes.")
        if self.prompt_column == self.completion_column:
            raise ValueError(
                f"--prompt_column and --completion_column are both {self.prompt_column!r}: a prompt cannot be its own "
                "completion."
            )

    @classmethod
    def of(
        cls, prompt_column: str | None, completion_column: str | None, prompt_template: str | None, use_chat: bool
    ) -> CompletionFormat | None:
        """Return the format that the options of these names ask for; None where rows are cut from texts.

        Raises:
            ValueError: One column is given without the other, or how a prompt is written without any.
        """
        columns = {"prompt_column": prompt_column, "completion_column": completion_column}
        given = [name for name, value in columns.items() if value is not None]
        if len(given) == 1:
            missing = next(name for name in columns if name not in given)
            raise ValueError(f"--{given[0]} {columns[given[0]]} needs --{missing} too.")
        if prompt_column is None or completion_column is None:
            for name, used in (("prompt_template", prompt_template is not None), ("use_chat_template", use_chat)):
                if used:
                    raise ValueError(f"--{name} needs --prompt_column and --completion_column.")
            return None
        template = PLACE if prompt_template is None else prompt_template
        return cls(prompt_column, completion_column, template, use_chat)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise unless a tokenizer can write this format.

        Raises:
            ValueError: It has no chat template, or no end-of-sequence token where one is needed.
        """
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("--use_chat_template needs a tokenizer with a chat template; this one has none.")
        if not self.chat and tokenizer.eos_token_id is None:
            raise ValueError("--completion_column needs a tokenizer with an end-of-sequence token; this one has none.")

    def check_columns(self, dataset: AnyDataset, split: str) -> None:
        """Raise a ValueError if a split lacks one of the columns."""
        columns = {"--prompt_column": self.prompt_column, "--completion_column": self.completion_column}
        check_columns(dataset, columns, split)

    def tokens(self, prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and those of its completion with the end of the text.

        Raises:
            ValueError: The chat template writes the prompt in another way once an answer follows.
        """
        text = self.template.replace(PLACE, prompt)
        if not self.chat:
            asked: list[int] = tokenizer(text, verbose=False)["input_ids"]
            end: int = tokenizer.eos_token_id  # type: ignore[assignment]
            if asked and asked[-1] == end and _ends_every_text(tokenizer):
                asked = asked[:-1]
            if not asked:  # something has to stand before the first token of the completion, or nothing predicts it
                asked = [end if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
            return asked, [*tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], end]
        user = {"role": "user", "content": text}
        messages = [user, {"role": "assistant", "content": completion}]
        apply: Any = functools.partial(tokenizer.apply_chat_template, return_dict=False)
        asked, whole = list(apply([user], add_generation_prompt=True)), list(apply(messages))
        if whole[: len(asked)] == asked:
            return asked, whole[len(asked) :]
        before, both = (
            apply([user], add_generation_prompt=True, tokenize=False),
            apply(messages, tokenize=False),
        )
        if not both.startswith(before):
            raise ValueError(
                "--use_chat_template: this tokenizer's chat template does not begin a conversation with an answer as "
                "it begins one without, so it cannot be told where the completion starts; leave the option out."
            )
        # white space at the beginning of a completion may join the end of the prompt in one token
        return asked, tokenizer(both[len(before) :], add_special_tokens=False, verbose=False)["input_ids"]


def _ends_every_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts its end-of-sequence token behind a text."""
    marked, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return bool(len(marked) > len(plain) and marked[-1] == tokenizer.eos_token_id != plain[-1])


def prepare_completions(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    how: CompletionFormat,
    block_size: int,
    *,
    split: str,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> Dataset:
    """Turn pairs into rows with ``input_ids``, ``attention_mask`` and ``labels``, which are -100 over the prompt.

    Args:
        dataset: One split, map-style.
        tokenizer: Of the run.
        how: The columns and the format.
        block_size: Most tokens of a row. Longer pairs are left out, with a warning that counts them.
        split: Its name, for messages.
        num_proc: Processes.
        overwrite_cache: Recompute instead of reading the cache of ``datasets``.

    Returns:
        A row a pair, in their order.

    Raises:
        ValueError: A column is missing or does not hold text, the tokenizer cannot write the format, or no pair fits.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("--completion_column cannot be combined with --streaming.")
    how.check(tokenizer)
    how.check_columns(dataset, split)
    rows = dataset.map(
        functools.partial(_encode, tokenizer=tokenizer, how=how, block_size=block_size),
        batched=True,
        remove_columns=column_names(dataset),
        features=_FEATURES,
        num_proc=num_proc if num_proc is not None and num_proc > 1 else None,
        load_from_cache_file=not overwrite_cache,
        desc=f"Tokenizing {split}",
    )
    if not len(rows):
        raise ValueError(
            f"No pair of the {split} split fits into --block_size {block_size} tokens, or all its completions are "
            "empty: give a larger one."
        )
    if missing := len(dataset) - len(rows):
        logger.warning(
            "%d of %d pairs of the %s split are left out: longer than --block_size %d, or without a completion.",
            missing, len(dataset), split, block_size,
        )  # fmt: skip
    return rows


def _encode(
    batch: Mapping[str, Sequence[Any]], *, tokenizer: PreTrainedTokenizerBase, how: CompletionFormat, block_size: int
) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = {name: [] for name in _FEATURES}
    for prompt, completion in zip(batch[how.prompt_column], batch[how.completion_column], strict=True):
        for column, text in ((how.prompt_column, prompt), (how.completion_column, completion)):
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"The column {column!r} must hold text, but a row holds {type(text).__name__} ({str(text)[:40]})."
                )
        if not completion or not completion.strip():
            continue
        asked, answer = how.tokens(prompt or "", completion, tokenizer)
        if len(asked) + len(answer) <= block_size:
            found["input_ids"].append([*asked, *answer])
            found["attention_mask"].append([1] * (len(asked) + len(answer)))
            found["labels"].append([*[IGNORED] * len(asked), *answer])
    return found


def split_row(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens of a row's prompt and of its completion; of a row without a prompt its two halves."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    asked = next((i for i, label in enumerate(labels) if label != IGNORED), 0) or len(ids) // 2
    return ids[:asked], ids[asked:]


@dataclass(frozen=True)
class CompletionCollator:
    """Stack rows into a batch and pad them on the right to a multiple of eight tokens, as few as hold the longest.

    Args:
        pad_token_id: For ``input_ids``; any id of the vocabulary works, since the attention mask hides it.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Make the batch: ``input_ids``, ``attention_mask`` and ``labels``, each [rows, width], int64."""
        width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch = {name: torch.full((len(rows), width), value) for name, value in fill.items()}
        for index, row in enumerate(rows):
            for name, values in batch.items():
                values[index, : len(row[name])] = torch.as_tensor(row[name])
        return batch
