"""Summarisation: train, evaluate and predict with an encoder-decoder on pairs of a text and its summary.

    dpsm summarization --dataset_name python-docstrings --model_type bart \\
        --config_overrides d_model=128,encoder_layers=2,decoder_layers=2 --tokenizer_name train-bpe \\
        --output_dir out --do_train --do_eval --predict_with_generate

Names and meaning of the arguments are those of `run_summarization.py` in the Hugging Face examples; help texts that
begin with "dpsm_hf" mark what is added here. ROUGE is that of the rouge-score package;
`dpsm_hf.evaluation.text_metrics` says how sentences are split and what each figure is.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollator,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.loading import column_names
from ..data.summarization import TokenizationSettings, filter_pairs, resolve_columns, tokenize_split
from ..data.tokenizer import TRAIN_BPE, column_texts
from ..evaluation.text_metrics import load_bert_scorer, sentence_splitter_name
from ..runtime.options import option
from ..training.arguments import DPSMSeq2SeqConfig
from ..training.trainer import DPSMSeq2SeqTrainer
from .adapters import AdapterArguments
from .arguments import DataSource, ModelSource
from .generation_metrics import decode_ids, summary_metrics, write_predictions
from .samples import summaries
from .seq2seq_setup import (
    check_decoder_start,
    check_source_prefix,
    check_tokenizer,
    fit_positions,
    fit_vocabulary,
    position_limit,
    set_languages,
)
from .stopping import StoppingArguments
from .stress_arguments import SummaryStressArguments
from .task import Task

logger = logging.getLogger(__name__)

# Tokens of a row where nobody says.
_MOST_SOURCE, _MOST_TARGET = 1024, 128


@dataclass
class ModelArguments(AdapterArguments, ModelSource):
    """Which model, configuration and tokenizer to use."""

    resize_position_embeddings: bool | None = option(
        "What to do when rows may be longer than the model's positions: true adds positions, false is an "
        "error, left out adds them with a warning."
    )


@dataclass
class DataTrainingArguments(StoppingArguments, SummaryStressArguments, DataSource):
    """Which pairs to use, how to cut them, and how to score what is generated."""

    lang: str | None = option("Language code of the data, required by mBART (en_XX).")
    text_column: str | None = option("Column with the full texts.")
    summary_column: str | None = option("Column with the summaries.")
    overwrite_cache: bool = option("Preprocess again instead of reading the cache.", False)
    preprocessing_num_workers: int | None = option("Processes for preprocessing.")
    max_source_length: int = option("Tokens kept of a source, special tokens and prefix included.", 1024)
    max_target_length: int = option("Tokens kept of a summary in training.", 128)
    val_max_target_length: int | None = option(
        "Tokens kept of a summary in evaluation and prediction, and the length limit of generation unless "
        "--generation_max_length is given. By default --max_target_length."
    )
    pad_to_max_length: bool = option("Pad every row to the full lengths (TPU) instead of batch by batch.", False)
    max_train_samples: int | None = option("Use only the first so many training pairs.")
    max_eval_samples: int | None = option("Use only the first so many validation pairs.")
    max_predict_samples: int | None = option("Use only the first so many test pairs.")
    num_beams: int | None = option(
        "Beams of generation in evaluation and prediction, unless --generation_num_beams is given.", 1
    )
    ignore_pad_token_for_loss: bool = option("Leave padding in the labels out of the loss.", True)
    source_prefix: str | None = option("Text before every source (T5: 'summarize: ').")
    forced_bos_token: str | None = option("Token that generation writes first (mBART-50: the language code).")
    min_source_words: int = option("dpsm_hf: leave out pairs whose text has fewer words; 0 keeps all.", 0)
    bertscore: bool = option("dpsm_hf: report BERTScore too; needs --predict_with_generate.", False)
    bertscore_model: str | None = option(
        "dpsm_hf: model of BERTScore, a hub name or a folder (English: roberta-large)."
    )
    bertscore_num_layers: int | None = option("dpsm_hf: layer that BERTScore compares; required for a folder.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stopping()
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "val_max_target_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; give at least 1, or leave it out.")
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length

    @property
    def map_options(self) -> dict[str, Any]:
        """Return the options of `datasets.Dataset.map`."""
        return {"num_proc": self.preprocessing_num_workers, "load_from_cache_file": not self.overwrite_cache}


class Summarization(Task):
    """A run of an encoder-decoder on pairs of a text and its summary."""

    model_class = ModelArguments
    data_class = DataTrainingArguments
    training_class = DPSMSeq2SeqConfig
    auto_model = AutoModelForSeq2SeqLM
    trainer_class = DPSMSeq2SeqTrainer
    encoder_decoder = True
    hub_task = "summarization"
    test_prefix = "predict"
    without_effect = {
        "block_size": "its rows have --max_source_length and --max_target_length tokens; leave it out",
        **dict.fromkeys(
            ("prompt_column", "completion_column", "prompt_template", "use_chat_template"),
            "its pairs are --text_column and --summary_column; leave it out",
        ),
    }

    # ---- arguments -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse options that contradict each other; see `Task.check`."""
        model, data, training = self.model_args, self.data_args, self.training_args
        if model.model_name_or_path is not None:
            for name in ("model_type", "config_overrides"):
                if getattr(model, name) is not None:
                    raise ValueError(
                        f"--{name} is for training from scratch and contradicts --model_name_or_path "
                        f"{model.model_name_or_path}: leave one of them out."
                    )
            if model.tokenizer_name == TRAIN_BPE:
                raise ValueError(
                    "--tokenizer_name train-bpe makes a new vocabulary, which the embeddings of --model_name_or_path "
                    f"{model.model_name_or_path} do not belong to: leave one of them out."
                )
        elif model.config_name is not None and (model.model_type or model.config_overrides):
            raise ValueError("--config_name contradicts --model_type and --config_overrides: give one or the other.")
        elif model.config_name is None and model.model_type is None:
            raise ValueError(
                "Give --model_name_or_path to fine-tune a model, or --model_type (for instance bart) or --config_name "
                "to train one from scratch."
            )
        if model.model_name_or_path is None and model.tokenizer_name is None:
            raise ValueError(
                "Training from scratch needs --tokenizer_name: a tokenizer's name or folder, or train-bpe."
            )
        if model.tokenizer_name == TRAIN_BPE and not training.do_train:
            raise ValueError(
                "--tokenizer_name train-bpe is trained on the training pairs and needs --do_train; to evaluate a "
                "trained model, pass its folder as --model_name_or_path alone."
            )
        if model.tokenizer_vocab_size is not None and model.tokenizer_name != TRAIN_BPE:
            raise ValueError(
                "--tokenizer_vocab_size has an effect with --tokenizer_name train-bpe only: leave it out."
            )
        if data.bertscore and not training.predict_with_generate:
            raise ValueError("--bertscore scores generated summaries: pass --predict_with_generate too.")
        data.check_calibration(training.fit_temperature)
        data.check_stress(training)
        for name in ("bertscore_model", "bertscore_num_layers"):
            if getattr(data, name) is not None and not data.bertscore:
                raise ValueError(f"--{name} has no effect without --bertscore: pass it too.")
        beams = training.generation_num_beams
        if beams is not None and data.num_beams not in (None, 1, beams):
            raise ValueError(f"--num_beams {data.num_beams} contradicts --generation_num_beams {beams}: give one.")
        super().check()
        if self.outcome_args.sample_outputs and not training.predict_with_generate:
            raise ValueError("--sample_outputs shows generated summaries: pass --predict_with_generate too.")

    @staticmethod
    def row_tokens(arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return the most tokens of a source and of a summary."""
        source = arguments.get("max_source_length", _MOST_SOURCE)
        return int(source), int(arguments.get("max_target_length", _MOST_TARGET))

    # ---- data ------------------------------------------------------------------------------------------------------

    def load_data(self) -> None:
        """Load splits and further sets without unusable pairs; ValueError if splits have them in different columns."""
        data = self.data_args
        self.bert_scorer = self._load_bert_scorer()  # before training: one that cannot be had is found out now
        raw = self.load_splits(list(self.wanted_splits()), validation_split_percentage=None)
        arguments = (data.dataset_name, data.text_column, data.summary_column)
        if data.cross_validation_fold is not None:
            raw = data.take_fold(raw, resolve_columns(column_names(raw["train"]), *arguments))
        #: The columns of texts and summaries, by split and further set.
        self.columns: dict[str, tuple[str, str]] = {}
        for split, most in self.wanted_splits().items():
            found = resolve_columns(column_names(raw[split]), *arguments)
            earlier = next(iter(self.columns.values()), found)
            if found != earlier:
                raise ValueError(
                    f"The {split} set has its pairs in the columns {found}, another one in {earlier}: name columns "
                    "that all have with --text_column and --summary_column."
                )
            self._take(split, raw[split], found, most)
        own = next(iter(self.columns.values()), ("", ""))
        for extra in self.outcome_args.extra_datasets():
            pairs: Any = extra.load(cache_dir=self.model_args.cache_dir, token=self.model_args.token)
            self._take(extra.name, pairs, extra.pair_columns(pairs.column_names, own), self.most_extra_rows)

    def _take(self, name: str, pairs: Any, columns: tuple[str, str], most: int | None) -> None:
        """Keep the usable pairs of a split or further set, so many at most."""
        data = self.data_args
        with self.training_args.main_process_first(desc=f"filtering {name}"):
            least = data.min_source_words
            kept, _ = filter_pairs(pairs, *columns, min_source_words=least, split=name, **data.map_options)
        if name == "train":
            kept = data.take_low_resource(kept, columns)
        self.columns[name] = columns
        self.texts[name] = self.cut(kept, name, most)

    def _load_bert_scorer(self) -> Any:
        """Load the scorer of --bertscore, or return None without it."""
        data = self.data_args
        language = (data.lang or "en").split("_")[0]
        model, layers = data.bertscore_model, data.bertscore_num_layers
        return load_bert_scorer(model, language, num_layers=layers) if data.bertscore else None

    def training_texts(self) -> Iterable[str]:
        return column_texts(self.texts["train"], self.columns["train"])

    def prepare_rows(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> tuple[dict[str, Any], DataCollator]:
        data, rows = self.data_args, {}
        for split, pairs in self.texts.items():
            limit = data.max_target_length if split == "train" else data.val_max_target_length
            settings = TokenizationSettings(
                *self.columns[split],
                max_source_length=data.max_source_length,
                max_target_length=limit or data.max_target_length,
                source_prefix=data.source_prefix or "",
                pad_to_max_length=data.pad_to_max_length,
                ignore_pad_token_for_loss=data.ignore_pad_token_for_loss,
            )
            with self.training_args.main_process_first(desc=f"tokenising the {split} set"):
                rows[split] = tokenize_split(pairs, tokenizer, settings, split=split, **data.map_options)
        collator = DataCollatorForSeq2Seq(
            tokenizer,
            model=model,  # it makes decoder_input_ids with the model's prepare_decoder_input_ids_from_labels
            label_pad_token_id=-100 if data.ignore_pad_token_for_loss else tokenizer.pad_token_id,
            pad_to_multiple_of=8 if self.training_args.fp16 else None,
        )
        return rows, collator

    @classmethod
    def calibration_rows(
        cls, options: argparse.Namespace, texts: Mapping[str, Any], tokenizer: Any, model: Any
    ) -> tuple[dict[str, Any], DataCollator]:
        positions = position_limit(model)
        lengths: dict[str, Any] = {}
        for name, most in (("max_source_length", _MOST_SOURCE), ("max_target_length", _MOST_TARGET)):
            wanted: int | None = getattr(options, name)
            if wanted is not None and positions is not None and wanted > positions:
                raise ValueError(
                    f"--{name} {wanted} is more than the model's {positions} positions: give {positions} or less."
                )
            lengths[name] = min(most, positions or most) if wanted is None else wanted
        rows = {}
        for split, pairs in texts.items():
            columns = resolve_columns(pairs.column_names, options.dataset, options.text_column, options.summary_column)
            settings = TokenizationSettings(*columns, **lengths, source_prefix=options.source_prefix)
            kept, _ = filter_pairs(pairs, *columns, split=split)
            chosen = kept if options.max_samples is None else kept.take(min(options.max_samples, len(kept)))
            rows[split] = tokenize_split(chosen, tokenizer, settings, split=split)
        return rows, DataCollatorForSeq2Seq(tokenizer, model=model)

    # ---- tokenizer and model ---------------------------------------------------------------------------------------

    @property
    def tokenizer_length(self) -> int:
        length: int = self.data_args.max_source_length
        return length

    def longest_row(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
        """Return the tokens of the longest source and summary together."""
        return int(self.data_args.max_source_length + self.data_args.max_target_length)

    def make_config(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """Load or make the configuration, and refuse, by a ValueError, that of a model that is no encoder-decoder."""
        config = super().make_config(tokenizer)
        if not config.is_encoder_decoder:
            raise ValueError(
                f"A model of type {config.model_type} has no encoder and decoder, which this script trains; for "
                "language models there is run_clm_dpsm.py."
            )
        return config

    def load_tokenizer(
        self, training_texts: Callable[[], Iterable[str]], *, resuming: bool = False
    ) -> PreTrainedTokenizerBase:
        """Load the run's tokenizer, or train it, and refuse one that cannot pad or end a summary."""
        tokenizer = super().load_tokenizer(training_texts, resuming=resuming)
        check_tokenizer(tokenizer)
        return tokenizer

    def fit_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        data = self.data_args
        fit_vocabulary(model, tokenizer)
        set_languages(model, tokenizer, data.lang, data.forced_bos_token)
        check_decoder_start(model, tokenizer)
        longest = (data.max_source_length, data.max_target_length, data.val_max_target_length or 1)
        fit_positions(model, max(longest), self.model_args.resize_position_embeddings)
        check_source_prefix(model, data.source_prefix, from_scratch=self.model_args.model_name_or_path is None)

    # ---- training and evaluation -----------------------------------------------------------------------------------

    def make_trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Any],
        collator: DataCollator,
        **options: Any,
    ) -> Any:
        """Make the trainer of the run, which generates where --predict_with_generate asks for it."""
        data, training = self.data_args, self.training_args
        if training.generation_max_length is None:
            training.generation_max_length = data.val_max_target_length
        if training.generation_num_beams is None:
            training.generation_num_beams = data.num_beams
        if training.predict_with_generate:
            logger.info("rougeLsum splits texts without newlines into sentences by: %s.", sentence_splitter_name())
            options["compute_metrics"] = summary_metrics(tokenizer, bert_scorer=self.bert_scorer)
        return super().make_trainer(model, tokenizer, rows, collator, **options)

    def evaluate(self, trainer: Any, split: str, prefix: str, rows: Any) -> dict[str, float]:
        """Evaluate the model on a split, and write the summaries that it generates for the test split."""
        if prefix != self.test_prefix:
            return super().evaluate(trainer, split, prefix, rows)
        if not self.training_args.predict_with_generate:
            logger.warning("Without --predict_with_generate the test set is scored, but no summaries are written.")
            # Trainer.predict would keep the logits of the whole set in memory.
            return super().evaluate(trainer, split, prefix, rows)
        output = trainer.predict(rows, metric_key_prefix=prefix)
        if trainer.is_world_process_zero():
            pairs = self.texts[split]
            # Several processes repeat samples at the end to fill their last batch.
            predictions = decode_ids(output.predictions, trainer.processing_class)[: len(pairs)]
            texts = (pairs[column][:] for column in self.columns[split])
            paths = write_predictions(self.training_args.output_dir, predictions, *texts)
            logger.info("The generated summaries are in %s and %s.", *paths)
        return dict(output.metrics or {})

    def sample_outputs(self, trainer: Any, split: str, rows: Any) -> list[dict[str, str]]:
        return summaries(trainer, rows, self.texts[split], self.columns[split], self.outcome_args.sample_outputs)

    def model_card(self) -> dict[str, Any]:
        card = super().model_card()
        return card if self.data_args.lang is None else {**card, "language": self.data_args.lang}
