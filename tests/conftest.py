"""Shared by all tests: an offline, single-threaded, quiet environment, and real tokenizers and data where present."""

from __future__ import annotations

import os

# Before anything imports torch, datasets or transformers: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "disabled")

import gc
import gzip
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets  # noqa: F401  (it and transformers set their loggers up when imported)
import pytest
import torch
import transformers

from dpsm_hf.rules import schedules
from tests import warm

gc.disable()  # until all is imported: that stays, and looking through it again and again takes a second
torch.set_num_threads(1)
transformers.utils.logging.get_verbosity()  # sets its logger up, once and before any test


def data_root() -> Path:
    """The folder with real data sets and tokenizers: $DPSM_DATA, or shared/data beside the checkout."""
    named = os.environ.get("DPSM_DATA")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """Undo what a script that ran in this process did to log levels, so that no file depends on those before it."""
    names = ("dpsm_hf", "transformers", "datasets")
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagates, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagates
        logger.handlers[:] = handlers


@pytest.fixture(scope="module")
def warm_processes() -> Iterator[None]:
    """Start the Python programs of this file quickly, by a fork of a process that has imported torch; see `warm`."""
    with warm.replace_popen():
        yield


@pytest.fixture
def schedule_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the schedules that a test registers when it ends."""
    monkeypatch.setattr(schedules, "_SCHEDULES", dict(schedules._SCHEDULES))


@pytest.fixture(scope="session")
def real_data() -> Callable[..., Path]:
    """A function from path parts under the data folder to a path; skips, with the reason, where it is absent."""

    def find(*parts: str) -> Path:
        path = data_root().joinpath(*parts)
        if not path.exists():
            pytest.skip(f"{'/'.join(parts)} is not in the data folder (set DPSM_DATA to a folder that has it)")
        return path

    return find


@pytest.fixture(scope="session")
def real_tokenizer(real_data: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function from gpt2, bart or pegasus to a folder for `AutoTokenizer.from_pretrained`; skips if absent."""

    def find(name: str) -> str:
        source = real_data("tokenizers", name)
        packed = source / "tokenizer.json.gz"
        if not packed.exists():
            return str(source)
        folder = tmp_path_factory.getbasetemp() / f"tokenizer-{name}"
        if not folder.exists():
            folder.mkdir()
            with gzip.open(packed, "rb") as archive, open(folder / "tokenizer.json", "wb") as file:
                shutil.copyfileobj(archive, file)
            (folder / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PegasusTokenizer", "model_max_length": 1024}', encoding="utf-8"
            )
        return str(folder)

    return find


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M in the cache of this machine; skips, with the reason, where it cannot be made."""
    from dpsm_hf.models.pretrained import PretrainedModelError, smollm2_135m

    try:
        return smollm2_135m()
    except PretrainedModelError as error:
        pytest.skip(str(error))


def pytest_collection_finish() -> None:
    """Collect garbage again, but not among what is imported by now: looking through that takes 0.3 s each time."""
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
