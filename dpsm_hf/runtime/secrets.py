"""What looks like a credential, by its name or by itself, and how it is kept out of what is written and said."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: What stands in the place of a credential.
HIDDEN = "***"
#: What to do in place of writing one down.
REMEDY = (
    "leave it out and give it in the environment, or log in once: HF_TOKEN or `hf auth login` for the hub, "
    "WANDB_API_KEY or `wandb login` for Weights & Biases"
)

# Words of a name, the last of which says what it holds.
_ALWAYS = frozenset(
    {
        "password",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "apikey",
        "authtoken",
    }
    | {"authorization", "bearer", "cookie"}
)
# ``key`` and ``auth`` mean many things; these are what makes a credential of a key.
_KEYS = frozenset(
    {"api", "access", "secret", "private", "auth", "account", "master", "service", "signing", "encryption", "license"}
    | {"ssh", "hub", "hf", "huggingface", "wandb", "comet", "neptune", "openai", "anthropic", "aws", "azure", "gcp"}
)
# Tokens of a text, and of a count of them; any other token lets somebody in.
_TEXT_TOKENS = frozenset(
    {"pad", "padding", "eos", "bos", "unk", "sep", "cls", "mask", "image", "video", "audio", "speech", "text", "start"}
    | {"begin", "end", "eot", "sot", "boi", "eoi", "stop", "special", "added", "extra", "prompt", "decoder", "forced"}
    | {"next", "last", "first", "new", "per", "max", "min", "num", "suppress", "ignore", "separator", "newline", "bad"}
    | {"placeholder", "virtual", "latent", "soft", "think", "tool", "label", "target", "source", "lang", "language"}
    | {"vocab", "word", "sub", "by", "of", "each", "every", "one", "class", "role", "summary", "fake", "blank", "fill"}
)
# How those of well-known services look.
_VALUE = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"hf_[A-Za-z0-9]{16,}"  # the hub
    r"|api_org_[A-Za-z0-9]{16,}"
    r"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|sk-[A-Za-z0-9_-]{20,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
    r")"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# user:password@ of an address
_USER = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
# A shorter value, ``training`` say, would take ordinary words for a credential.
_SHORTEST = 12


def is_secret_name(name: str) -> bool:
    """Return whether what goes by a name is a credential: ``token``, ``hub_token``, ``apiKey``, ``DB_PASSWORD``.

    ``tokenizer_name``, ``pad_token``, ``max_tokens`` and ``sort_key`` are none.

    Args:
        name: of an argument, a key or an environment variable.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    *before, last = words
    if name == "PWD":  # the shell's working directory, which is part of every absolute path below it
        return False
    if last in _ALWAYS:
        return True
    if last in ("token", "pat"):
        return not before or (last == "token" and before[-1] not in _TEXT_TOKENS)
    if last in ("key", "auth"):
        return not before or before[-1] in _KEYS or before[-1] in _ALWAYS
    # AWS_ACCESS_KEY_ID
    return last == "id" and before[-1:] == ["key"] and is_secret_name("_".join(before))


def is_secret_value(text: str) -> bool:
    """Return whether a text holds a credential, whatever its name is: one that looks like it, or of the environment.

    ``${HF_TOKEN}`` counts too, as what it stands for would be written down.

    Args:
        text: the text.
    """
    if any(is_secret_name(variable) for variable in _VARIABLE.findall(text)):
        return True
    return hidden(os.path.expandvars(text)) != os.path.expandvars(text)


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a value with every credential in it replaced by ``***``.

    Args:
        value: of any depth, as JSON has it.
        name: of it.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if is_secret_name(name) else hidden(value)


def hidden(text: str) -> str:
    """Return a text without what looks like a credential, and without those that the environment holds.

    Args:
        text: the text.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    return _USER.sub(HIDDEN, _VALUE.sub(HIDDEN, text))


class HideSecrets(logging.Filter):
    """Keep credentials out of log lines; for a handler.

    Args:
        values: known ones, of the arguments for instance; None among them are left out.
    """

    def __init__(self, values: Iterable[str | None] = ()) -> None:
        super().__init__()
        self._values = tuple(value for value in values if value)

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record's message where there is something to hide."""
        message = record.getMessage()
        shown = hidden(message)
        for value in self._values:
            shown = shown.replace(value, HIDDEN)
        if shown != message:
            record.msg, record.args = shown, None
        return True


def hide_in_logs(values: Iterable[str | None] = ()) -> None:
    """Keep credentials out of all that is logged from now on.

    Args:
        values: known ones, of the arguments for instance.
    """
    known = tuple(values)
    for name in ("", "transformers", "datasets", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            for earlier in [found for found in handler.filters if isinstance(found, HideSecrets)]:
                handler.removeFilter(earlier)
            handler.addFilter(HideSecrets(known))
