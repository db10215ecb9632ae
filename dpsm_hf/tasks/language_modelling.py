"""Language modelling: train and evaluate a causal language model on rows of tokens cut from texts.

    dpsm clm --dataset_name python-docs --model_type gpt2 \\
        --config_overrides n_embd=128,n_layer=2,n_head=2 --tokenizer_name train-bpe --block_size 128 \\
        --output_dir out --do_train --do_eval

Names and meaning of the arguments are those of `run_clm.py` in the Hugging Face examples; help texts that begin with
"dpsm_hf" mark what is added here. Perplexity is exp of the true token mean of the negative log-likelihood, `eval_nll`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    DataCollator,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.clm import (
    BOUNDARIES,
    PACKINGS,
    ClmCollator,
    ClmPreprocessing,
    choose_text_column,
    prepare_clm_datasets,
)
from ..data.completions import CompletionCollator, CompletionFormat, prepare_completions
from ..data.loading import EMBEDDED_DATASETS, AnyDataset, column_names, file_builder
from ..data.tokenizer import DEFAULT_MAX_LENGTH, TRAIN_BPE, check_vocab_size, column_texts
from ..runtime.options import option
from ..training.arguments import DPSMConfig
from ..training.trainer import DPSMTrainer
from .adapters import AdapterArguments
from .arguments import DataSource, ModelSource
from .freezing import FreezingArguments
from .model_building import check_block_size
from .samples import continuation_rouge, continuations
from .stopping import StoppingArguments
from .stress_arguments import StressArguments
from .task import Task

logger = logging.getLogger(__name__)

_DTYPES = ["auto", "bfloat16", "float16", "float32"]
_DEFAULT_BLOCK_SIZE = 1024


@dataclass
class ModelArguments(FreezingArguments, AdapterArguments, ModelSource):
    """Which model, configuration and tokenizer to use."""

    dtype: str | None = option(
        "Number type of the model's weights; auto takes that of the saved ones.", choices=_DTYPES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config_overrides is not None and (self.config_name is not None or self.model_name_or_path is not None):
            raise ValueError(
                "--config_overrides changes the default configuration of --model_type, so it contradicts "
                "--config_name and --model_name_or_path: leave one of them out."
            )
        if self.model_name_or_path is None and self.config_name is None and self.model_type is None:
            raise ValueError(
                "There is no model: give --model_name_or_path to fine-tune one, or --model_type (for instance gpt2) "
                "or --config_name to train from scratch."
            )
        if self.model_name_or_path is None and self.tokenizer_name is None:
            raise ValueError(
                "A model from scratch needs a tokenizer: give --tokenizer_name, a name or a folder, or train-bpe to "
                "train one on the train split."
            )
        if self.tokenizer_vocab_size is not None:
            if self.tokenizer_name != TRAIN_BPE:
                raise ValueError(f"--tokenizer_vocab_size goes with --tokenizer_name {TRAIN_BPE} alone.")
            check_vocab_size(self.tokenizer_vocab_size)
        if self.tokenizer_name == TRAIN_BPE and self.model_name_or_path is not None:
            raise ValueError(
                f"--tokenizer_name {TRAIN_BPE} makes new tokens, which the embeddings of --model_name_or_path "
                f"{self.model_name_or_path} know nothing of: train from scratch with --model_type, or keep the "
                "model's own tokenizer."
            )


@dataclass
class DataTrainingArguments(StoppingArguments, StressArguments, DataSource):
    """Which texts to train and evaluate on, and how they become rows of tokens."""

    test_file: str | None = option("dpsm_hf: file that --do_predict evaluates on, of the same kind.")
    max_train_samples: int | None = option("Train on this many rows of tokens at most.")
    max_eval_samples: int | None = option("Evaluate on this many rows of tokens at most.")
    streaming: bool = option("Read the data while training; needs --max_steps.", False)
    block_size: int | None = option(
        "Tokens of a row; by default what tokenizer and model take, 1024 where that is more."
    )
    overwrite_cache: bool = option("Prepare anew what is cached.", False)
    validation_split_percentage: int | None = option(
        "Share of the train split to evaluate on where there is no validation split.", 5
    )
    preprocessing_num_workers: int | None = option("Processes that tokenize.")
    keep_linebreaks: bool = option("Keep the line ends of txt files.", True)
    max_predict_samples: int | None = option("dpsm_hf: --do_predict evaluates on this many rows of tokens at most.")
    text_column_name: str | None = option("dpsm_hf: column with the text; text, or else the first, when left out.")
    packing: str = option(
        "dpsm_hf: split joins all texts of a split and loses nothing but a short end; batch joins 1,000 "
        "texts at a time and drops what is left of each thousand, exactly like run_clm.py.",
        "split",
        choices=PACKINGS,
    )
    min_remainder: int = option("dpsm_hf: drop the end of a split if it is shorter than this many tokens.", 32)
    drop_empty_lines: bool = option("dpsm_hf: leave out rows of blank text.", False)
    unicode_nfkc: bool = option("dpsm_hf: bring texts to Unicode's NFKC form.", False)
    lowercase: bool = option("dpsm_hf: turn letters into small ones.", False)
    add_eos_between_documents: bool | None = option(
        "dpsm_hf: put the end-of-sequence token behind every document. Left out: true for python-docs, "
        "whose rows are whole documents, false for everything else, like run_clm.py."
    )
    prompt_column: str | None = option(
        "dpsm_hf: column of prompts; each row is then a prompt and its completion, and only the completion is trained "
        "and scored. Goes with --completion_column."
    )
    completion_column: str | None = option("dpsm_hf: column of the completions of --prompt_column.")
    prompt_template: str | None = option(
        "dpsm_hf: text of the prompt, in which {prompt} stands for the column's text; {prompt} alone by default."
    )
    use_chat_template: bool = option(
        "dpsm_hf: put prompt and completion into the tokenizer's chat template, as the messages of a user and an "
        "assistant.",
        False,
    )
    continuation_rouge: int | None = option(
        "dpsm_hf: at the end continue the first half of so many rows (or their prompts), greedily, and score what is "
        "written against the rest: eval_rouge1, eval_rouge2, eval_rougeL and so on."
    )
    document_boundary: str = option(
        "dpsm_hf: what ends a document: row, every row; blank_line, a row of blank text, for data whose "
        "rows are lines; auto, blank_line for txt files and row otherwise.",
        "auto",
        choices=BOUNDARIES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stopping()
        percentage = self.validation_split_percentage
        if percentage is not None and not 0 <= percentage < 100:
            raise ValueError(f"--validation_split_percentage {percentage} must lie between 0 and 99.")
        counts = ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers")
        for name in (*counts, "continuation_rouge"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        if self.streaming and self.preprocessing_num_workers is not None:
            raise ValueError(
                "--preprocessing_num_workers has no effect with --streaming: use --dataloader_num_workers."
            )
        if self.document_boundary != "auto" and self.add_eos_between_documents is False:
            raise ValueError("--document_boundary has no effect with --add_eos_between_documents false.")
        self._check_completions()
        self.preprocessing(self.block_size if self.block_size is not None else _DEFAULT_BLOCK_SIZE)

    def _check_completions(self) -> None:
        beside = {
            "text_column_name": self.text_column_name is not None,
            "add_eos_between_documents": self.add_eos_between_documents is not None,
            "document_boundary": self.document_boundary != "auto",
            "packing": self.packing != "split",
            **{n: getattr(self, n) for n in ("streaming", "drop_empty_lines", "lowercase", "unicode_nfkc")},
        }
        used = next((name for name, given in beside.items() if given), None)
        if self.completions() is not None and used is not None:
            raise ValueError(f"--{used} has no effect on rows of --prompt_column and --completion_column.")

    def completions(self) -> CompletionFormat | None:
        """Return how pairs become rows; None where the rows are cut from texts."""
        return CompletionFormat.of(
            self.prompt_column, self.completion_column, self.prompt_template, self.use_chat_template
        )

    def preprocessing(self, block_size: int) -> ClmPreprocessing:
        """Return the options of `prepare_clm_datasets`; ValueError if one is out of range."""
        between, boundary = self.add_eos_between_documents, self.document_boundary
        if between is None:
            between = self.dataset_name in EMBEDDED_DATASETS or boundary != "auto"
        return ClmPreprocessing(
            block_size=block_size,
            packing=self.packing,
            min_remainder=self.min_remainder,
            drop_empty_lines=self.drop_empty_lines,
            unicode_nfkc=self.unicode_nfkc,
            lowercase=self.lowercase,
            add_eos_between_documents=between,
            document_boundary=natural_boundary(self.files().values()) if boundary == "auto" else boundary,
        )


def natural_boundary(files: Iterable[str]) -> str:
    """Return what separates documents: ``blank_line`` in text files, else ``row``; a named data set has no files."""
    return "blank_line" if any(file_builder(path) == "text" for path in files) else "row"


def resolve_block_size(wanted: int | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Return the tokens of a row, settled as run_clm.py does, the tokenizer bounding --block_size too."""
    limit = tokenizer.model_max_length
    if wanted is not None:
        if wanted > limit:
            logger.warning("block_size %s is more than the tokenizer's model_max_length: using %s.", wanted, limit)
        return min(wanted, limit)
    positions = getattr(config, "max_position_embeddings", None) or _DEFAULT_BLOCK_SIZE
    if limit <= positions:
        return int(limit)
    chosen = min(_DEFAULT_BLOCK_SIZE, positions) if positions > 0 else _DEFAULT_BLOCK_SIZE
    logger.info("Using block_size %s; --block_size changes it.", chosen)
    return int(chosen)


