"""Frozen lower layers in the tasks: the options, and what a run makes of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ..models.frozen_layers import FrozenLayers
from ..runtime.files import check_folder
from ..runtime.options import option
from ..training.frozen_states import FOLDER_NAME, FrozenStates

logger = logging.getLogger(__name__)

#: The value of --frozen_cache that keeps nothing.
NO_CACHE = "off"


@dataclass
class FreezingArguments:
    """Which lower layers are not trained, and where what they put out is kept."""

    freeze_layers: int | None = option(
        "dpsm_hf: leave the embeddings and so many of the lowest layers as they are and train the layers above alone. "
        "What the frozen ones put out is computed once for each row and kept on disk, so an epoch runs the others "
        "alone. The frozen ones run in evaluation mode, without dropout."
    )
    frozen_cache: str | None = option(
        f"dpsm_hf: folder for what --freeze_layers keeps (OUTPUT_DIR/{FOLDER_NAME}); runs with the same model, rows "
        f"and number of frozen layers share it. {NO_CACHE} keeps nothing and computes it anew in each epoch."
    )
    remove_frozen_cache: bool = option(
        "dpsm_hf: at the end of the run delete the files of --frozen_cache that it used.", False
    )

    def check_freezing(self, *, trains: bool, pretrained: bool) -> None:
        """Refuse options that contradict each other.

        Args:
            trains: The run trains.
            pretrained: Its model is a saved one.

        Raises:
            ValueError: With the option and the way out.
        """
        number = self.freeze_layers
        if number is None:
            for name, given in (
                ("frozen_cache", self.frozen_cache),
                ("remove_frozen_cache", self.remove_frozen_cache),
            ):
                if given:
                    raise ValueError(f"--{name} has no effect without --freeze_layers: pass it too, or leave it out.")
            return
        if number < 1:
            raise ValueError(f"--freeze_layers {number} must be at least 1; leave it out to train all layers.")
        if not trains:
            raise ValueError(f"--freeze_layers {number} concerns training and needs --do_train; leave it out.")
        if not pretrained:
            raise ValueError(
                f"--freeze_layers {number} keeps layers of a pretrained model: give --model_name_or_path, or leave it "
                "out to train a fresh model as a whole."
            )
        if self.frozen_cache == NO_CACHE:
            if self.remove_frozen_cache:
                raise ValueError(f"--remove_frozen_cache has nothing to delete with --frozen_cache {NO_CACHE}.")
        elif self.frozen_cache is not None:
            check_folder(self.frozen_cache, "--frozen_cache")

    def freeze(self, model: PreTrainedModel) -> FrozenLayers | None:
        """Freeze the lower layers of a model; None where none are to be.

        Args:
            model: Of the run, with its adapter; changed in place.

        Raises:
            ValueError: As `FrozenLayers`.
        """
        if self.freeze_layers is None:
            return None
        try:
            layers = FrozenLayers(model, self.freeze_layers)
        except ValueError as error:
            raise ValueError(f"--freeze_layers {self.freeze_layers}: {error}") from error
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            f"--freeze_layers {self.freeze_layers} trains {trained:,} of {total:,} parameters ({trained / total:.2%})."
        )
        if layers.has_dropout():
            logger.warning(
                "The frozen layers of this model have dropout, which is off in training too: what they put out is the "
                "same in each epoch."
            )
        return layers

    def frozen_states(self, layers: FrozenLayers, output_dir: str) -> FrozenStates:
        """Return what a trainer is given: the frozen layers, and where their outputs are kept.

        Args:
            layers: As `freeze` returns them.
            output_dir: Of the run.
        """
        if self.frozen_cache == NO_CACHE:
            return FrozenStates(layers, None)
        folder = Path(output_dir) / FOLDER_NAME if self.frozen_cache is None else Path(self.frozen_cache).expanduser()
        return FrozenStates(layers, folder)
