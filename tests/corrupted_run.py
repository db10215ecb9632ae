"""Trainings on corrupted targets that remember what every row was fed and scored against, step by step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import default_data_collator

from dpsm_hf import CalibrationCallback, DPSMConfig, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from dpsm_hf.data.corruption import SummarySwaps, TargetFlips, replacement_weights
from dpsm_hf.training.corruption import Corruption
from tests.cases import FOLDER
from tests.tiny import SEQ2SEQ, VOCAB, make_data, make_model

STEPS = 4
KINDS = ("flips", "swaps", "both")
MODELS = ("gpt2", "bart", "t5")
#: (model, kind) that make sense
CASES = [(name, kind) for name in MODELS for kind in KINDS if name in SEQ2SEQ or kind == "flips"]


class RecordedFlips(TargetFlips):
    """Remembers the flipped targets of every call."""

    last: Tensor

    def __call__(self, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Flip, and keep the result."""
        flipped, changed = super().__call__(targets, step)
        self.last = flipped.detach().clone()
        return flipped, changed


class _Recording:
    """Keeps one entry for each trained row: (its input, its labels, what the decoder is fed, its targets)."""

    rows: dict[int, list[tuple[Any, ...]]]

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        fed: dict[str, Tensor] = {}

        def listen(module: nn.Module, positional: Any, named: dict[str, Any]) -> None:
            fed.update({key: value.detach().clone() for key, value in named.items() if isinstance(value, Tensor)})

        core = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        handle = core.register_forward_pre_hook(listen, with_kwargs=True)
        try:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            handle.remove()
        flips = self.corruption.flips  # type: ignore[attr-defined]
        first = 0 if "decoder_input_ids" in fed else 1
        scored = inputs["labels"][:, first:] if flips is None else flips.last
        for i, labels in enumerate(inputs["labels"]):
            decoder = kept(fed["decoder_input_ids"][i], labels != -100) if first == 0 else ()
            entry = (
                tuple(fed["input_ids"][i].tolist()), kept(labels, labels != -100), decoder,
                kept(scored[i], scored[i] != -100),
            )  # fmt: skip
            self.rows.setdefault(self.state.global_step, []).append(entry)  # type: ignore[attr-defined]
        return loss


def kept(values: Tensor, mask: Tensor) -> tuple[int, ...]:
    return tuple(values[mask].tolist())


class _Collator:
    """As wide as the longest summary of the batch, and with the decoder's input, as DataCollatorForSeq2Seq does it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch."""
        batch = default_data_collator(rows)
        width = max(sum(label != -100 for label in row["labels"]) for row in rows)
        batch["labels"] = batch["labels"][:, :width]
        batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch


class RecordingTrainer(_Recording, DPSMTrainer):
    """A `DPSMTrainer` that records."""


class RecordingSeq2SeqTrainer(_Recording, DPSMSeq2SeqTrainer):
    """A `DPSMSeq2SeqTrainer` that records."""


def corruption(kind: str, share: float = 0.3, steps: float = 0.5, swap: float = 0.4, seed: int = 5) -> Corruption:
    """What a kind corrupts."""
    weights = replacement_weights(VOCAB, (0, 1, 2))
    return Corruption(
        flips=RecordedFlips(share, weights, steps=steps, seed=seed) if kind in ("flips", "both") else None,
        swaps=SummarySwaps(swap, seed) if kind in ("swaps", "both") else None,
    )


def build(name: str, what: Corruption | None, micro_batch: int, accumulation: int, **arguments: Any) -> Any:
    """Return a recording trainer of a tiny model with `micro_batch` rows a process."""
    seq2seq = name in SEQ2SEQ
    trainer: Any = RecordingSeq2SeqTrainer if seq2seq else RecordingTrainer
    config: Any = DPSMSeq2SeqConfig if seq2seq else DPSMConfig
    defaults = dict(
        output_dir=tempfile.mkdtemp(dir=FOLDER.name), use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_steps=1, learning_rate=1e-2, dataloader_pin_memory=False, max_steps=STEPS,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    data = make_data(name, 16)
    args = config(**{**defaults, **arguments})
    made = trainer(model=make_model(name), args=args, train_dataset=data, eval_dataset=data, corruption=what)
    made.remove_callback(CalibrationCallback)
    made.rows = {}
    if seq2seq:
        made.data_collator = _Collator(made.model)
    return made


def result(trainer: Any) -> dict[str, Any]:
    """What a training did: its rows by step, its counts and its final parameters."""
    logs = [
        {
            key: entry[key]
            for key in ("step", "target_tokens", "flipped_tokens", "pairs", "swapped_summaries")
            if key in entry
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {
        "rows": trainer.rows,
        "logs": logs,
        "record": trainer.corruption_record(),
        "parameters": [p.detach().clone() for p in trainer.model.parameters()],
    }


def run(name: str, kind: str, micro_batch: int, accumulation: int, **arguments: Any) -> dict[str, Any]:
    """Train and return the `result`."""
    trainer = build(name, corruption(kind), micro_batch, accumulation, **arguments)
    trainer.train()
    return result(trainer)


def last_checkpoint(folder: Path) -> str:
    """The newest checkpoint of a folder."""
    return str(max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))