class LanguageModelling(Task):
    """A run of a causal language model on texts that are cut into rows of `block_size` tokens."""

    model_class = ModelArguments
    data_class = DataTrainingArguments
    training_class = DPSMConfig
    auto_model = AutoModelForCausalLM
    trainer_class = DPSMTrainer
    encoder_decoder = False
    hub_task = "text-generation"
    without_effect = dict.fromkeys(
        ("summary_column", "source_prefix", "max_source_length", "max_target_length"),
        "a language model has one text a row; leave it out",
    )

    # ---- arguments -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse options that contradict each other across the groups; see `Task.check`."""
        model, data, training = self.model_args, self.data_args, self.training_args
        if data.dataset_name is None:
            if training.do_train and data.train_file is None:
                raise ValueError("--do_train needs a --train_file or a --dataset_name.")
            if training.do_predict and data.test_file is None:
                raise ValueError("--do_predict needs a --test_file or a --dataset_name with a test split.")
            if training.do_eval and data.validation_file is None and data.train_file is None:
                raise ValueError("--do_eval needs a --validation_file, a --train_file or a --dataset_name.")
        data.check_calibration(training.fit_temperature)
        data.check_stress(training)
        if model.tokenizer_name == TRAIN_BPE and data.dataset_name is None and data.train_file is None:
            raise ValueError(f"--tokenizer_name {TRAIN_BPE} needs a --train_file or a --dataset_name to train on.")
        if data.streaming and training.do_train and training.max_steps <= 0:
            raise ValueError(
                "--streaming with --do_train needs --max_steps, because a stream does not know its length."
            )
        if model.model_type is not None and (model.model_name_or_path or model.config_name):
            logger.warning("--model_type has no effect beside --model_name_or_path or --config_name.")
        super().check()
        model.check_freezing(trains=training.do_train, pretrained=model.model_name_or_path is not None)

    @staticmethod
    def row_tokens(arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return the tokens of a row: it has no source, and `block_size` targets."""
        return 0, int(arguments.get("block_size", _DEFAULT_BLOCK_SIZE))

    # ---- data ------------------------------------------------------------------------------------------------------

    def load_data(self) -> None:
        """Load the splits that the run needs, the train split for a tokenizer that is trained on it, and extra sets.

        Of the train split only the part that the run may train on: other folds and a small subset leave the rest
        unseen.
        """
        with self.training_args.main_process_first(desc="loading the data"):
            raw = self._load_own()
        data = self.data_args
        pairs = data.completions()
        for split in raw if pairs is not None else ():
            pairs.check_columns(raw[split], split)
        if pairs is not None and (data.low_resource is not None or data.cross_validation_fold is not None):
            columns = [pairs.prompt_column, pairs.completion_column]
            raw = data.take_fold(raw, columns)
            raw["train"] = data.take_low_resource(raw["train"], columns)
        elif data.low_resource is not None or data.cross_validation_fold is not None:
            column = choose_text_column(raw["train"], data.text_column_name, "train")
            by_document = data.preprocessing(DEFAULT_MAX_LENGTH).document_boundary == "blank_line"
            raw = data.take_fold(raw, [column], by_document=by_document)
            # documents differ much in length, so a share of them is a share of their text
            raw["train"] = data.take_low_resource(raw["train"], [column], by_length=True, by_document=by_document)
        self.texts = dict(raw)
        #: Of the further sets: the column of the texts, and what ends a document.
        self.extra_kinds: dict[str, tuple[str | None, str]] = {}
        for extra in self.outcome_args.extra_datasets():
            if extra.summary_column is not None:
                raise ValueError(
                    f"--extra_eval_datasets {extra.name}: language modelling has no summaries; leave summary= out."
                )
            with self.training_args.main_process_first(desc=f"loading {extra.name}"):
                how = {"streaming": data.streaming, "keep_linebreaks": data.keep_linebreaks}
                texts = extra.load(**how, cache_dir=self.model_args.cache_dir, token=self.model_args.token)
            if pairs is not None:
                self.texts[extra.name], self.extra_kinds[extra.name] = texts, (None, "row")
                continue
            own = data.text_column_name
            chosen = extra.text_column or (own if own in column_names(texts) else None)
            choose_text_column(texts, chosen, extra.name)
            self.texts[extra.name] = texts
            self.extra_kinds[extra.name] = chosen, natural_boundary([extra.source] if extra.is_file else [])

    def _load_own(self) -> Mapping[str, AnyDataset]:
        data, splits = self.data_args, list(self.wanted_splits())
        by_fold = data.cross_validation_fold is not None
        return self.load_splits(
            [*splits, "train"] if self.model_args.tokenizer_name == TRAIN_BPE and "train" not in splits else splits,
            validation_split_percentage=None if by_fold else data.validation_split_percentage,
            streaming=data.streaming,
            keep_linebreaks=data.keep_linebreaks,
        )

    def training_texts(self) -> Iterable[str]:
        pairs = self.data_args.completions()
        if pairs is not None:
            return column_texts(self.texts["train"], [pairs.prompt_column, pairs.completion_column])
        column = choose_text_column(self.texts["train"], self.data_args.text_column_name, "train")
        return column_texts(self.texts["train"], [column])

    def prepare_rows(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> tuple[dict[str, Any], DataCollator]:
        """Turn the texts of every split and further set into rows of tokens, cut to their limits."""
        data = self.data_args
        block_size = self.longest_row(tokenizer, model.config)
        check_block_size(model.config, block_size)
        options = data.preprocessing(block_size)
        how: Any = {"num_proc": data.preprocessing_num_workers, "overwrite_cache": data.overwrite_cache}
        limits = self.wanted_splits() | dict.fromkeys(self.extra_kinds, self.most_extra_rows)
        pad = tokenizer.pad_token_id or 0
        if (pairs := data.completions()) is not None:
            found: dict[str, Any] = {}
            with self.training_args.main_process_first(desc="preparing the pairs"):
                for name, most in limits.items():
                    if name in self.texts:
                        rows = prepare_completions(self.texts[name], tokenizer, pairs, block_size, split=name, **how)
                        found[name] = self.cut(rows, name, most)
            return found, CompletionCollator(pad)
        own = {split: self.texts[split] for split in self.wanted_splits() if split in self.texts}
        with self.training_args.main_process_first(desc="preparing the texts"):
            rows = dict(prepare_clm_datasets(own, tokenizer, options, text_column=data.text_column_name, **how))
            for name, (column, boundary) in self.extra_kinds.items():
                of_kind = replace(options, document_boundary=boundary)
                rows |= prepare_clm_datasets({name: self.texts[name]}, tokenizer, of_kind, text_column=column, **how)
        cut = {split: self.cut(rows[split], split, most) for split, most in limits.items()}
        return cut, ClmCollator(block_size, pad)

    @classmethod
    def calibration_rows(
        cls, options: argparse.Namespace, texts: Mapping[str, Any], tokenizer: Any, model: Any
    ) -> tuple[dict[str, Any], DataCollator]:
        positions = getattr(model.config, "max_position_embeddings", None) or _DEFAULT_BLOCK_SIZE
        check_block_size(model.config, options.block_size)
        block_size = options.block_size or min(_DEFAULT_BLOCK_SIZE, positions, tokenizer.model_max_length)
        pairs = CompletionFormat.of(
            options.prompt_column, options.completion_column, options.prompt_template, options.use_chat_template
        )
        rows: Any
        if pairs is not None:
            if options.text_column is not None:
                raise ValueError("--text_column has no effect on rows of --prompt_column and --completion_column.")
            rows = {
                split: prepare_completions(part, tokenizer, pairs, block_size, split=split)
                for split, part in texts.items()
            }
        else:
            rows = prepare_clm_datasets(
                texts,
                tokenizer,
                ClmPreprocessing(block_size, add_eos_between_documents=options.dataset in EMBEDDED_DATASETS),
                text_column=options.text_column,
                text_column_option="--text_column",
            )
        if options.max_samples is not None:
            rows = {split: part.take(min(options.max_samples, len(part))) for split, part in rows.items()}
        pad = tokenizer.pad_token_id or 0
        return rows, ClmCollator(block_size, pad) if pairs is None else CompletionCollator(pad)

    # ---- tokenizer and model ---------------------------------------------------------------------------------------

    @property
    def tokenizer_length(self) -> int:
        return self.data_args.block_size or DEFAULT_MAX_LENGTH

    @property
    def block_size(self) -> int | None:
        size: int | None = self.data_args.block_size
        return size

    def longest_row(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
        return resolve_block_size(self.data_args.block_size, tokenizer, config)

    def make_config(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """Load or make the configuration; a loaded one gets the special tokens of a tokenizer trained for the run."""
        config = super().make_config(tokenizer)
        if self.model_args.config_name is not None and self.model_args.tokenizer_name == TRAIN_BPE:
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            config.update({name: getattr(tokenizer, name) for name in names})
        return config

    def dtype_options(self, *, saved: bool) -> dict[str, Any]:
        """Return --dtype; a fresh model has no saved type that auto could mean."""
        dtype = self.model_args.dtype
        return {"dtype": dtype if saved or dtype != "auto" else None}

    def fit_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the model a row of embeddings for every token."""
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # type: ignore[index, union-attr]
            model.resize_token_embeddings(len(tokenizer))

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, trainer: Any, split: str, prefix: str, rows: Any) -> dict[str, float]:
        metrics = super().evaluate(trainer, split, prefix, rows)
        # exp(loss) is off where a model's loss divides by another count than the scored tokens, as GPT-2's does.
        if prefix == "eval":
            metrics["perplexity"] = metrics["eval_perplexity"]  # run_clm.py's name
        if (number := self.data_args.continuation_rouge) is not None:
            metrics |= {f"{prefix}_{name}": value for name, value in continuation_rouge(trainer, rows, number).items()}
        return metrics

    def sample_outputs(self, trainer: Any, split: str, rows: Any) -> list[dict[str, str]]:
        return continuations(trainer, rows, self.outcome_args.sample_outputs)

    def model_card(self) -> dict[str, Any]:
        card = super().model_card()
        if self.data_args.dataset_name in EMBEDDED_DATASETS:
            del card["dataset_tags"]  # a tag links to the hub, where those are not
        return card
