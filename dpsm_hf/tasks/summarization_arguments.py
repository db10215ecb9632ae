"""The arguments of run_summarization_dpsm.py beside those of training, and which of them contradict each other.

Names and meaning are those of `run_summarization.py` in the Hugging Face examples; help texts that begin with
"dpsm_hf" mark what is added here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..data.tokenizer import TRAIN_BPE
from .data_arguments import DataSource
from .model_arguments import ModelSource
from .stopping import StoppingArguments
from .stress_arguments import SummaryStressArguments


@dataclass
class ModelArguments(ModelSource):
    """Which model, configuration and tokenizer to use."""

    resize_position_embeddings: bool | None = field(
        default=None,
        metadata={
            "help": "What to do when rows may be longer than the model's positions: true adds positions, false is an "
            "error, left out adds them with a warning."
        },
    )


@dataclass
class DataTrainingArguments(StoppingArguments, SummaryStressArguments, DataSource):
    """Which pairs to use, how to cut them, and how to score what is generated."""

    lang: str | None = field(default=None, metadata={"help": "Language code of the data, required by mBART (en_XX)."})
    text_column: str | None = field(default=None, metadata={"help": "Column with the full texts."})
    summary_column: str | None = field(default=None, metadata={"help": "Column with the summaries."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Preprocess again instead of reading the cache."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for preprocessing."})
    max_source_length: int = field(
        default=1024, metadata={"help": "Tokens kept of a source, special tokens and prefix included."}
    )
    max_target_length: int = field(default=128, metadata={"help": "Tokens kept of a summary in training."})
    val_max_target_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens kept of a summary in evaluation and prediction, and the length limit of generation unless "
            "--generation_max_length is given. By default --max_target_length."
        },
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every row to the full lengths (TPU) instead of batch by batch."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many training pairs."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many validation pairs."}
    )
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first so many test pairs."})
    num_beams: int | None = field(
        default=1,
        metadata={"help": "Beams of generation in evaluation and prediction, unless --generation_num_beams is given."},
    )
    ignore_pad_token_for_loss: bool = field(
        default=True, metadata={"help": "Leave padding in the labels out of the loss."}
    )
    source_prefix: str | None = field(default=None, metadata={"help": "Text before every source (T5: 'summarize: ')."})
    forced_bos_token: str | None = field(
        default=None, metadata={"help": "Token that generation writes first (mBART-50: the language code)."}
    )
    min_source_words: int = field(
        default=0, metadata={"help": "dpsm_hf: leave out pairs whose text has fewer words; 0 keeps all."}
    )
    bertscore: bool = field(
        default=False, metadata={"help": "dpsm_hf: report BERTScore too; needs --predict_with_generate."}
    )
    bertscore_model: str | None = field(
        default=None,
        metadata={"help": "dpsm_hf: model of BERTScore, a hub name or a folder (English: roberta-large)."},
    )
    bertscore_num_layers: int | None = field(
        default=None, metadata={"help": "dpsm_hf: layer that BERTScore compares; required for a folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stopping()
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "val_max_target_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; give at least 1, or leave it out.")
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length


def check_contradictions(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: Any) -> None:
    """Refuse options that contradict each other before anything is loaded.

    Raises:
        ValueError: With the two options and the way out.
    """
    if model_args.model_name_or_path is not None:
        for name in ("model_type", "config_overrides"):
            if getattr(model_args, name) is not None:
                raise ValueError(
                    f"--{name} is for training from scratch and contradicts --model_name_or_path "
                    f"{model_args.model_name_or_path}: leave one of them out."
                )
        if model_args.tokenizer_name == TRAIN_BPE:
            raise ValueError(
                "--tokenizer_name train-bpe makes a new vocabulary, which the embeddings of --model_name_or_path "
                f"{model_args.model_name_or_path} do not belong to: leave one of them out."
            )
    elif model_args.config_name is not None and (model_args.model_type or model_args.config_overrides):
        raise ValueError("--config_name contradicts --model_type and --config_overrides: give one or the other.")
    elif model_args.config_name is None and model_args.model_type is None:
        raise ValueError(
            "Give --model_name_or_path to fine-tune a model, or --model_type (for instance bart) or --config_name to "
            "train one from scratch."
        )
    if model_args.model_name_or_path is None and model_args.tokenizer_name is None:
        raise ValueError("Training from scratch needs --tokenizer_name: a tokenizer's name or folder, or train-bpe.")
    if model_args.tokenizer_name == TRAIN_BPE and not training_args.do_train:
        raise ValueError(
            "--tokenizer_name train-bpe is trained on the training pairs and needs --do_train; to evaluate a trained "
            "model, pass its folder as --model_name_or_path alone."
        )
    if model_args.tokenizer_vocab_size is not None and model_args.tokenizer_name != TRAIN_BPE:
        raise ValueError("--tokenizer_vocab_size has an effect with --tokenizer_name train-bpe only: leave it out.")
    if data_args.bertscore and not training_args.predict_with_generate:
        raise ValueError("--bertscore scores generated summaries: pass --predict_with_generate too.")
    data_args.check_calibration(training_args.fit_temperature)
    data_args.check_stress(training_args)
    for name in ("bertscore_model", "bertscore_num_layers"):
        if getattr(data_args, name) is not None and not data_args.bertscore:
            raise ValueError(f"--{name} has no effect without --bertscore: pass it too.")
    beams = training_args.generation_num_beams
    if beams is not None and data_args.num_beams not in (None, 1, beams):
        raise ValueError(f"--num_beams {data_args.num_beams} contradicts --generation_num_beams {beams}: give one.")
