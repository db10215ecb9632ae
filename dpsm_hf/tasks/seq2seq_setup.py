"""Fits an encoder-decoder model, its tokenizer, its lengths and its generation settings together before training."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import MBart50Tokenizer, MBartTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Tokenizers that put a language code into every row. Since transformers 5 one class each, backed by `tokenizers`.
MULTILINGUAL_TOKENIZERS = (MBartTokenizer, MBart50Tokenizer)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse, by a ValueError, a tokenizer without a pad token or an end token."""
    for attribute, purpose in (("pad_token", "pad batches"), ("eos_token", "end summaries")):
        if getattr(tokenizer, f"{attribute}_id") is None:
            raise ValueError(
                f"The tokenizer {type(tokenizer).__name__} has no {attribute}, which is needed to {purpose}. Use the "
                "tokenizer of an encoder-decoder model, --tokenizer_name train-bpe, or set the token and save it."
            )


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Enlarge the model's token embeddings, in place, where the tokenizer has more tokens; never shrink them."""
    rows: int = model.get_input_embeddings().weight.size(0)  # type: ignore[union-attr, operator]
    if len(tokenizer) > rows:
        logger.info("Enlarging the token embeddings from %d to the tokenizer's %d rows.", rows, len(tokenizer))
        model.resize_token_embeddings(len(tokenizer))


def set_languages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lang: str | None = None,
    forced_bos_token: str | None = None,
) -> None:
    """Set the language of sources and summaries, and the token that generation must write first.

    mBART starts the decoder with the language code (see `check_decoder_start`). mBART-50 starts it with `</s>` and
    writes the code first, which `forced_bos_token` makes sure of. Changed in place are a multilingual tokenizer and
    `model.generation_config` (in transformers 5 a model whose config holds such settings cannot be saved).

    Args:
        lang: A language code of the tokenizer such as `en_XX`; required by multilingual tokenizers.
        forced_bos_token: Token that generation must write first; None for none.

    Raises:
        ValueError: If a language is required and missing, or a code or token is not in the vocabulary.
    """
    generation, vocabulary = model.generation_config, tokenizer.get_vocab()
    if isinstance(tokenizer, MULTILINGUAL_TOKENIZERS):
        codes = ", ".join(sorted(tokenizer.lang_code_to_id))
        if lang is None:
            raise ValueError(f"{type(tokenizer).__name__} is multilingual: pass --lang with one of {codes}.")
        if lang not in tokenizer.lang_code_to_id or lang not in vocabulary:
            raise ValueError(f"--lang '{lang}' is not a language code of this tokenizer; it has {codes}.")
        tokenizer.src_lang = tokenizer.tgt_lang = lang
        if generation is not None:
            # A code left over from another fine-tuning would force the wrong language.
            generation.forced_bos_token_id = None
    if forced_bos_token is not None:
        if forced_bos_token not in vocabulary:
            raise ValueError(
                f"--forced_bos_token '{forced_bos_token}' is not one token of {type(tokenizer).__name__}'s vocabulary."
            )
        if generation is not None:
            generation.forced_bos_token_id = vocabulary[forced_bos_token]


