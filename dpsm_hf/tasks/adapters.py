"""Adapters of PEFT in the tasks: LoRA, DoRA and a 4-bit base by options, saved adapters found with their base again.

A run with ``--lora_r`` trains an adapter; ``output_dir`` and the checkpoints then hold that alone. `AdapterArguments`
are the options, `add_adapter` puts a fresh adapter on a model, `load_with_adapter` loads a saved one on its base, and
`save_merged` writes the two as one model. `base_as_on_hub` names the base so that others find it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from ..evaluation.temperature import FILE_NAME, TemperatureScaler
from ..models.frozen_layers import decoder_layers, modules_within
from ..models.pretrained import (
    BASE_NAME,
    SMOLLM2,
    SMOLLM2_ON_HUB,
    PretrainedModelError,
    is_smollm2,
    named_model,
    note_base,
    noted_base,
)
from ..runtime.options import option

logger = logging.get_logger(__name__)

#: Folder in ``output_dir`` that ``--merge_adapter`` writes.
MERGED_FOLDER = "merged"
_CONFIG = "adapter_config.json"
_ALL_LINEAR = "all-linear"
# TRL's defaults.
_ALPHA, _DROPOUT = 32, 0.05


@dataclass
class AdapterArguments:
    """Which adapter to train in place of the model's weights; the names are TRL's and PEFT's."""

    lora_r: int | None = option(
        "dpsm_hf: train a LoRA adapter of this rank and leave the model's weights as they are."
    )
    lora_alpha: int | None = option(f"dpsm_hf: the adapter's output is scaled by lora_alpha / lora_r ({_ALPHA}).")
    lora_dropout: float | None = option(f"dpsm_hf: dropout before the adapter, in [0, 1) ({_DROPOUT}).")
    lora_target_modules: list[str] | None = option(
        "dpsm_hf: names of the layers that get an adapter, or all-linear for all but the output layer; left out, "
        "PEFT's choice for the model's type."
    )
    lora_modules_to_save: list[str] | None = option(
        "dpsm_hf: names of layers that are trained whole beside the adapter and saved with it, for instance lm_head."
    )
    use_dora: bool = option(
        "dpsm_hf: DoRA, which trains the lengths of the weights' columns too; with --lora_r.", False
    )
    load_in_4bit: bool = option(
        "dpsm_hf: load the model in 4 bits (NF4, bitsandbytes) and train an adapter on it: QLoRA.", False
    )
    merge_adapter: bool = option(
        f"dpsm_hf: after training also write the model with its adapter merged in, to OUTPUT_DIR/{MERGED_FOLDER}.",
        False,
    )

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, str):  # one, from a YAML file
            self.lora_target_modules = [self.lora_target_modules]
        if isinstance(self.lora_modules_to_save, str):
            self.lora_modules_to_save = [self.lora_modules_to_save]
        if self.lora_r is None:
            given = [name for name, value in self._needing_rank().items() if value not in (None, False)]
            if given:
                raise ValueError(
                    f"--{given[0]} has no effect without --lora_r: pass it too, or leave --{given[0]} out."
                )
            return
        if self.lora_r < 1:
            raise ValueError(f"--lora_r {self.lora_r} must be at least 1; leave it out to train the whole model.")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"--lora_alpha {self.lora_alpha} must be at least 1.")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} must lie in [0, 1).")
        names = self.lora_target_modules or []
        if _ALL_LINEAR in names and len(names) > 1:
            raise ValueError(f"--lora_target_modules {' '.join(names)}: {_ALL_LINEAR} stands alone, or name layers.")

    def _needing_rank(self) -> Mapping[str, Any]:
        names = ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_dora")
        return {name: getattr(self, name) for name in names}

    def quantization(self) -> dict[str, Any]:
        """Return what ``from_pretrained`` takes for --load_in_4bit.

        Raises:
            ValueError: bitsandbytes is not installed.
        """
        if not self.load_in_4bit:
            return {}
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "--load_in_4bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes (or "
                "leave the option out, and the model is loaded as it was saved)."
            )
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        return {"quantization_config": config}


