"""`DPSMSFTTrainer`: TRL's `SFTTrainer`, training with scheduled proper scoring rules."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import SFTTrainer

from ..models.language_model import core_model
from ..training.scorer import ScoredBatch
from ..training.trainer import DPSMMixin
from .arguments import TRLS_DEFAULT, DPSMSFTConfig, check_arguments
from .batch_means import BatchMeans
from .even_batches import filled_up


class DPSMSFTTrainer(DPSMMixin, SFTTrainer):  # type: ignore[misc]  # TRL has an attribute where Trainer has a property
    """An `SFTTrainer` that trains with Dynamic Proper-Score Mixing; takes the arguments of `SFTTrainer`.

    Example::

        trainer = DPSMSFTTrainer(
            model, args=DPSMSFTConfig(output_dir="out", alpha_end=0.5), train_dataset=chats, processing_class=tokenizer
        )
        trainer.train()

    Args:
        model: a causal language model, a path or the name of one, or a PEFT model.
        args: `DPSMSFTConfig`; with SFTConfig or TrainingArguments the scoring rule is the default.
        *further, **keywords: as `SFTTrainer` and `DPSMMixin` take them. ``calibration_dataset`` is tokenized like the
            others.

    Raises:
        TypeError: for the DPSM configuration of another trainer.
        ValueError: for a loss of TRL's, for images, and as `SFTTrainer` does.
    """

    config_name = "DPSMSFTConfig"
    entropy_in_training = True
    _tag_names = [*SFTTrainer._tag_names, "dpsm"]

    def __init__(self, model: Any, args: Any = None, *further: Any, **keywords: Any) -> None:
        check_arguments(args)
        _refuse_images(keywords.get("processing_class"))  # before every text is tokenized
        if isinstance(args, DPSMSFTConfig):
            args.loss_type = TRLS_DEFAULT  # its own word for "left to the rule" is one that SFTTrainer refuses
        self._batch_means = BatchMeans()
        super().__init__(model, args, *further, **keywords)
        _refuse_images(self.processing_class)  # SFTTrainer may have loaded it itself
        core: Any = core_model(self.model)
        if hasattr(core, "router_aux_loss_coef"):
            # TRL writes it to the config alone, but it is the model here that adds the term
            core.router_aux_loss_coef = self.router_aux_loss_coef

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device as `Trainer` does; as in TRL nothing is cached for generation."""
        return {**super()._prepare_inputs(inputs), "use_cache": False}

    def batch_scored(self, scored: ScoredBatch, inputs: dict[str, Any]) -> None:
        """Add a batch to what TRL logs."""
        mode = "train" if self.model.training else "eval"
        aux_loss = getattr(scored.outputs, "aux_loss", None) if self.aux_loss_enabled else None
        self._batch_means.add(mode, scored.scores, inputs, aux_loss)

    # ---- data ------------------------------------------------------------------------------------------------------

    def prepared_for_evaluation(self, dataset: Any) -> Any:
        """Tokenize a set as `SFTTrainer.evaluate` does; one that is tokenized already stays as it is."""
        if self._skip_prepare_dataset or not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        args: Any = self.args
        tokenizer: Any = self.processing_class
        packing = args.packing if args.eval_packing is None else args.eval_packing
        return self._prepare_dataset(dataset, tokenizer, args, packing, self._formatting_func, "calibration")

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """Return the loader of a set as `SFTTrainer` does; on several processes no row of a flat batch comes twice."""
        processes = self.accelerator.num_processes
        trains = args[1] if len(args) > 1 else kwargs.get("is_training", False)
        flat = self.padding_free and processes > 1 and not trains and not self.accelerator.split_batches
        if flat and isinstance(dataset, Dataset) and "labels" in dataset.column_names:
            dataset = filled_up(dataset, batch_size, processes)
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    # ---- what TRL logs ---------------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `DPSMTrainer` does; an attempt before that ran out of memory is forgotten."""
        self._batch_means.forget("train")
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of one optimizer step; tokens are counted on from where a checkpoint left off."""
        self._batch_means.start(self.state)
        return super().get_batch_samples(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._batch_means.save(self.state, self.args.device)
        super()._save_checkpoint(model, trial)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as `DPSMTrainer` does; TRL's figures of an earlier evaluation that nobody logged are forgotten."""
        self._batch_means.forget("eval")
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `DPSMTrainer` does, and TRL's figures under TRL's names, in TRL's meaning.

        Of an evaluation that is ``eval_entropy`` too: TRL's mean over batches, where the evaluation's files have the
        mean over tokens.
        """
        mode = "train" if self.model.training else "eval"
        for name, value in self._batch_means.entry(mode, self.args.device).items():
            self._metrics[mode][name] = [value]
        super().log(logs, start_time)


def _refuse_images(processing_class: Any) -> None:
    """Stop where a model of images and text would be trained, whose batches were never tried.

    Raises:
        ValueError: naming the way to train on text alone.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}, of a model of more than text, which "
            "DPSMSFTTrainer does not train. For text alone pass its tokenizer, processing_class=processor.tokenizer; "
            "for images use trl.SFTTrainer."
        )
