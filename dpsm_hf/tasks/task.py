"""What all tasks have in common: a run from its arguments through data, model and training to its outcome."""

from __future__ import annotations

import argparse
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import DataCollator, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..data.loading import AnyDataset, load_text_datasets
from ..data.subsets import drawn_rows
from ..data.tokenizer import TRAIN_BPE, resolve_tokenizer
from ..models.frozen_layers import FrozenLayers
from ..models.language_model import core_model
from ..models.pretrained import SMOLLM2_ON_HUB, is_smollm2, named_model
from ..runtime.child_process import end_with_runner
from ..runtime.content import content_hash
from ..runtime.secrets import hide_in_logs
from ..training.frozen_states import FrozenStates
from ..training.run_facts import RunFacts
from .adapters import add_adapter, base_as_on_hub, base_of, load_with_adapter, save_merged, tokenizer_source
from .arguments import OutcomeArguments, settle_best_checkpoint
from .checkpoints import best_weights, check_output_dir, detect_checkpoint, note_start, train_and_save
from .command_line import parse_script_arguments, setup_logging
from .freezing import FreezingArguments
from .model_building import (
    build_config_from_scratch,
    explained_where_unreachable,
    hub_options,
    load_config,
    source_of,
)
from .outcome import Outcome, discard_outcome
from .stopping import early_stopping, stopping

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


