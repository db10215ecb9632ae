"""Save a temperature-scaled copy of a model: in one step, never over another model, never scaled twice."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..evaluation.temperature import FILE_NAME, TemperatureScaler
from ..runtime.files import write_json

logger = logging.get_logger(__name__)

#: Where a temperature may be applied.
PLACES = ("generation_config", "weights")

#: Says what was done to the model beside it. Not `FILE_NAME`, by which the logits of folded weights would be divided
#: a second time.
RECORD_NAME = "applied_temperature.json"


def check_target(folder: Path, source: str | Path) -> None:
    """Check, before the long part, that the scaled copy of the model ``source`` may be written to a folder.

    Raises:
        ValueError: if that would overwrite the model itself, or anything else that `save_scaled` has not written.
    """
    if Path(source).resolve() in (own.resolve() for own in _own_folders(folder)):
        raise ValueError(f"{source} is what an interrupted call has left and is about to be deleted: move it away.")
    if not folder.exists():
        return
    if folder.resolve() == Path(source).resolve():
        raise ValueError(
            f"{folder} is the model that the temperature is fitted for, and would be overwritten: give another folder."
        )
    if not (folder / RECORD_NAME).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and holds something else: give another folder, or move it away.")


def _own_folders(folder: Path) -> tuple[Path, Path]:
    """Return where a model is written before it takes its place, and where the one before it waits meanwhile."""
    return folder.with_name(f".{folder.name}.dpsm-part"), folder.with_name(f".{folder.name}.dpsm-old")


def save_scaled(
    model: Any, tokenizer: Any, scaler: TemperatureScaler, folder: Path, *, place: str, source: str | Path
) -> None:
    """Apply a temperature to a model, in memory, and save that in the place of what an earlier call has saved there.

    When the temperature is folded into the weights, a sampling temperature that an earlier call had set becomes 1
    again; one that the user had set stays, with a warning.

    Args:
        model, tokenizer: what to save; the model is changed in place.
        scaler: the temperature.
        folder: where to; see `check_target`.
        place: of `PLACES`.
        source: where the model was loaded from.

    Raises:
        ValueError: as `TemperatureScaler.fold_into` and `TemperatureScaler.apply_to_generation_config`.
    """
    if place == "weights":
        scaler.fold_into(model)
        _settle_sampling(model, Path(source))
    else:
        scaler.apply_to_generation_config(model)
    part, old = _own_folders(folder)
    for left_over in (part, old):
        shutil.rmtree(left_over, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if place == "generation_config":
        scaler.save(part)
    record = {"schema": 1, "place": place, "temperature": scaler.temperature, "source": str(source)}
    write_json(record, part / RECORD_NAME)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _settle_sampling(model: Any, source: Path) -> None:
    """See to it that a model with folded weights does not sample at the same temperature once more."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "temperature", None)
    if config is None or own in (None, 1.0):
        return
    earlier = TemperatureScaler.load(source) if (source / FILE_NAME).is_file() else None
    if earlier is not None and math.isclose(own, earlier.temperature):
        config.temperature = 1.0
    else:
        logger.warning(
            f"the generation config of this model samples at temperature {own:g}, which divides the scaled logits "
            "once more. Set it to 1 to sample from the calibrated probabilities."
        )