def check_decoder_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation start with the token that training starts the decoder with.

    BART, T5 and PEGASUS start with `config.decoder_start_token_id`. mBART moves the last token of the labels to the
    front (the language code; `</s>` for mBART-50 or a tokenizer without codes), whatever its config says. The model's
    config and generation config are changed in place; the tokenizer's languages must be set.

    Raises:
        ValueError: If there is no start token.
    """
    generation = model.generation_config
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None and generation is not None:
        start = generation.decoder_start_token_id
    model.config.decoder_start_token_id = start
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        try:
            start = int(prepare(torch.tensor([tokenizer(text_target="a").input_ids]))[0, 0])
        except (TypeError, ValueError):  # what BART and T5 raise without a start token
            start = None
    if start is None:
        raise ValueError(
            f"{type(model).__name__} has no decoder_start_token_id, so its decoder has nothing to start from. Set it "
            "in the config (BART: the id of </s>; T5 and PEGASUS: the id of <pad>), or with "
            "--config_overrides decoder_start_token_id=ID when training from scratch."
        )
    model.config.decoder_start_token_id = start
    if generation is not None:
        generation.decoder_start_token_id = start


def check_source_prefix(model: PreTrainedModel, source_prefix: str | None, from_scratch: bool) -> None:
    """Warn when a pretrained T5 is used without the task prefix it was trained with; fresh weights expect none."""
    if source_prefix is None and not from_scratch and model.config.model_type == "t5":
        logger.warning(
            "A T5 model is used without a source prefix; the pretrained ones expect one, for example "
            "--source_prefix 'summarize: '."
        )


# ---- positions for longer sources than a model was made for ---------------------------------------------------------


def position_limit(model: PreTrainedModel) -> int | None:
    """Return how many positions the model's absolute position embeddings have, or None when it has no such limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def resize_positions(model: PreTrainedModel, new_positions: int) -> None:
    """Give a model's encoder and decoder `new_positions` positions, in place.

    Models with their own method (PEGASUS: the sinusoids are recomputed) use it. For learned positions (BART, mBART,
    PLBart, MVP, Blenderbot, BigBird-PEGASUS ...), which transformers refuses to resize, the existing vectors are kept
    and the added positions start as copies of them in order, position p from position p mod n, as Longformer and LED
    were initialised from shorter models. Shrinking cuts vectors off the end.

    Raises:
        ValueError: If the number is below 1, or the model has no position embeddings that can be resized.

    Source: the copying is that of Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 5.
    """
    if new_positions < 1:
        raise ValueError(f"A model needs at least 1 position, not {new_positions}.")
    old_positions = position_limit(model)
    name = type(model).__name__
    if old_positions is None:
        raise ValueError(f"{name} has no max_position_embeddings: its rows have no such limit and need no resizing.")
    if new_positions == old_positions:
        return
    try:
        model.resize_position_embeddings(new_positions)
        return
    except NotImplementedError:
        pass
    tables = {
        id(child): child  # a table that encoder and decoder share is resized once
        for parent in model.modules()
        for attribute, child in parent.named_children()
        if attribute == "embed_positions" and isinstance(child, nn.Embedding) and child.weight.requires_grad
    }.values()
    # BART keeps two unused rows in front (offset 2), Blenderbot none; anything else is a layout this cannot know.
    offsets = {(table.num_embeddings - old_positions, getattr(table, "offset", 0)) for table in tables}
    if not tables or not offsets <= {(0, 0), (2, 2)}:
        raise ValueError(
            f"{name} has {old_positions} positions that cannot be resized here. Use --max_source_length "
            f"{old_positions} or less, or a model with more positions."
        )
    for table in tables:
        offset = table.num_embeddings - old_positions
        rows = torch.arange(new_positions, device=table.weight.device) % old_positions + offset
        front = torch.arange(offset, device=table.weight.device)
        table.weight = nn.Parameter(table.weight.detach()[torch.cat([front, rows])].clone())
        table.num_embeddings = new_positions + offset
    model.config.max_position_embeddings = new_positions


def fit_positions(model: PreTrainedModel, longest_row: int, resize: bool | None) -> None:
    """Make sure the model has a position for every token of the longest row, source or target.

    ``resize=None`` adds positions with a warning, True adds them, False refuses by a ValueError that says what to do.
    """
    limit = position_limit(model)
    if limit is None or longest_row <= limit:
        return
    if resize is False:
        raise ValueError(
            f"Rows may have {longest_row} tokens (--max_source_length, --max_target_length, --val_max_target_length), "
            f"but the model has {limit} positions. Lower them to {limit}, or pass --resize_position_embeddings true."
        )
    if resize is None:
        logger.warning("Increasing the model's number of positions from %d to %d.", limit, longest_row)
    resize_positions(model, longest_row)
