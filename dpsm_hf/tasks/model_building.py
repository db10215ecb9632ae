"""What a model is built with: its configuration, saved or made for training from nothing, and a saved tokenizer."""

from __future__ import annotations

import ast
import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..models.pretrained import named_model
from .adapters import base_of
from .arguments import ModelSource

logger = logging.getLogger(__name__)


def hub_options(model_args: ModelSource) -> dict[str, Any]:
    """Return the options that every ``from_pretrained`` takes."""
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def source_of(model_args: ModelSource, name: str | None) -> str | None:
    """Return where a model, tokenizer or configuration is loaded from: a folder or a name on the hub.

    Args:
        model_args: Of the run; ``cache_dir`` is where a model that the package knows by name is kept.
        name: As the arguments give it; None where it is left out.

    Raises:
        PretrainedModelError: As `named_model`.
    """
    return None if name is None else named_model(name, model_args.cache_dir)


@contextlib.contextmanager
def explained_where_unreachable(model_args: ModelSource) -> Iterator[None]:
    """Say what to give instead where what is loaded in this context cannot be had from the hub.

    Args:
        model_args: Of the run.

    Raises:
        OSError: With the names that are no folders, and the remedies.
    """
    try:
        yield
    except OSError as error:
        given = {name: getattr(model_args, name) for name in ("model_name_or_path", "tokenizer_name", "config_name")}
        named = [f"--{name} {source}" for name, source in given.items() if source and not Path(source).exists()]
        if not named or not re.search("couldn't connect|is not a local folder", str(error)):
            raise
        raise OSError(
            f"{' and '.join(named)}: no folder here, and not to be had from the Hugging Face hub (no connection, or "
            "nothing of that name). Give a folder; or --model_name_or_path smollm2-135m, a pretrained model that "
            "needs no hub; or train from scratch with --model_type and --tokenizer_name train-bpe."
        ) from error


def load_config(model_args: ModelSource) -> PreTrainedConfig | None:
    """Load the configuration of --config_name or --model_name_or_path; None where neither is given."""
    source = source_of(model_args, model_args.config_name or model_args.model_name_or_path)
    if source is None:
        return None
    source = base_of(source, model_args.cache_dir) or source
    config: PreTrainedConfig = AutoConfig.from_pretrained(source, **hub_options(model_args))
    return config


def load_saved_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved in a folder, beside a model or alone, or that a model on the hub has.

    Args:
        source: The folder, or a name on the hub.
        trust_remote_code: Allow one that brings code of its own.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    return tokenizer


def build_config_from_scratch(
    model_type: str | None,
    overrides: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    block_size: int | None = None,
) -> PreTrainedConfig:
    """Make a configuration for a model that is trained from nothing, consistent with its tokenizer.

    The overrides go to the constructor, so that values derived there (Llama's key-value heads from its
    heads, say) follow them. Vocabulary size and special token ids come from the tokenizer unless
    overridden; the number of positions is raised to ``block_size`` unless overridden.

    Args:
        model_type: A key of ``transformers.CONFIG_MAPPING`` such as ``gpt2`` or ``bart``.
        overrides: As `parse_config_overrides` takes them.
        tokenizer: The tokenizer of the run, or None to keep the configuration's own vocabulary.
        block_size: Tokens of a training row, or None when rows are bounded elsewhere.

    Raises:
        ValueError: No or unknown model type, an unknown or malformed override, a vocabulary smaller than
            the tokenizer's, or fewer positions than ``block_size``.
    """
    if model_type is None:
        raise ValueError(
            "Give --model_name_or_path to fine-tune a model, --config_name, or --model_type (for instance gpt2) "
            "to train from scratch."
        )
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"--model_type {model_type!r} is not a model type of transformers.{hint}")
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    given = parse_config_overrides(overrides, default)
    names = {_real_name(default, name) for name in given}
    values: dict[str, Any] = dict(given)
    if tokenizer is not None:
        names_of_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        wanted = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names_of_ids}}
        if default.is_encoder_decoder:
            # BART starts decoding with </s>, T5 and PEGASUS with <pad>: keep the family's choice, renumbered.
            starts_with_eos = getattr(default, "decoder_start_token_id", None) == default.eos_token_id
            wanted["decoder_start_token_id"] = wanted["eos_token_id" if starts_with_eos else "pad_token_id"]
            if getattr(default, "forced_eos_token_id", None) is not None:
                wanted["forced_eos_token_id"] = tokenizer.eos_token_id
        values.update({name: value for name, value in wanted.items() if _real_name(default, name) not in names})
    if block_size is not None and hasattr(default, "max_position_embeddings"):
        real = _real_name(default, "max_position_embeddings")
        if real not in names and 0 < default.max_position_embeddings < block_size:
            values[real] = block_size
    config = config_class(**values)
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise ValueError(
            f"--config_overrides vocab_size={config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} "
            "tokens. Leave vocab_size out to take the tokenizer's size."
        )
    check_block_size(config, block_size)
    return config


def check_block_size(config: PreTrainedConfig, block_size: int | None) -> None:
    """Refuse, by a ValueError, rows longer than the model has learned positions for; warn where those are rotary."""
    positions = getattr(config, "max_position_embeddings", None)
    if block_size is None or not isinstance(positions, int) or not 0 < positions < block_size:
        return
    if hasattr(config, "rope_parameters"):
        logger.warning(
            "block_size %s exceeds the %s positions of the model's rotary embedding.", block_size, positions
        )
    else:
        name = _real_name(config, "max_position_embeddings")
        raise ValueError(
            f"--block_size {block_size} is longer than the model's {positions} positions ({name}). Use a block_size "
            f"of at most {positions}, or when training from scratch --config_overrides {name}={block_size}."
        )


def parse_config_overrides(overrides: str | None, default: PreTrainedConfig) -> dict[str, Any]:
    """Read ``name=value,name=value`` with the types that a configuration with default values has.

    Raises:
        ValueError: A piece without ``=``, a name that the configuration has not, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for piece in filter(None, (part.strip() for part in (overrides or "").split(","))):
        name, separator, text = (part.strip() for part in piece.partition("="))
        if not separator or not name or not text:
            raise ValueError(f"--config_overrides: {piece!r} should be name=value, with commas between the pairs.")
        if not hasattr(default, name):
            close = difflib.get_close_matches(name, [*default.to_dict(), *default.attribute_map], n=3)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"--config_overrides: a {default.model_type} configuration has no {name!r}.{hint}")
        values[name] = _typed(text, getattr(default, name), name)
    return values


def _typed(text: str, example: Any, name: str) -> Any:
    try:
        if isinstance(example, bool):
            words = {"true": True, "1": True, "yes": True, "y": True}
            words |= {"false": False, "0": False, "no": False, "n": False}
            return words[text.lower()]
        if isinstance(example, int):
            return int(text)
        if isinstance(example, float):
            return float(text)
    except (KeyError, ValueError) as error:
        kind = "true or false" if isinstance(example, bool) else f"of type {type(example).__name__}"
        raise ValueError(f"--config_overrides: {name}={text!r} should be {kind}.") from error
    if isinstance(example, str):
        return text
    words_or_none: dict[str, bool | None] = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words_or_none:
        return words_or_none[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _real_name(config: PreTrainedConfig, name: str) -> str:
    return config.attribute_map.get(name, name)