def add_adapter(
    model: PreTrainedModel, arguments: AdapterArguments, *, encoder_decoder: bool, without_lowest: int = 0
) -> PeftModel:
    """Put a fresh LoRA adapter on a model, whose own weights are then no longer trained.

    Args:
        model: changed in place.
        arguments: with ``lora_r``.
        encoder_decoder: the kind of the model.
        without_lowest: layers of a decoder, counted from the embeddings up, that get no adapter.

    Raises:
        ValueError: a layer that is named is not there, or the layers of the model's type are unknown to PEFT.
    """
    if arguments.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    names = arguments.lora_target_modules
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        r=arguments.lora_r or 1,
        lora_alpha=_ALPHA if arguments.lora_alpha is None else arguments.lora_alpha,
        lora_dropout=_DROPOUT if arguments.lora_dropout is None else arguments.lora_dropout,
        target_modules=_ALL_LINEAR if names == [_ALL_LINEAR] else names,
        modules_to_save=arguments.lora_modules_to_save,
        use_dora=arguments.use_dora,
        exclude_modules=modules_within(decoder_layers(model)[0], without_lowest) if without_lowest else None,
    )
    _check_names(model, "lora_target_modules", [] if names in (None, [_ALL_LINEAR]) else names or [])
    _check_names(model, "lora_modules_to_save", arguments.lora_modules_to_save or [])
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--lora_r {arguments.lora_r} on {type(model).__name__}: {error}") from error
    assert isinstance(adapted, PeftModel)
    trained, total = adapted.get_nb_trainable_parameters()
    logger.info(f"The adapter trains {trained:,} of {total:,} parameters ({trained / total:.2%}).")
    return adapted


def _check_names(model: torch.nn.Module, option_name: str, names: list[str]) -> None:
    """Refuse, by a ValueError, a name that no layer of the model ends with, which PEFT would pass over."""
    layers = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            there = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise ValueError(
                f"--{option_name} {name}: {type(model).__name__} has no layer of that name. Its linear layers are "
                f"called {', '.join(there) or 'otherwise'}; or write {_ALL_LINEAR}."
            )


