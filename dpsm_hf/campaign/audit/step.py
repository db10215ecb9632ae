"""A training step of each variation on the same text: one model and one optimizer that trainers take turns with.

The trainers are the real ones, with the arguments of the variation's own runs; a step is theirs: `training_step` for
each micro-batch, clipping, the optimizer. Only the text is the audit's, so that every variation has the same.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from ...data.tokenizer import DEFAULT_MAX_LENGTH, resolve_tokenizer
from ...tasks import clm_arguments, summarization_arguments
from ...tasks.outcome_arguments import OutcomeArguments
from ...tasks.positions import fit_positions
from ...tasks.scratch_config import build_config_from_scratch
from ...tasks.script_utils import parse_script_arguments
from ...tasks.seq2seq_setup import check_decoder_start
from ...training.arguments import DPSMConfig, DPSMSeq2SeqConfig
from ...training.trainer import DPSMSeq2SeqTrainer, DPSMTrainer

#: Where in training a step is measured, as a share of its steps: late enough that every schedule mixes both scores.
PLACE = 0.75

# Optimizer steps of a training whose arguments do not say how many it has.
_STEPS = 1000

# Of a run's arguments these concern its folder, its data and its evaluations.
_LEFT_OUT = frozenset(
    {"output_dir", "resume_from_checkpoint", "report_to", "run_name", "push_to_hub", "hub_model_id", "hub_token"}
)


@dataclass(frozen=True)
class ParsedArguments:
    """The arguments of a run as its script reads them."""

    task: str
    model: Any
    data: Any
    training: Any

    @property
    def seq2seq(self) -> bool:
        """Return whether the task has sources and targets."""
        return self.task == "summarization"

    @property
    def max_steps(self) -> int:
        """Return the number of optimizer steps that the schedule is laid over."""
        return self.training.max_steps if self.training.max_steps > 0 else _STEPS


def parse_arguments(task: str, arguments: Mapping[str, Any], directory: Path) -> ParsedArguments:
    """Read a run's arguments as its script does, for a trainer that trains nothing and saves nothing.

    Args:
        task: of the campaign.
        arguments: of the run.
        directory: folder that stands in for its output.

    Raises:
        ValueError: for an argument that the script does not have, or does not take.
    """
    kinds: tuple[type, ...] = (
        (
            summarization_arguments.ModelArguments,
            summarization_arguments.DataTrainingArguments,
            OutcomeArguments,
            DPSMSeq2SeqConfig,
        )
        if task == "summarization"
        else (clm_arguments.ModelArguments, clm_arguments.DataTrainingArguments, OutcomeArguments, DPSMConfig)
    )
    kept = {name: value for name, value in arguments.items() if name not in _LEFT_OUT}
    words = [*command_line(kept), "--output_dir", str(directory), "--report_to", "none"]
    model, data, _, training = parse_script_arguments(kinds, words)
    training.eval_strategy = IntervalStrategy.NO
    training.load_best_model_at_end = training.fit_temperature = training.push_to_hub = False
    training.log_component_grad_norms = False
    training.disable_tqdm = True
    return ParsedArguments(task, model, data, training)


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Return arguments as the words of a command line; None is left out."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return words


def make_tokenizer(parsed: ParsedArguments, directory: Path, texts: Callable[[], Sequence[str]]) -> Any:
    """Return the tokenizer of a run; ``train-bpe`` is trained on the audit's own text, at the run's size.

    Args:
        parsed: the run's arguments.
        directory: where a trained one is kept.
        texts: the text.
    """
    model = parsed.model
    longest = parsed.data.max_source_length if parsed.seq2seq else parsed.data.block_size
    return resolve_tokenizer(
        model.tokenizer_name or model.model_name_or_path or "",
        output_dir=directory,
        training_texts=texts,
        vocab_size=model.tokenizer_vocab_size,
        sequence_template=parsed.seq2seq,
        model_max_length=longest or DEFAULT_MAX_LENGTH,
        cache_dir=model.cache_dir,
        revision=model.model_revision,
        token=model.token,
        trust_remote_code=model.trust_remote_code,
    )


def make_model(parsed: ParsedArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model of a run, with the weights that it would start from."""
    source = parsed.model.config_name or parsed.model.model_name_or_path
    options = {
        "cache_dir": parsed.model.cache_dir,
        "revision": parsed.model.model_revision,
        "token": parsed.model.token,
        "trust_remote_code": parsed.model.trust_remote_code,
    }
    if source is not None:
        config = AutoConfig.from_pretrained(source, **options)
    else:
        block_size = None if parsed.seq2seq else parsed.data.block_size
        config = build_config_from_scratch(
            parsed.model.model_type, parsed.model.config_overrides, tokenizer, block_size=block_size
        )
    auto: Any = AutoModelForSeq2SeqLM if parsed.seq2seq else AutoModelForCausalLM
    dtype = getattr(parsed.model, "dtype", None)
    if parsed.model.model_name_or_path is not None:
        model = auto.from_pretrained(parsed.model.model_name_or_path, config=config, dtype=dtype, **options)
    else:
        dtype = None if dtype == "auto" else dtype
        model = auto.from_config(config, dtype=dtype, trust_remote_code=parsed.model.trust_remote_code)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    if parsed.seq2seq:
        check_decoder_start(model, tokenizer)
        longest = max(parsed.data.max_source_length, parsed.data.max_target_length)
        fit_positions(model, longest, parsed.model.resize_position_embeddings)
    return model


