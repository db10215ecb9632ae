"""Callbacks: what will be trained, in one line, and calibration files and pictures at each evaluation."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..evaluation.panel import EvaluationPanel, names_in
from ..models.language_model import align_targets, label_alignment
from ..rules.losses import TokenScores, score_tokens
from ..rules.schedules import KnobSchedule
from ..runtime.distributed import sum_over_processes
from ..runtime.files import read_json, write_json
from .arguments import CALIBRATION_METRICS, RELIABILITY_DIAGRAMS, dpsm_arguments

if TYPE_CHECKING:
    from ..plots.reliability import ReliabilityDisplay

logger = logging.get_logger(__name__)

# of a file, in characters, leaving room for the step and the ending in the 255 bytes that file systems allow
_LONGEST_NAME = 50


class AlphaScheduleCallback(TrainerCallback):
    """Say in one line what will be trained, and warn where a schedule will not do what was meant.

    It warns when alpha never reaches ``alpha_end`` in this many steps, or another scheduled number its end, and when a
    resumed run resolves to other schedules than those its checkpoint was trained with. The first entry of
    ``state.log_history`` that is written afterwards holds the resolved schedule of alpha as ``alpha_schedule``, and
    those of other numbers as ``knob_schedules``.
    """

    def __init__(self) -> None:
        #: Whether the trainer calls `announce`, since only the first micro-batch shows whose loss is trained.
        self.waits = False
        #: The class of arguments that is named where plain ones were given.
        self.config_name = "DPSMConfig"
        self._said = ""
        self._unlogged: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Describe the schedule of this run."""
        if not self.waits:
            self.announce(args, state)

    def announce(self, args: TrainingArguments, state: TrainerState, loss_of: str | None = None) -> None:
        """Print what is trained (by ``loss_of``, if given), and warn of a schedule that is not what was meant."""
        if loss_of is not None:
            self._print(state, f"the loss is that of {loss_of}: scoring_rule and the alpha schedule have no effect")
            return
        dpsm, steps = dpsm_arguments(args), state.max_steps
        schedules = dpsm.schedules()
        fixed = "" if schedules else "a fixed rule, "
        described = {"alpha_schedule": f"scoring_rule {dpsm.scoring_rule}: {fixed}the alpha schedule is not used"}
        rest = ""
        if (alpha := schedules.pop("alpha", None)) is not None:
            described["alpha_schedule"] = alpha.describe(steps)
            rest = _after_the_ramp(alpha, steps)
            if not alpha.reaches_end(steps):
                logger.warning(
                    f"alpha never reaches alpha_end={alpha.options.end:g} in {steps} steps "
                    f"({described['alpha_schedule']}). Shorten alpha_warmup_steps or alpha_hold, or train longer."
                )
        for name, schedule in schedules.items():
            if not schedule.reaches_end(steps):
                logger.warning(
                    f"{name} never reaches its end={schedule.options.end:g} in {steps} steps "
                    f"({schedule.describe(steps)}). Shorten its warmup_steps or hold in knob_schedules, or train "
                    "longer."
                )
        if schedules:
            described["knob_schedules"] = "; ".join(schedule.describe(steps) for schedule in schedules.values())
            rest += f"; {described['knob_schedules']}"
        self._unlogged = {}
        for key, now in described.items():
            earlier = next((e[key] for e in reversed(state.log_history) if key in e), None)
            if earlier is not None and earlier != now:
                logger.warning(
                    f"the checkpoint was trained with another {key.replace('_', ' ')}: it was '{earlier}' and goes on "
                    f"as '{now}'. Resume with the arguments and max_steps of the first run to go on exactly."
                )
            if earlier != now:
                self._unlogged[key] = now
        plain = f". To change it: args={self.config_name}(scoring_rule=..., alpha_schedule=...)"
        where = "" if dpsm is args else plain
        self._print(state, described["alpha_schedule"] + rest + where)

    def _print(self, state: TrainerState, sentence: str) -> None:
        if state.is_world_process_zero and sentence != self._said:  # auto_find_batch_size begins again and again
            tqdm.write(f"DPSM | {sentence}")  # print would land behind the progress bar
        self._said = sentence

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Let the next training be announced too."""
        self._said = ""

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Add the schedules to the entry that was just written: not to what trackers draw as numbers."""
        if self._unlogged and state.log_history:
            entry: dict[str, Any] = state.log_history[-1]
            entry.update(self._unlogged)
            self._unlogged = {}


def _after_the_ramp(schedule: KnobSchedule, steps: int) -> str:
    """Return in words what is trained once alpha has arrived and stays; nothing where it does not."""
    end, span = schedule.options.end, schedule.resolve(steps)
    if steps < 1 or schedule.name == "feedback" or schedule(steps - 1, steps) != end:
        return ""
    arrival = next(
        (s for s in (0, span.hold, span.hold + span.warmup) if s < steps and schedule(s, steps) == end), None
    )
    if arrival is None:
        return ""
    kind = {0.0: "cross-entropy", 1.0: "the Brier score"}.get(end, f"{1 - end:g} * cross-entropy + {end:g} * Brier")
    return f"; from step {arrival} on {kind} alone ({1 - arrival / steps:.0%} of training)"