def base_of(folder: str | os.PathLike[str], cache_dir: str | None = None) -> str | None:
    """Return where the base model of a saved adapter is; None for a folder that holds no adapter alone.

    An adapter that was trained on ``smollm2-135m`` names the repository on the hub, for others to load it. Where the
    file beside it says that it was trained on the very model that this package makes, that one is its base.

    Args:
        folder: of an adapter, of a model, or a name on the hub.
        cache_dir: as `named_model`, where the base is one that this package knows by name.

    Raises:
        ValueError: the adapter does not say, or its base is a folder that is gone.
        PretrainedModelError: as `named_model`, with what else may be done.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file() or (Path(folder) / "config.json").is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} does not say which model it adapts: set its base_model_name_or_path.")
    if Path(base).is_dir():
        return str(base)
    if base == SMOLLM2_ON_HUB and noted_base(folder):
        logger.info(f"{folder} was trained on {SMOLLM2}, which is loaded and not {base} of the hub.")
        try:
            return named_model(SMOLLM2, cache_dir)
        except PretrainedModelError as error:
            raise PretrainedModelError(
                f"{error}. {folder} was trained on that model; to load {base} from the hub in its place, delete "
                f"{Path(folder) / BASE_NAME}."
            ) from error
    # the cache of another machine
    known = named_model(SMOLLM2, cache_dir) if Path(base).name == SMOLLM2 else base
    if known == base and Path(base).is_absolute():
        raise ValueError(
            f"{folder} adapts the model in {base}, which is not there: put it back, or set base_model_name_or_path in "
            f"{path}."
        )
    return known


@contextmanager
def base_as_on_hub(model: Any, folder: Path, *, write: bool) -> Iterator[None]:
    """For the length of the block name the base as on the hub, where it is ``smollm2-135m``: on others nothing.

    The card and the configuration of an adapter are read elsewhere, where a folder of this machine says nothing. What
    is saved and described in the block names the hub's repository; what `folder` holds already is changed when the
    block ends, and says in `BASE_NAME` which model it was. The model in memory has its folder back afterwards, so that
    PEFT does not ask the hub at each checkpoint.

    Args:
        model: that was trained, unwrapped.
        folder: where it is saved.
        write: this process writes files.
    """
    local = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    adapter = folder / _CONFIG
    if not is_smollm2(local):
        if write:
            (folder / BASE_NAME).unlink(missing_ok=True)  # of an earlier run in the same folder
        yield
        return
    configs = [c for c in getattr(model, "peft_config", {}).values() if c.base_model_name_or_path == local]
    core = model.get_base_model() if configs else model  # whose name PEFT makes a tag of the card
    named = [(core, "name_or_path"), (core.config, "name_or_path")]
    named += [(config, "base_model_name_or_path") for config in configs]
    if write and adapter.is_file():
        note_base(folder)
    try:
        for owner, attribute in named:
            setattr(owner, attribute, SMOLLM2_ON_HUB)
        yield
    finally:
        for owner, attribute in named:
            setattr(owner, attribute, local)
    if write:
        for path in filter(Path.is_file, (adapter, folder / "README.md")):  # what PEFT has written before
            path.write_text(path.read_text("utf-8").replace(local, SMOLLM2_ON_HUB), encoding="utf-8")


def load_with_adapter(
    auto_model: Any, folder: str, base: str, *, trainable: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a saved adapter on its base model.

    Args:
        auto_model: transformers' class that loads the base.
        folder: of the adapter.
        base: where the model is, as `base_of` finds it.
        trainable: the adapter is to be trained further.
        options: of the base's ``from_pretrained``.

    Raises:
        ValueError: it is to be trained, and of a kind that PEFT trains only before it is saved.
    """
    config = PeftConfig.from_pretrained(folder)
    if trainable and config.is_prompt_learning:
        raise ValueError(
            f"{folder} is an adapter of kind {config.peft_type.value}, which PEFT does not train further once it is "
            "saved: leave --do_train out to evaluate it, or train a LoRA adapter on its base (--lora_r)."
        )
    adapted: Any = PeftModel.from_pretrained(
        auto_model.from_pretrained(base, **options), folder, is_trainable=trainable
    )
    for config in adapted.peft_config.values():  # PEFT looks there at each save, also for a base that the hub has
        config.base_model_name_or_path = base
    return adapted  # type: ignore[no-any-return]


def tokenizer_source(source: str, base: str | None) -> str:
    """Return where the tokenizer of a model is: beside an adapter where it was saved there, else with its base.

    Args:
        source: of the model or adapter.
        base: of the adapter, None for a model.
    """
    saved = any((Path(source) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    return source if base is None or saved else base


def merged(adapted: Any, folder: str, remedy: str) -> PreTrainedModel:
    """Return the plain model that an adapter and its base make together; the adapted one is changed.

    Args:
        adapted: as `load_with_adapter` returns it.
        folder: of the adapter, for the error.
        remedy: what to do where it cannot be merged, for the error.

    Raises:
        ValueError: the adapter is no change of weights; that of prompt tuning is tokens before the text.
    """
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise ValueError(f"{folder} is an adapter of kind {kind}, which cannot be merged into weights: {remedy}.")
    whole: PreTrainedModel = adapted.merge_and_unload()
    return whole


def save_merged(auto_model: Any, folder: Path, base: str, **options: Any) -> Path:
    """Write the model that a saved adapter and its base make together, with tokenizer and temperature, beside it.

    Args:
        auto_model: transformers' class that loads the base.
        folder: of the adapter; the result is in its folder ``merged``, in the place of an earlier one.
        base: as `base_of` finds it.
        options: of the base's ``from_pretrained``.

    Returns:
        The folder that was written.
    """
    target = folder / MERGED_FOLDER
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    adapted = load_with_adapter(auto_model, str(folder), base, **options)
    merged(adapted, str(folder), "leave --merge_adapter out").save_pretrained(draft)
    AutoTokenizer.from_pretrained(folder).save_pretrained(draft)
    if (folder / FILE_NAME).is_file():
        TemperatureScaler.load(folder).save(draft)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    logger.info(f"The model with its adapter merged in is in {target}.")
    return target
