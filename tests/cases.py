"""Training and evaluation cases that tests run in this process and `distributed/worker.py` in two."""

from __future__ import annotations

import functools
import gc
import tempfile
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from dpsm_hf import CalibrationCallback, DPSMConfig, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer
from tests.tiny import SEQ2SEQ, make_data, make_model


class _OwnFolder:
    """A folder that is made when it is first asked for and removed when this process ends.

    Not earlier: processes that are forked after the import (`tests.warm`) would share it, and the first to end would
    take it from the others.
    """

    @functools.cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    @property
    def name(self) -> str:
        return self._folder.name


FOLDER = _OwnFolder()

# Trainer collects garbage when it begins to train: leave the modules imported so far out of that
gc.freeze()

# Transformers 5.20 knows it as gradient checkpointing, 5.23 under both names
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)

# how 16 examples are cut: (micro-batch over all processes, accumulation steps)
SPLITS = ((16, 1), (4, 4), (2, 8))
SINGLE_SPLITS = ((16, 1), (4, 4), (1, 16))
EXACT_MODELS = ("gpt2", "llama", "bart", "t5", "pegasus")
EXACT_LOSSES = ("ce", "brier", "dpsm")


class _KeepGradient(TrainerCallback):
    gradient: torch.Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def build(name: str, *, stock: bool = False, rows: int = 16, dropout: float = 0.0, **arguments: Any) -> Trainer:
    """Return a trainer of a tiny model; `stock` is the Transformers one."""
    seq2seq = name in SEQ2SEQ
    config: Any
    if stock:
        trainer = Seq2SeqTrainer if seq2seq else Trainer
        config = Seq2SeqTrainingArguments if seq2seq else TrainingArguments
        for key in ("scoring_rule", "alpha_schedule", "alpha_end", "fused_head"):
            arguments.pop(key, None)
    else:
        trainer = DPSMSeq2SeqTrainer if seq2seq else DPSMTrainer
        config = DPSMSeq2SeqConfig if seq2seq else DPSMConfig
        arguments.setdefault("calibration_metrics", "all")
    defaults = dict(
        output_dir=tempfile.mkdtemp(dir=FOLDER.name), use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_steps=1, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    data = make_data(name, rows)
    args = config(**{**defaults, **arguments})
    made = trainer(model=make_model(name, dropout), args=args, train_dataset=data, eval_dataset=data)
    made.remove_callback(CalibrationCallback)  # half a second of drawing an evaluation; it has tests of its own
    return made


def one_step(
    name: str, scoring_rule: str, micro_batch: int, accumulation: int, *, stock: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Train one optimizer step on the same 16 examples and return its gradient and logged loss."""
    keep = _KeepGradient()
    mix = {"alpha_schedule": "constant", "alpha_end": 0.5} if scoring_rule == "dpsm" else {}
    trainer = build(
        name, stock=stock, scoring_rule=scoring_rule, max_steps=1, max_grad_norm=0.0,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
        **mix, **arguments,
    )  # fmt: skip
    trainer.add_callback(keep)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {"gradient": keep.gradient, "logs": logged}


def parameters_and_logs(name: str, *, stock: bool, **arguments: Any) -> dict[str, Any]:
    """Train a few steps with evaluation and return every parameter and log entry that is not a duration."""
    trainer = build(name, stock=stock, **{"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, **arguments})
    trainer.train()
    volatile = ("runtime", "per_second", "preparation", "seconds", "alpha_schedule")
    logs = [
        {key: value for key, value in entry.items() if not any(part in key for part in volatile)}
        for entry in trainer.state.log_history
    ]
    return {"parameters": [p.detach().clone() for p in trainer.model.parameters()], "logs": logs}


def evaluate_uneven(name: str, rows: int, batch: int) -> dict[str, Any]:
    """Evaluate a set that does not divide into batches and return the statistics and the metrics."""
    trainer = build(name, rows=rows, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    return {"state": trainer.calibration.state_dict(), "metrics": metrics}


def evaluate_panel(name: str, rows: int, batch: int, *, streaming: bool = False) -> dict[str, Any]:
    """Evaluate in float64 with everything that can be asked for; return every view and the metrics."""
    options: dict[str, Any] = {"classwise_tokens": 4, "expected_depth": True, "frequency_buckets": True}
    if name in SEQ2SEQ:
        options |= {"predict_with_generate": True, "generation_max_length": 6}
    trainer = build(name, rows=rows, per_device_eval_batch_size=batch, **options)
    if name in SEQ2SEQ:
        trainer.compute_metrics = lambda prediction: {}  # without one a Seq2SeqTrainer generates nothing
    trainer.model.double()
    data = make_data(name, rows)
    # the last scored label ends the text
    data = data.map(lambda row: {"labels": _ended(row["labels"])}, load_from_cache_file=False)
    trainer.fit_temperature(_predictable(trainer.model, name, rows - 2))
    metrics = trainer.evaluate(data.to_iterable_dataset() if streaming else data)
    panel = trainer.panel
    views = {view: getattr(panel, view).state_dict() for view in ("tokens", "eos", "scaled")}
    views["depth"] = {"count": panel.depth.count}
    views["frequency"] = panel.frequency.state_dict()
    views |= {f"scaled by {fit}": view.state_dict() for fit, view in panel.rescaled.items()}
    if panel.generated is not None:
        views["generated"] = panel.generated.state()
    classwise = {name: getattr(panel.classwise, name) for name in ("positive", "probability", "tokens_of_block")}
    volatile = ("runtime", "per_second", "preparation")
    timeless = {key: value for key, value in metrics.items() if not any(part in key for part in volatile)}
    return {"views": {**views, "classwise": classwise}, "metrics": timeless, "scaler": trainer.temperature_scaler}


def _predictable(model: Any, name: str, rows: int) -> Any:
    """Return rows whose every third label is what the model expects there; of chance alone no temperature is best."""
    data = make_data(name, rows, seed=5)
    columns = {key: torch.tensor(data[key]) for key in data.column_names}
    with torch.no_grad():
        expected = model.eval()(**columns).logits.argmax(-1)
    labels, shift = columns["labels"], int(name not in SEQ2SEQ)
    wanted = (torch.arange(labels.shape[1]) % 3 == shift) & (labels != -100)
    wanted[:, :shift] = False
    labels = torch.where(wanted, expected.roll(shift, 1), labels)
    return data.remove_columns("labels").add_column("labels", labels.tolist())


def _ended(labels: list[int]) -> list[int]:
    last = max(i for i, label in enumerate(labels) if label != -100)
    return [*labels[:last], 2, *labels[last + 1 :]]


def generate_uneven(rows: int, batch: int) -> int:
    """Evaluate by generation and return how many samples compute_metrics is given."""
    seen: list[int] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(len(prediction.predictions))
        return {}

    trainer = build(
        "bart", rows=rows, per_device_eval_batch_size=batch, predict_with_generate=True, generation_max_length=4
    )
    trainer.compute_metrics = compute_metrics
    trainer.evaluate()
    return seen[0]


def trained_after_evaluation(name: str) -> dict[str, Any]:
    """Train after an evaluation and a prediction; return whether all processes have the same weights, and theirs."""
    trainer = build(name, max_steps=3, per_device_train_batch_size=2)
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    everywhere = trainer.accelerator.gather(weights[None])
    return {"equal": bool((everywhere == everywhere[0]).all()), "processes": len(everywhere)}
