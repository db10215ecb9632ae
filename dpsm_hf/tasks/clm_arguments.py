"""The arguments of run_clm_dpsm.py beside those of training, and which of them contradict each other.

Names and meaning are those of `run_clm.py` in the Hugging Face examples; help texts that begin with "dpsm_hf" mark
what is added here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data.clm import BOUNDARIES, PACKINGS, ClmPreprocessing
from ..data.loading import EMBEDDED_DATASETS, file_builder
from ..data.tokenizer import TRAIN_BPE, check_vocab_size
from ..training.arguments import DPSMConfig
from .data_arguments import DataSource
from .model_arguments import ModelSource
from .stopping import StoppingArguments
from .stress_arguments import StressArguments

logger = logging.getLogger(__name__)

_DTYPES = ["auto", "bfloat16", "float16", "float32"]
_DEFAULT_BLOCK_SIZE = 1024


@dataclass
class ModelArguments(ModelSource):
    """Which model, configuration and tokenizer to use."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Number type of the model's weights; auto takes that of the saved ones.",
            "choices": _DTYPES,
        },
    )

    def __post_init__(self) -> None:
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

    test_file: str | None = field(
        default=None, metadata={"help": "dpsm_hf: file that --do_predict evaluates on, of the same kind."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many rows of tokens at most."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many rows of tokens at most."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens of a row; by default what tokenizer and model take, 1024 where that is more."},
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare anew what is cached."})
    validation_split_percentage: int | None = field(
        default=5, metadata={"help": "Share of the train split to evaluate on where there is no validation split."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line ends of txt files."})
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "dpsm_hf: --do_predict evaluates on this many rows of tokens at most."}
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "dpsm_hf: column with the text; text, or else the first, when left out."}
    )
    packing: str = field(
        default="split",
        metadata={
            "help": "dpsm_hf: split joins all texts of a split and loses nothing but a short end; batch joins 1,000 "
            "texts at a time and drops what is left of each thousand, exactly like run_clm.py.",
            "choices": list(PACKINGS),
        },
    )
    min_remainder: int = field(
        default=32, metadata={"help": "dpsm_hf: drop the end of a split if it is shorter than this many tokens."}
    )
    drop_empty_lines: bool = field(default=False, metadata={"help": "dpsm_hf: leave out rows of blank text."})
    unicode_nfkc: bool = field(default=False, metadata={"help": "dpsm_hf: bring texts to Unicode's NFKC form."})
    lowercase: bool = field(default=False, metadata={"help": "dpsm_hf: turn letters into small ones."})
    add_eos_between_documents: bool | None = field(
        default=None,
        metadata={
            "help": "dpsm_hf: put the end-of-sequence token behind every document. Left out: true for python-docs, "
            "whose rows are whole documents, false for everything else, like run_clm.py."
        },
    )
    document_boundary: str = field(
        default="auto",
        metadata={
            "help": "dpsm_hf: what ends a document: row, every row; blank_line, a row of blank text, for data whose "
            "rows are lines; auto, blank_line for txt files and row otherwise.",
            "choices": list(BOUNDARIES),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stopping()
        percentage = self.validation_split_percentage
        if percentage is not None and not 0 <= percentage < 100:
            raise ValueError(f"--validation_split_percentage {percentage} must lie between 0 and 99.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        if self.streaming and self.preprocessing_num_workers is not None:
            raise ValueError(
                "--preprocessing_num_workers has no effect with --streaming: use --dataloader_num_workers."
            )
        if self.document_boundary != "auto" and self.add_eos_between_documents is False:
            raise ValueError("--document_boundary has no effect with --add_eos_between_documents false.")
        self.preprocessing(self.block_size if self.block_size is not None else _DEFAULT_BLOCK_SIZE)

    def preprocessing(self, block_size: int) -> ClmPreprocessing:
        """Settle the options that depend on the data.

        Args:
            block_size: Tokens of a row.

        Returns:
            The options for `prepare_clm_datasets`.

        Raises:
            ValueError: An option is out of range.
        """
        between = self.add_eos_between_documents
        if between is None:
            between = self.dataset_name in EMBEDDED_DATASETS or self.document_boundary != "auto"
        return ClmPreprocessing(
            block_size=block_size,
            packing=self.packing,
            min_remainder=self.min_remainder,
            drop_empty_lines=self.drop_empty_lines,
            unicode_nfkc=self.unicode_nfkc,
            lowercase=self.lowercase,
            add_eos_between_documents=between,
            document_boundary=(
                natural_boundary(self.files().values()) if self.document_boundary == "auto" else self.document_boundary
            ),
        )


def natural_boundary(files: Iterable[str]) -> str:
    """Return what ends a document of data from these files, none for a data set: ``row`` or ``blank_line``."""
    return "blank_line" if any(file_builder(path) == "text" for path in files) else "row"


def check_contradictions(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: DPSMConfig
) -> None:
    """Refuse options that contradict each other across the groups, before anything is loaded.

    Args:
        model_args: Model, configuration, tokenizer.
        data_args: Data.
        training_args: Training.

    Raises:
        ValueError: A split that is asked for cannot exist, or a stream has no end.
    """
    if data_args.dataset_name is None:
        if training_args.do_train and data_args.train_file is None:
            raise ValueError("--do_train needs a --train_file or a --dataset_name.")
        if training_args.do_predict and data_args.test_file is None:
            raise ValueError("--do_predict needs a --test_file or a --dataset_name with a test split.")
        if training_args.do_eval and data_args.validation_file is None and data_args.train_file is None:
            raise ValueError("--do_eval needs a --validation_file, a --train_file or a --dataset_name.")
    data_args.check_calibration(training_args.fit_temperature)
    data_args.check_stress(training_args)
    if model_args.tokenizer_name == TRAIN_BPE and data_args.dataset_name is None and data_args.train_file is None:
        raise ValueError(f"--tokenizer_name {TRAIN_BPE} needs a --train_file or a --dataset_name to train on.")
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("--streaming with --do_train needs --max_steps, because a stream does not know its length.")
    if model_args.model_type is not None and (model_args.model_name_or_path or model_args.config_name):
        logger.warning("--model_type has no effect beside --model_name_or_path or --config_name.")


def resolve_block_size(wanted: int | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Settle the tokens of a row the way run_clm.py does.

    Args:
        wanted: --block_size, or None.
        tokenizer: Bounds a row with its model_max_length.
        config: Bounds the default with its max_position_embeddings.

    Returns:
        Tokens of a row.
    """
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
