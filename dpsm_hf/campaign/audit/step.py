"""A training step of each variation on the same text: one model and one optimizer that trainers take turns with.

The trainers are the real ones, with the arguments of the variation's own runs; a step is theirs: `training_step` for
each micro-batch, clipping, the optimizer. Only the text is the audit's, so that every variation has the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from ...runtime.files import write_json
from ...tasks import get_task
from ...tasks.model_building import load_saved_tokenizer
from ...tasks.task import Task

#: Where in training a step is measured, as a share of its steps: late enough that every schedule mixes both scores.
PLACE = 0.75
# Optimizer steps of a training whose arguments do not say how many it has.
_STEPS = 1000
# Of a run's arguments these concern its folder, its data and its evaluations.
_LEFT_OUT = frozenset(
    {"output_dir", "resume_from_checkpoint", "report_to", "run_name", "push_to_hub", "hub_model_id", "hub_token"}
)


def parse_arguments(task: str, arguments: Mapping[str, Any], directory: Path) -> Task:
    """Read a run's arguments as the task does, for a trainer that trains nothing and saves nothing.

    An argument that the task does not have, or does not take, is a ValueError.
    """
    kept = {name: value for name, value in arguments.items() if name not in _LEFT_OUT and value is not None}
    path = directory / "arguments.json"
    write_json({**kept, "output_dir": str(directory), "report_to": "none"}, path)
    run = get_task(task).parse([str(path)])
    path.unlink()
    training = run.training_args
    training.eval_strategy = IntervalStrategy.NO
    training.load_best_model_at_end = training.fit_temperature = training.push_to_hub = False
    training.log_component_grad_norms, training.disable_tqdm = False, True
    return run


@dataclass(frozen=True)
class Shape:
    """The shape of a batch."""

    sequences: int  # rows
    source: int  # tokens of a row that the model reads
    target: int  # tokens of a summary; 0 for a language model, whose targets are its own tokens
    tokens: int  # of the batch, sources and summaries together; what is over at the end is not scored

    @classmethod
    def of(cls, run: Task, longest: int, tokens: int) -> Shape:
        """Return the shape of a batch of so many tokens, in as few rows of equal length as the model takes.

        A summary has the share of its row that the run's longest summary has; ``longest`` is `Task.longest_row`.
        """
        sequences = -(-tokens // longest)
        return cls.rows(run, sequences, -(-tokens // sequences), tokens)

    @classmethod
    def rows(cls, run: Task, sequences: int, length: int, tokens: int | None = None) -> Shape:
        """Return the shape of so many rows of a length; ``tokens`` where the last row is not full."""
        target = 0
        if run.encoder_decoder:
            data = run.data_args
            share = data.max_target_length / (data.max_source_length + data.max_target_length)
            target = min(length - 1, max(1, round(length * share)))
        return cls(sequences, length - target, target, sequences * length if tokens is None else tokens)

    @property
    def length(self) -> int:
        """Return the tokens of a row, its summary included."""
        return self.source + self.target


def make_batches(ids: Tensor, shape: Shape, rows: int | None, device: torch.device) -> list[dict[str, Tensor]]:
    """Return one optimizer step's micro-batches, of so many rows each (None: all in one), of real text."""
    text = ids[: shape.sequences * shape.length].view(shape.sequences, shape.length).to(device)
    source, labels = text[:, : shape.source].contiguous(), text[:, shape.source :].contiguous()
    if not shape.target:
        labels = source.clone()
    if over := shape.sequences * shape.length - shape.tokens:
        labels[-1, labels.shape[1] - min(over, labels.shape[1]) :] = -100
    whole = {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels}
    parts = {name: value.split(rows or shape.sequences) for name, value in whole.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


class Steps:
    """Optimizer steps of several variations, given by their runs' arguments, with one model.

    Variations that do not have one model and one precision in common are a ValueError.
    """

    def __init__(self, task: str, runs: Mapping[str, Mapping[str, Any]], tokenizer_folder: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        #: The run of each variation.
        self.runs = {name: parse_arguments(task, arguments, folder) for name, arguments in runs.items()}
        first = next(iter(self.runs.values()))
        self._check_common()
        trusted = first.model_args.trust_remote_code
        self.tokenizer = load_saved_tokenizer(tokenizer_folder, trust_remote_code=trusted)
        set_seed(first.training_args.seed)
        self.model = first.load_model(self.tokenizer)
        if first.training_args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(first.training_args.gradient_checkpointing_kwargs)
        self._first: Any = None
        self._trainers = {name: self._trainer(run) for name, run in self.runs.items()}
        self.device: torch.device = first.training_args.device

    def _check_common(self) -> None:
        names = ("bf16", "fp16", "optim", "gradient_checkpointing", "torch_compile", "use_cpu")
        seen: dict[str, str] = {}
        for name, run in self.runs.items():
            seen.setdefault(repr((run.model_args, [getattr(run.training_args, key) for key in names])), name)
        if len(seen) > 1:
            raise ValueError(
                f"the variations {', '.join(seen.values())} differ in their model or in {', '.join(names)}, so their "
                "steps cannot be compared; let variations differ in the arguments of the loss alone."
            )

    def _trainer(self, run: Task) -> Any:
        args = run.training_args
        trainer = run.trainer_class(model=self.model, args=args, processing_class=self.tokenizer)
        if self._first is None:
            self._first = trainer
            trainer.create_optimizer()
            self.wrapped, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        # one accelerator: a second would wrap the model once more
        trainer.accelerator, trainer.optimizer = self._first.accelerator, self.optimizer
        trainer.model_wrapped = self.wrapped
        trainer.state.max_steps = args.max_steps if args.max_steps > 0 else _STEPS
        trainer.state.global_step = int(PLACE * trainer.state.max_steps)
        return trainer

    def alpha(self, name: str) -> float | None:
        """Return the weight of the Brier score in a variation's step; None where nothing is mixed."""
        alpha = self._trainers[name].alpha
        return None if alpha is None else float(alpha)

    def step(self, name: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Do one optimizer step of a variation."""
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