class Task(ABC):
    """One run of a task; a subclass says what its data, its model and its figures are.

    Args:
        model_args: of the class `model_class`.
        data_args: of the class `data_class`.
        outcome_args: what the run leaves behind.
        training_args: of the class `training_class`.
    """

    #: The dataclasses of the arguments; `OutcomeArguments` is in all tasks. The model's derives from `ModelSource` and
    #: `AdapterArguments`.
    model_class: ClassVar[type]
    data_class: ClassVar[type]
    training_class: ClassVar[type]
    #: Transformers' class that loads and makes the model, and the trainer of dpsm_hf that trains it.
    auto_model: ClassVar[Any]
    trainer_class: ClassVar[Any]
    #: Whether the model is an encoder-decoder, whose rows are pairs of a source and a target.
    encoder_decoder: ClassVar[bool]
    #: The task's name on the hub, for the model card.
    hub_task: ClassVar[str]
    #: First part of the names of the test split's metrics.
    test_prefix: ClassVar[str] = "test"
    #: Options of ``dpsm calibrate`` that have no effect on such a model, and what to do about one.
    without_effect: ClassVar[Mapping[str, str]]

    def __init__(self, model_args: Any, data_args: Any, outcome_args: OutcomeArguments, training_args: Any) -> None:
        self.model_args = model_args
        self.data_args = data_args
        self.outcome_args = outcome_args
        self.training_args = training_args
        #: The texts of each split and further set, once loaded.
        self.texts: dict[str, Any] = {}
        #: The layers of the loaded model that are not trained; None where all are.
        self.frozen_layers: FrozenLayers | None = None

    # ---- arguments -------------------------------------------------------------------------------------------------

    @classmethod
    def argument_classes(cls) -> tuple[type, ...]:
        """Return the dataclasses of the arguments in the order of the constructor."""
        return cls.model_class, cls.data_class, OutcomeArguments, cls.training_class

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None, prog: str | None = None) -> Self:
        """Read the arguments of a run.

        Args:
            argv: The words of a command line, or one JSON or YAML file; ``sys.argv[1:]`` when None.
            prog: The program's name in --help; that of ``sys.argv[0]`` when None.

        Raises:
            ValueError, FileNotFoundError: As `parse_script_arguments`.
        """
        return cls(*parse_script_arguments(cls.argument_classes(), argv, prog))

    def check(self) -> None:
        """Refuse arguments that contradict each other, before anything is loaded.

        Raises:
            ValueError: With the options and the way out.
        """
        settle_best_checkpoint(self.outcome_args, self.training_args)
        model = self.model_args
        self.data_args.check_draw()
        if self.data_args.draw_train_samples and model.tokenizer_name == TRAIN_BPE:
            raise ValueError(
                f"--draw_train_samples would give each seed another tokenizer with --tokenizer_name {TRAIN_BPE}: name "
                "a saved tokenizer, or leave it out."
            )
        if model.lora_r is not None and model.model_name_or_path is None:
            raise ValueError(
                f"--lora_r {model.lora_r} adapts a pretrained model: give --model_name_or_path, or leave it out to "
                "train a fresh model as a whole."
            )
        if model.merge_adapter and not self.training_args.do_train:
            raise ValueError("--merge_adapter writes what was trained and needs --do_train.")

    @staticmethod
    @abstractmethod
    def row_tokens(arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return the most tokens that a row has, of the source (0 where there is none) and of the target.

        Args:
            arguments: As a campaign gives them to a run, defaults left out.
        """

    # ---- data ------------------------------------------------------------------------------------------------------

    def wanted_splits(self) -> dict[str, int | None]:
        """Return the splits that the run needs, with the most rows that it takes of each."""
        training, data = self.training_args, self.data_args
        candidates = (
            ("train", training.do_train, data.max_train_samples),
            ("validation", training.do_eval, data.max_eval_samples),
            ("test", training.do_predict, data.max_predict_samples),
            ("calibration", training.fit_temperature, data.max_calibration_samples),
        )
        return {split: most for split, wanted, most in candidates if wanted}

    def data_facts(self) -> dict[str, str]:
        """Return what the run trains on, for its checkpoints: names, and of files what they hold."""
        data = self.data_args
        facts = {name: getattr(data, name) for name in ("dataset_name", "dataset_config_name", "train_file")}
        for name, value in facts.items():
            if value is not None and Path(value).exists():
                facts[name] = f"{Path(value).name} ({content_hash(Path(value))[:23]})"
        return {name: value for name, value in facts.items() if value is not None}

    def model_facts(self) -> dict[str, Any]:
        """Return what decides which part of the model is trained, for the run's checkpoints."""
        arguments = self.model_args
        return {"freeze_layers": arguments.freeze_layers} if isinstance(arguments, FreezingArguments) else {}

    def cut(self, rows: Any, split: str, most: int | None) -> Any:
        """Return the rows of a split that the run takes: all, the first, or of training those that are drawn.

        Args:
            rows: Of the split.
            split: Its name.
            most: As `wanted_splits` says.
        """
        if most is None:
            return rows
        if split == "train" and self.data_args.draw_train_samples:
            seed = self.training_args.data_seed
            return drawn_rows(rows, most, self.training_args.seed if seed is None else seed)
        return rows.take(most if not hasattr(rows, "__len__") else min(most, len(rows)))

    @property
    def most_extra_rows(self) -> int | None:
        """Return the most rows of a set of --extra_eval_datasets."""
        most: int | None = self.data_args.max_predict_samples or self.data_args.max_eval_samples
        return most

    @abstractmethod
    def load_data(self) -> None:
        """Fill `texts` with the splits that the run needs and with its --extra_eval_datasets."""

    def load_splits(self, splits: Sequence[str], **options: Any) -> Mapping[str, AnyDataset]:
        """Load splits from where the arguments say they are.

        Args:
            splits: That the run needs.
            options: Further ones of `load_text_datasets`.
        """
        data, model = self.data_args, self.model_args
        return load_text_datasets(
            data.dataset_name,
            data.dataset_config_name,
            train_file=data.train_file,
            validation_file=data.validation_file,
            test_file=data.test_file,
            calibration_file=data.calibration_file,
            required_splits=data.splits_to_load(splits),
            calibration_split_percentage=data.calibration_split_percentage,
            cache_dir=model.cache_dir,
            token=model.token,
            trust_remote_code=model.trust_remote_code,
            **options,
        )

    @abstractmethod
    def training_texts(self) -> Iterable[str]:
        """Return the texts of the train split, which a tokenizer may be trained on."""

    @abstractmethod
    def prepare_rows(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> tuple[dict[str, Any], DataCollator]:
        """Turn the loaded texts into rows of token ids.

        Args:
            tokenizer: Of the run.
            model: Of the run.

        Returns:
            The rows by split and further set, and what makes a batch of them.
        """

    @classmethod
    @abstractmethod
    def calibration_rows(
        cls, options: argparse.Namespace, texts: Mapping[str, Any], tokenizer: Any, model: Any
    ) -> tuple[dict[str, Any], DataCollator]:
        """Turn texts into rows for ``dpsm calibrate``.

        Args:
            options: Of that command.
            texts: By split.
            tokenizer: Of the model.
            model: The saved model.

        Returns:
            The rows by split, and their collator.

        Raises:
            ValueError: for an option that has no effect on such a model, or too long a row.
        """

    # ---- tokenizer and model ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tokenizer_length(self) -> int:
        """Return the longest text in tokens that a tokenizer trained for the run is to take."""

    @property
    def block_size(self) -> int | None:
        """Return the tokens of a row where the arguments fix them, which a fresh model must have positions for."""
        return None

    @abstractmethod
    def longest_row(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
        """Return the most tokens of a row, source and target together.

        Args:
            tokenizer: Of the run.
            config: Of its model.
        """

    def load_tokenizer(
        self, training_texts: Callable[[], Iterable[str]], *, resuming: bool = False
    ) -> PreTrainedTokenizerBase:
        """Load the run's tokenizer, or train it.

        Args:
            training_texts: Gives the texts that --tokenizer_name train-bpe trains one on.
            resuming: The run continues a checkpoint, whose tokenizer must not change.
        """
        name = source_of(self.model_args, self.model_args.tokenizer_name or self.model_args.model_name_or_path) or ""
        return resolve_tokenizer(
            tokenizer_source(name, base_of(name, self.model_args.cache_dir)),
            output_dir=self.training_args.output_dir or ".",
            training_texts=training_texts,
            vocab_size=self.model_args.tokenizer_vocab_size,
            sequence_template=self.encoder_decoder,
            model_max_length=self.tokenizer_length,
            resuming=resuming,
            main_process_first=self.training_args.main_process_first,
            **hub_options(self.model_args),
            use_fast=self.model_args.use_fast_tokenizer,
        )

    def scratch_config(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
        """Make the configuration of a model that is trained from nothing.

        Args:
            tokenizer: Of the run, or None to keep the configuration's own vocabulary.

        Raises:
            ValueError: As `build_config_from_scratch`.
        """
        return build_config_from_scratch(
            self.model_args.model_type, self.model_args.config_overrides, tokenizer, block_size=self.block_size
        )

    def make_config(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """Load the configuration of the run's model, or make one.

        Args:
            tokenizer: Of the run.
        """
        return load_config(self.model_args) or self.scratch_config(tokenizer)

    def load_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the model or make a fresh one, fit it to the tokenizer, put an adapter on it and freeze lower layers.

        Args:
            tokenizer: Of the run.

        Raises:
            ValueError: As `add_adapter` and `FreezingArguments.freeze`; or an adapter is to be trained on weights that
                are not those of its base.
        """
        model = self._load_model(tokenizer)
        if isinstance(self.model_args, FreezingArguments):
            self.frozen_layers = self.model_args.freeze(model)
        return model

    def _load_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        config = self.make_config(tokenizer)
        model: PreTrainedModel
        if (source := source_of(self.model_args, self.model_args.model_name_or_path)) is not None:
            model = self._load_pretrained(source, config)
        else:
            model = self.auto_model.from_config(
                config, trust_remote_code=self.model_args.trust_remote_code, **self.dtype_options(saved=False)
            )
            logger.info("Training from scratch: %.2f million parameters.", model.num_parameters() / 1e6)
        core: Any = core_model(model)
        shapes = {name: parameter.shape for name, parameter in core.named_parameters()}
        self.fit_model(core, tokenizer)
        if self.model_args.lora_r is None and core is model:
            return model
        for name, parameter in core.named_parameters():
            if shapes.get(name) != parameter.shape:
                raise ValueError(
                    f"{name} would get {parameter.shape[0]} rows for the tokenizer or the lengths of this run, but an "
                    "adapter is saved without them: use the model's own tokenizer, and lengths within its positions, "
                    "or leave --lora_r out to train the whole model."
                )
        if self.model_args.lora_r is None:
            return model
        below = getattr(self.model_args, "freeze_layers", None) or 0
        adapted: Any = add_adapter(model, self.model_args, encoder_decoder=self.encoder_decoder, without_lowest=below)
        return adapted  # type: ignore[no-any-return]

    def _load_pretrained(self, source: str, config: PreTrainedConfig) -> PreTrainedModel:
        """Load a saved model, or a saved adapter on its base."""
        arguments = self.model_args
        options = {**self.dtype_options(saved=True), **hub_options(arguments), **arguments.quantization()}
        base = base_of(source, arguments.cache_dir)
        if base is None:
            model: PreTrainedModel = self.auto_model.from_pretrained(source, config=config, **options)
            return model
        if arguments.lora_r is not None:
            raise ValueError(
                f"--lora_r {arguments.lora_r}: {source} is an adapter already. Leave the adapter's options out to "
                "train it further, or merge it first (--merge_adapter)."
            )
        how = {"config": config, "trainable": self.training_args.do_train}
        return load_with_adapter(self.auto_model, source, base, **how, **options)

    def dtype_options(self, *, saved: bool) -> dict[str, Any]:
        """Return the options that say which number type the weights have.

        Args:
            saved: The model is loaded, not made.
        """
        return {}

    @abstractmethod
    def fit_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Fit a model to the tokenizer and the lengths of the run, in place."""

    # ---- training and evaluation -----------------------------------------------------------------------------------

    def make_trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Any],
        collator: DataCollator,
        **options: Any,
    ) -> Any:
        """Make the trainer of the run.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            rows: By split; those of train, validation and calibration are used.
            collator: Makes a batch of rows.
            options: Further ones of the trainer.
        """
        return self.trainer_class(
            model=model,
            args=self.training_args,
            train_dataset=rows.get("train"),
            eval_dataset=rows.get("validation"),
            calibration_dataset=rows.get("calibration"),
            processing_class=tokenizer,
            data_collator=collator,
            corruption=self.data_args.corruption(model, tokenizer, rows.get("train"), self.training_args.seed),
            **options,
        )

    def evaluate(self, trainer: Any, split: str, prefix: str, rows: Any) -> dict[str, float]:
        """Evaluate the model on a split.

        Args:
            trainer: Of the model as it is now.
            split: Validation, test, or the name of a further set.
            prefix: Of the metrics' names.
            rows: Of the split.
        """
        metrics: dict[str, float] = trainer.evaluate(rows, metric_key_prefix=prefix)
        return metrics

    @abstractmethod
    def sample_outputs(self, trainer: Any, split: str, rows: Any) -> list[dict[str, str]]:
        """Let the model write the texts of --sample_outputs.

        Args:
            trainer: Of the model as it is now.
            split: That they are made for.
            rows: Of the split.
        """

    def model_card(self) -> dict[str, Any]:
        """Return what the model card says beyond what the trainer knows."""
        card: dict[str, Any] = {"tasks": self.hub_task}
        if self.model_args.model_name_or_path is not None:
            base = named_model(self.model_args.model_name_or_path, self.model_args.cache_dir)
            base = base_of(base, self.model_args.cache_dir) or base
            card["finetuned_from"] = SMOLLM2_ON_HUB if is_smollm2(base) else base  # a link needs the hub's name
        data = self.data_args
        if data.dataset_name is not None:
            card["dataset_tags"] = card["dataset"] = data.dataset_name
            if data.dataset_config_name is not None:
                card["dataset_args"] = data.dataset_config_name
                card["dataset"] = f"{data.dataset_name} {data.dataset_config_name}"
        return card

    # ---- the run ---------------------------------------------------------------------------------------------------

    @classmethod
    def main(cls, argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, float]:
        """Run the task from a command line.

        Args:
            argv: Arguments without the program's name; ``sys.argv[1:]`` when None.
            prog: The program's name in --help.

        Returns:
            All metrics of training, evaluation and test by their logged names; empty where nothing was to do.
        """
        end_with_runner()
        task = cls.parse(argv, prog)
        training = task.training_args
        setup_logging(training)
        hide_in_logs((task.model_args.token, training.hub_token))
        if training.device.type == "cpu":
            training.dataloader_pin_memory = False  # it speeds up copies to a GPU; torch warns where there is none
        task.check()
        if not (training.do_train or training.do_eval or training.do_predict):
            logger.warning("There is nothing to do: pass --do_train, --do_eval or --do_predict.")
            return {}
        return task.run()

    def run(self) -> dict[str, float]:
        """Train, evaluate and write down what came of it, as far as the arguments ask for it; see `main`."""
        training, outcome_args = self.training_args, self.outcome_args
        check_output_dir(training)
        strict = self.data_args.resume_strict
        checkpoint = detect_checkpoint(training, strict=strict)
        note_start(training, checkpoint)
        discard_outcome(training)
        self.load_data()
        set_seed(training.seed)
        with explained_where_unreachable(self.model_args):
            tokenizer = self.load_tokenizer(self.training_texts, resuming=checkpoint is not None)
            model = self.load_model(tokenizer)
        rows, collator = self.prepare_rows(tokenizer, model)
        trainer = self.make_trainer(model, tokenizer, rows, collator)
        trainer.run_facts = RunFacts(self.data_facts() | self.model_facts(), strict=strict)
        frozen: FrozenStates | None = None
        if self.frozen_layers is not None:
            frozen = self.model_args.frozen_states(self.frozen_layers, str(training.output_dir))
            if self.model_args.frozen_cache is not None:  # where other runs that evaluate the same sets find them
                frozen.further = [found for split, found in rows.items() if split != "train"]
            trainer.frozen_states = frozen
        results: dict[str, float] = {}
        if training.do_train:
            samples = number_of_rows(rows["train"], self.wanted_splits()["train"])
            stop_at = self.data_args.stop_at_step
            callbacks = [*early_stopping(outcome_args.early_stopping_patience), *stopping(stop_at)]
            results |= train_and_save(trainer, checkpoint, samples, callbacks)
        outcome = Outcome(trainer)
        results |= self._evaluate_all(trainer, rows, "last", outcome)
        shown = next((split for split in ("test", "validation") if split in rows), None)
        if shown is not None and outcome_args.sample_outputs:
            outcome.samples = self.sample_outputs(trainer, shown, rows[shown])
        self._describe(trainer)
        self._merge_adapter(trainer)
        if outcome_args.evaluate_best:
            with best_weights(trainer) as found:
                if found:
                    results |= self._evaluate_all(trainer, rows, "best", outcome)
        outcome.write()
        if frozen is not None and self.model_args.remove_frozen_cache:
            trainer.accelerator.wait_for_everyone()
            if training.should_save:
                frozen.remove()
        return results

    def _evaluate_all(self, trainer: Any, rows: Mapping[str, Any], weights: str, outcome: Outcome) -> dict[str, float]:
        """Evaluate on every split and further set, log and save the metrics and add them to the outcome."""
        results: dict[str, float] = {}
        extra = {data.name: data.name for data in self.outcome_args.extra_datasets()}
        limits = self.wanted_splits()
        for split, prefix in {"validation": "eval", "test": self.test_prefix, **extra}.items():
            if split not in rows:
                continue
            prefix = prefix if weights == "last" else f"{weights}_{prefix}"
            logger.info("*** Evaluate (%s, %s weights) ***", split, weights)
            metrics = self.evaluate(trainer, split, prefix, rows[split])
            samples = number_of_rows(rows[split], limits.get(split, self.most_extra_rows))
            if samples is not None:
                metrics[f"{prefix}_samples"] = samples
            trainer.log_metrics(prefix, metrics)
            metrics = trainer.with_all_metrics(metrics, prefix)  # the files have what the log leaves out
            trainer.save_metrics(prefix, metrics)
            outcome.add(weights, split, metrics, prefix=prefix, rows=rows[split])
            results |= metrics
        return results

    def _merge_adapter(self, trainer: Any) -> None:
        """Write the merged model of --merge_adapter, from what was saved; the model in memory stays as it is."""
        if not self.model_args.merge_adapter:
            return
        folder = Path(str(self.training_args.output_dir))
        if trainer.is_world_process_zero():
            base = base_of(str(folder), self.model_args.cache_dir)
            if base is None:
                raise ValueError(f"--merge_adapter: {folder} holds a whole model, not an adapter: leave it out.")
            save_merged(
                self.auto_model, folder, base, **self.dtype_options(saved=True), **hub_options(self.model_args)
            )
        trainer.accelerator.wait_for_everyone()

    def _describe(self, trainer: Any) -> None:
        """Write the model card, and push to the hub where --push_to_hub asks for it."""
        if self.model_args.model_name_or_path is None:
            # The card says "trained from scratch" where the config names a folder; without a name it names model "".
            trainer.model.config.name_or_path = self.training_args.output_dir
        folder = Path(str(self.training_args.output_dir))
        model = trainer.accelerator.unwrap_model(trainer.model)
        with base_as_on_hub(model, folder, write=trainer.is_world_process_zero()):
            if self.training_args.push_to_hub:
                trainer.push_to_hub(**self.model_card())
            else:
                trainer.create_model_card(**self.model_card())


def number_of_rows(rows: Any, limit: int | None) -> int | None:
    """Count the rows of a split; of a stream only the limit is known.

    Args:
        rows: Of the split, cut to the limit already.
        limit: The most rows that the run takes of it, None for all.
    """
    return len(rows) if hasattr(rows, "__len__") else limit