@dataclass(frozen=True)
class Shape:
    """The shape of a batch.

    Args:
        sequences: rows.
        source: tokens of a row that the model reads.
        target: tokens of a summary; 0 for a language model, whose targets are its own tokens.
        tokens: of the batch, sources and summaries together; what is over at the end is not scored.
    """

    sequences: int
    source: int
    target: int
    tokens: int

    @classmethod
    def of(cls, parsed: ParsedArguments, longest: int, tokens: int) -> Shape:
        """Return the shape of a batch of so many tokens, in as few rows of equal length as the model takes.

        Args:
            parsed: a run's arguments. A summary has the share of its row that the run's longest summary has.
            longest: tokens of a row, see `longest_row`.
            tokens: of the batch.
        """
        sequences = -(-tokens // longest)
        return cls.rows(parsed, sequences, -(-tokens // sequences), tokens)

    @classmethod
    def rows(cls, parsed: ParsedArguments, sequences: int, length: int, tokens: int | None = None) -> Shape:
        """Return the shape of so many rows of a length; ``tokens`` where the last row is not full."""
        target = 0
        if parsed.seq2seq:
            data = parsed.data
            share = data.max_target_length / (data.max_source_length + data.max_target_length)
            target = min(length - 1, max(1, round(length * share)))
        return cls(sequences, length - target, target, sequences * length if tokens is None else tokens)

    @property
    def length(self) -> int:
        """Return the tokens of a row, its summary included."""
        return self.source + self.target


def longest_row(parsed: ParsedArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Return the tokens of a run's longest row, its summary included."""
    if parsed.seq2seq:
        return int(parsed.data.max_source_length + parsed.data.max_target_length)
    return clm_arguments.resolve_block_size(parsed.data.block_size, tokenizer, config)


def make_batches(ids: Tensor, shape: Shape, rows: int | None, device: torch.device) -> list[dict[str, Tensor]]:
    """Return one optimizer step's micro-batches of real text.

    Args:
        ids: enough tokens for the shape.
        shape: of the whole step.
        rows: of a micro-batch; None puts all into one.
        device: that they are put on.
    """
    text = ids[: shape.sequences * shape.length].view(shape.sequences, shape.length).to(device)
    source, labels = text[:, : shape.source].contiguous(), text[:, shape.source :].contiguous()
    if not shape.target:
        labels = source.clone()
    over = shape.sequences * shape.length - shape.tokens
    if over:
        labels[-1, labels.shape[1] - min(over, labels.shape[1]) :] = -100
    whole = {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels}
    size = rows or shape.sequences
    return [
        {name: value[start : start + size] for name, value in whole.items()}
        for start in range(0, shape.sequences, size)
    ]


class Steps:
    """Optimizer steps of several variations with one model.

    Args:
        task: of the campaign.
        runs: the arguments of each variation's run, by its name.
        tokenizer_folder: the tokenizer, or the name of one.

    Raises:
        ValueError: if the variations do not have one model and one precision in common.
    """

    def __init__(self, task: str, runs: Mapping[str, Mapping[str, Any]], tokenizer_folder: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._parsed = {name: parse_arguments(task, arguments, folder) for name, arguments in runs.items()}
        first = next(iter(self._parsed.values()))
        self._check_common()
        self.tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_folder, trust_remote_code=first.model.trust_remote_code
        )
        set_seed(first.training.seed)
        self.model = make_model(first, self.tokenizer)
        if first.training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(first.training.gradient_checkpointing_kwargs)
        self._trainers: dict[str, Any] = {}
        self._first: Any = None
        for name in self._parsed:
            self._trainers[name] = self._trainer(self._parsed[name])
        self.device: torch.device = first.training.device

    def _check_common(self) -> None:
        names = ("bf16", "fp16", "optim", "gradient_checkpointing", "torch_compile", "use_cpu")
        seen: dict[str, str] = {}
        for name, parsed in self._parsed.items():
            key = repr((parsed.model, [getattr(parsed.training, field) for field in names]))
            seen.setdefault(key, name)
        if len(seen) > 1:
            raise ValueError(
                f"the variations {', '.join(seen.values())} differ in their model or in {', '.join(names)}, so their "
                "steps cannot be compared; let variations differ in the arguments of the loss alone."
            )

    def _trainer(self, parsed: ParsedArguments) -> Any:
        kind: Any = DPSMSeq2SeqTrainer if parsed.seq2seq else DPSMTrainer
        trainer = kind(model=self.model, args=parsed.training, processing_class=self.tokenizer)
        if self._first is None:
            self._first = trainer
            trainer.create_optimizer()
            self.wrapped, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        # one accelerator: a second would wrap the model once more
        trainer.accelerator, trainer.optimizer = self._first.accelerator, self.optimizer
        trainer.model_wrapped = self.wrapped
        trainer.state.max_steps = parsed.max_steps
        trainer.state.global_step = int(PLACE * parsed.max_steps)
        return trainer

    @property
    def parsed(self) -> Mapping[str, ParsedArguments]:
        """Return the arguments of each variation."""
        return self._parsed

    @property
    def compiled(self) -> bool:
        """Return whether the model is compiled."""
        return bool(next(iter(self._parsed.values())).training.torch_compile)

    def alpha(self, name: str) -> float | None:
        """Return the weight of the Brier score in a variation's step; None where nothing is mixed."""
        alpha = self._trainers[name].alpha
        return None if alpha is None else float(alpha)

    def step(self, name: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Do one optimizer step of a variation.

        Args:
            name: of the variation.
            batches: the micro-batches.
        """
        trainer = self._trainers[name]
        trainer.current_gradient_accumulation_steps = len(batches)
        # as Trainer counts: of the labels of all micro-batches
        count = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum()
        for batch in batches:
            trainer.training_step(self.wrapped, dict(batch), num_items_in_batch=count)
        if trainer.args.max_grad_norm > 0:
            trainer.accelerator.clip_grad_norm_(self.wrapped.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.wrapped.zero_grad()

    def wait(self) -> None:
        """Wait until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