def _file_name(prefix: str) -> str:
    """Return a name for files from that of an evaluation set, say a hub data set's; no two sets share one."""
    name = re.sub(r"[^\w.-]+", "_", prefix)[:_LONGEST_NAME]
    return name if name == prefix else f"{name}-{zlib.crc32(prefix.encode()):08x}"


def _best_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """Return the step of the best evaluation; None without ``metric_for_best_model``."""
    if state.best_global_step is not None or state.best_metric is None:
        return state.best_global_step
    key = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"  # no checkpoint is saved of any
    return next((int(e["step"]) for e in state.log_history if e.get(key) == state.best_metric), None)


def calibration_record(panel: EvaluationPanel, prefix: str, step: int, bins: int) -> dict[str, Any]:
    """Return what a file of `CalibrationCallback` holds; ``step`` is how long the weights were trained."""
    return {"schema": 2, "step": step, "split": prefix, **panel.record(bins)}


class CalibrationCallback(TrainerCallback):
    """Write all metrics and the data of the reliability diagram to ``output_dir/calibration/`` at each evaluation.

    The diagram itself is drawn of the last and the best evaluation of a training, when it ends, and of every one
    outside of a training. In a `DPSMTrainer` the callback is handed what the evaluation saw. In any other Trainer it
    listens to the model: a forward hook scores the logits of each evaluation batch against its labels and the metrics
    are added to what ``evaluate`` returns. The picture goes to Weights & Biases and TensorBoard when the Trainer
    reports to them.

    Args:
        bins: equal-width bins of the diagram; the default is ``calibration_bins`` of the arguments, or 15.
        metrics: what is added to ``evaluate`` of another Trainer, ``"core"`` or ``"all"``; the default is
            ``calibration_metrics`` of the arguments, or core.
        diagrams: which evaluations are drawn, ``"final"``, ``"all"`` or ``"none"``; the default is
            ``reliability_diagrams`` of the arguments, or final.

    Raises:
        ValueError: for another word.
    """

    def __init__(self, bins: int | None = None, *, metrics: str | None = None, diagrams: str | None = None) -> None:
        for name, value, known in (
            ("metrics", metrics, CALIBRATION_METRICS),
            ("diagrams", diagrams, RELIABILITY_DIAGRAMS),
        ):
            if value is not None and value not in known:
                raise ValueError(
                    f"CalibrationCallback: {name}={value!r} is unknown; choose one of {', '.join(known)}."
                )
        self.bins = bins
        self.metrics = metrics
        self.diagrams = diagrams
        self._panel: EvaluationPanel | None = None
        self._batch: tuple[TokenScores, Tensor, int] | None = None
        self._loader: Any = None
        self._prefix = "eval"
        self._listens = True
        self._hook: Any = None
        self._tensorboard: Any = None
        self._training = False
        #: What the last file of each set holds, by its prefix; on the main process.
        self.records: dict[str, dict[str, Any]] = {}
        #: What the last file holds; on the main process.
        self.record: dict[str, Any] | None = None

    # ---- where the statistics come from ----------------------------------------------------------------------------

    def receive(self, panel: EvaluationPanel, prefix: str, tensorboard: Any = None) -> None:
        """Take the statistics of the evaluation that is about to be reported, complete over all processes."""
        self.stop_listening()  # one added after the trainer was made still does
        self._panel, self._prefix = panel, prefix
        self._tensorboard = tensorboard or self._tensorboard

    def stop_listening(self) -> None:
        """Leave scoring to the trainer."""
        self._listens = False
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _listen(self, model: nn.Module | None) -> None:
        if self._listens and self._hook is None and model is not None:
            self._hook = model.register_forward_hook(self._score, with_kwargs=True)

    def _score(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        labels = kwargs.get("labels")
        if model.training or labels is None or not isinstance(output, Mapping):
            return
        alignment, logits = label_alignment(model), output.get("logits")
        if alignment is None or logits is None:
            return
        targets = align_targets(labels, logits.shape[-2], alignment)
        self._batch = score_tokens(logits.detach(), targets, varentropy=True), targets, labels.shape[0]

    def on_prediction_step(self, *_: Any, **kwargs: Any) -> None:
        """Add the batch that was just scored; calls of the model outside of an evaluation are not counted."""
        loader = kwargs.get("eval_dataloader")
        if self._loader is not loader:  # the evaluation before this one may have been interrupted
            self._panel, self._loader = None, loader
        batch, self._batch = self._batch, None
        if batch is None:
            return
        try:
            self._panel = self._panel or EvaluationPanel()
            self._panel.add(*batch)
        except FloatingPointError as error:  # a Trainer reports eval_loss nan and goes on
            logger.warning_once(f"CalibrationCallback leaves this batch out: {error}")

    def on_init_end(self, *_: Any, **kwargs: Any) -> None:
        """Begin to listen to the model of this trainer."""
        self._listens = True
        self._remove_hook()
        self._listen(kwargs.get("model"))

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """Listen to the model that is trained, which model_init may just have made."""
        self._training = True
        self._remove_hook()
        self._listen(kwargs.get("model"))

    def on_predict(self, *_: Any, **kwargs: Any) -> None:
        """Forget what `Trainer.predict` scored: it belongs to no evaluation."""
        self._panel = self._loader = None

    # ---- what is written -------------------------------------------------------------------------------------------

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Write the files of this evaluation."""
        metrics = kwargs.get("metrics")
        panel, self._panel = self._panel or EvaluationPanel(), None
        self._loader = None
        if self._listens:
            panel.reduce(sum_over_processes, args.device)
            if not panel.tokens.tokens:
                logger.warning(
                    "CalibrationCallback saw no scored token in this evaluation: the model was called without labels "
                    "(label smoothing and compute_loss_func do that), every label is ignored, or it is not known "
                    "which label a row of its logits predicts. DPSMTrainer needs none of this."
                )
            if metrics is not None and panel.tokens.tokens:
                # the shortest: compute_metrics may have returned a loss of its own, eval_<name>_loss
                losses = [key for key in metrics if key.endswith("_loss")]
                self._prefix = min(losses, key=len, default="eval_loss").removesuffix("_loss")
                shown = panel.metrics() if self._metrics_of(args) == "all" else self._core(panel, args)
                found = {f"{self._prefix}_{name}": value for name, value in shown.items()}
                metrics.update({key: value for key, value in found.items() if key not in metrics})
        if not state.is_world_process_zero or not panel.tokens.tokens:
            return
        bins = self.bins or int(getattr(args, "calibration_bins", 15))
        record = self.record = calibration_record(panel, self._prefix, state.global_step, bins)
        self.records[self._prefix] = record
        path = self._file(args, self._prefix, state.global_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").unlink(missing_ok=True)  # of an earlier run: it would not show this evaluation
        write_json(record, path)
        del panel  # Matplotlib's first picture leaves this frame in a cycle, which would hold 20 MB for a while
        if self._diagrams_of(args) == "all" or not self._training:
            self._draw(args, state, record)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Draw the last and the best evaluation of the training; the record becomes that of the weights that stay."""
        self._training = False
        if not state.is_world_process_zero:
            return
        best = _best_step(args, state)
        for prefix, last in list(self.records.items()):
            records = [last]
            if best is not None and best != last["step"] and (path := self._file(args, prefix, best)).exists():
                records.append(read_json(path))
                if args.load_best_model_at_end:
                    self.records[prefix] = records[-1]
            for record in records:
                if not self._file(args, prefix, record["step"]).with_suffix(".png").exists():
                    self._draw(args, state, record)

    def interrupted(self) -> None:
        """Take note that a training ended with an error: what is evaluated from now on is not part of it."""
        self._training = False

    def picture_of(self, args: TrainingArguments, record: Mapping[str, Any]) -> Path | None:
        """Return the file of the diagram of an evaluation; None where it was not drawn."""
        picture = self._file(args, record["split"], record["step"]).with_suffix(".png")
        return picture if picture.exists() else None

    @staticmethod
    def _file(args: TrainingArguments, prefix: str, step: int) -> Path:
        return Path(str(args.output_dir)) / "calibration" / f"{_file_name(prefix)}-step-{step:06d}.json"

    def _metrics_of(self, args: TrainingArguments) -> str:
        return self.metrics or str(getattr(args, "calibration_metrics", "core"))

    def _diagrams_of(self, args: TrainingArguments) -> str:
        return self.diagrams or str(getattr(args, "reliability_diagrams", "final"))

    @staticmethod
    def _core(panel: EvaluationPanel, args: TrainingArguments) -> dict[str, float]:
        return panel.core_metrics(names_in(args.metric_for_best_model or ""))

    def _draw(self, args: TrainingArguments, state: TrainerState, record: Mapping[str, Any]) -> None:
        """Draw an evaluation beside its file, and send the picture to where the Trainer reports to."""
        if self._diagrams_of(args) == "none":
            return
        from ..plots.reliability import ReliabilityDisplay  # Matplotlib, which takes a second and need not be there

        trained = record["step"] > 0 or state.max_steps > 0
        display = ReliabilityDisplay.from_json(record, name=f"step {record['step']}" if trained else "")
        picture = display.save(self._file(args, record["split"], record["step"]).with_suffix(".png"))
        self._send(args, record, display, picture)

    def _send(
        self, args: TrainingArguments, record: Mapping[str, Any], display: ReliabilityDisplay, picture: Path
    ) -> None:
        report_to = args.report_to if isinstance(args.report_to, list) else [args.report_to]
        tag = f"{record['split']}/reliability_diagram"
        if "wandb" in report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({tag: wandb.Image(str(picture)), "train/global_step": record["step"]})
        if "tensorboard" in report_to:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(log_dir=str(Path(str(args.output_dir)) / "runs" / "calibration"))
            self._tensorboard.add_figure(tag, display.figure_, record["step"])
            self._tensorboard.flush()
