"""`Steps`: training steps of several variations on the same text, with one model and one optimizer for all.

The trainers are the real ones, with the arguments of the variation's own runs. A step is a real one, too:
`training_step` for each micro-batch, clipping, the optimizer. Only the text is the audit's own.
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

#: The point of training at which a step is measured, as a share of its steps: late enough for alpha to be above 0.
PLACE = 0.75
# Optimizer steps to assume for a training whose arguments do not give a number.
_STEPS = 1000
# Arguments of a run that concern its folder, trackers and the hub.
_LEFT_OUT = frozenset(
    {"output_dir", "resume_from_checkpoint", "report_to", "run_name", "push_to_hub", "hub_model_id", "hub_token"}
)


def parse_arguments(task: str, arguments: Mapping[str, Any], directory: Path) -> Task:
    """Return a task with a run's arguments, changed so that its trainer does not evaluate.

    Args:
        task: name of the task.
        arguments: of the run.
        directory: becomes ``output_dir``.

    Raises:
        ValueError: for an argument that the task does not have or does not accept.
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
    source: int  # input tokens of a row
    target: int  # tokens of a summary; 0 for a language model, whose targets are its inputs
    tokens: int  # in the batch, sources and summaries together; any more in the last row are not scored

    @classmethod
    def of(cls, run: Task, longest: int, tokens: int) -> Shape:
        """Return the shape of a batch of so many tokens, in as few rows of equal length as the model can take.

        Args:
            run: the run, whose longest source and summary determine how a row is divided between the two.
            longest: tokens of the longest row that the model can take, from `Task.longest_row`.
            tokens: of the batch.
        """
        sequences = -(-tokens // longest)
        return cls.rows(run, sequences, -(-tokens // sequences), tokens)

    @classmethod
    def rows(cls, run: Task, sequences: int, length: int, tokens: int | None = None) -> Shape:
        """Return the shape of so many rows of a length; give ``tokens`` if the last row is not full."""
        target = 0
        if run.encoder_decoder:
            data = run.data_args
            share = data.max_target_length / (data.max_source_length + data.max_target_length)
            target = min(length - 1, max(1, round(length * share)))
        return cls(sequences, length - target, target, sequences * length if tokens is None else tokens)

    @property
    def length(self) -> int:
        """Return the tokens of a row, including its summary."""
        return self.source + self.target


def make_batches(ids: Tensor, shape: Shape, rows: int | None, device: torch.device) -> list[dict[str, Tensor]]:
    """Return one optimizer step's micro-batches, each of ``rows`` rows (None makes one of all), from token ids."""
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
    """Optimizer steps of several variations with one model.

    Args:
        task: name of the task.
        runs: arguments of one run of each variation.
        tokenizer_folder: the saved tokenizer.

    Raises:
        ValueError: if the variations differ in model or precision.
    """

    def __init__(self, task: str, runs: Mapping[str, Mapping[str, Any]], tokenizer_folder: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        #: The task of each variation, with its arguments.
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
                "steps cannot be compared; let variations differ only in the arguments of the loss."
            )

    def _trainer(self, run: Task) -> Any:
        args = run.training_args
        trainer = run.trainer_class(model=self.model, args=args, processing_class=self.tokenizer)
        if self._first is None:
            self._first = trainer
            trainer.create_optimizer()
            self.wrapped, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        # one accelerator for all, as a second one would wrap the model again
        trainer.accelerator, trainer.optimizer = self._first.accelerator, self.optimizer
        trainer.model_wrapped = self.wrapped
        trainer.state.max_steps = args.max_steps if args.max_steps > 0 else _STEPS
        trainer.state.global_step = int(PLACE * trainer.state.max_steps)
        return trainer

    def alpha(self, name: str) -> float | None:
        """Return the weight of the Brier score in a variation's step; None unless its rule is ``dpsm``."""
        alpha = self._trainers[name].alpha
        return None if alpha is None else float(alpha)

    def step(self, name: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Do one optimizer step of a variation."""
        trainer = self._trainers[name]
        trainer.current_gradient_accumulation_steps = len(batches)
        # counted as Trainer does, over all micro-batches
        count = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum()
        for batch in batches:
            trainer.training_step(self.wrapped, dict(batch), num_items_in_batch=count)
        if trainer.args.max_grad_norm > 0:
            trainer.accelerator.clip_grad_norm_(self.wrapped.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.wrapped.zero_grad()

    def wait(self) -> None:
        """Synchronise with the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
