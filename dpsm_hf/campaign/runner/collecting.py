"""Collect what a training script has left in a run's folder into the run's record."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runtime.child_process import STARTED_NAME
from ...runtime.files import read_json, strict
from ...training.clock import seconds_trained
from .records import RECORD_NAME, STATUSES, Record, read_if_whole, read_record

OUTCOME_NAME = "outcome.json"
RESULTS_NAME = "all_results.json"
STATE_NAME = "trainer_state.json"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "adapter_model*")
_SPLITS = {"eval": "validation", "test": "test", "predict": "test"}


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and folder of each checkpoint of a run, newest first, without those that a kill left incomplete."""
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for step in sorted(found, reverse=True):
        if "global_step" in read_if_whole(found[step] / STATE_NAME):
            yield step, found[step]


def newest_state(folder: Path) -> Mapping[str, Any]:
    """Return the newest state of the Trainer: that of the finished run or of its newest checkpoint; else empty."""
    own = read_if_whole(folder / STATE_NAME)
    newer = next((read_if_whole(path / STATE_NAME) for _, path in checkpoints(folder)), {})
    return own if own.get("global_step", -1) >= newer.get("global_step", -1) else newer


def reached_step(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    return next((step for step, _ in checkpoints(folder)), 0)


def begun_at(folder: Path) -> int | None:
    """Return the step from which the script of the last attempt says it resumed; None if it has not said so.

    It differs from `reached_step` if the newest checkpoint was damaged.
    """
    step = read_if_whole(folder / STARTED_NAME).get("from_step")
    return step if isinstance(step, int) else None


def is_finished(folder: Path, ended_well: bool = False) -> bool:
    """Return whether the script has run to its end: it writes its outcome last, atomically.

    With ``ended_well``, for a script with exit code 0, the Trainer's results count too: it did not merely pause.
    """
    return (folder / OUTCOME_NAME).exists() or (ended_well and (folder / RESULTS_NAME).exists())


def forget_results(folder: Path) -> None:
    """Delete the result files of earlier attempts, so that those found later are the last attempt's."""
    for name in (OUTCOME_NAME, RESULTS_NAME, STATE_NAME, STARTED_NAME):
        (folder / name).unlink(missing_ok=True)


def clean_folder(folder: Path, keep_checkpoints: bool, keep_model: bool) -> None:
    """Delete the large files of a settled run: checkpoints and weights, unless they are to be kept."""
    for path in () if keep_checkpoints else folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in () if keep_model else _WEIGHTS:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def collect(record: Record, folder: Path, *, logged: bool = False) -> Record:
    """Return a record with the results in its folder: the final ones if there are any, else the log so far.

    Args:
        record: the record so far; what the runner measured is kept.
        folder: of the run.
        logged: without final results, take the metrics of the last evaluation in the log.

    Raises:
        ValueError: for a file that is not JSON.
    """
    history = newest_state(folder).get("log_history", [])
    if is_finished(folder):
        outcome = read_json(folder / OUTCOME_NAME)
    elif (folder / RESULTS_NAME).exists() and (folder / STATE_NAME).exists():
        outcome = _outcome_of_files(folder, read_if_whole(folder / RESULTS_NAME), history)
    else:
        evaluated = (entry for entry in reversed(history) if "eval_nll" in entry or "eval_loss" in entry)
        outcome = _outcome_of_files(folder, next(evaluated, {}), history) if logged else {}
    measured = {key: value for key, value in (outcome.get("efficiency") or {}).items() if value is not None}
    efficiency = {**record.efficiency, "train_seconds": seconds_trained(history), **measured}
    found: dict[str, Any] = {"best_step": outcome.get("best_step"), "samples": outcome.get("samples") or ()}
    found |= {name: outcome.get(name) or {} for name in ("metrics", "calibration", "documents", "corruption")}
    return replace(record, history=strict(history), efficiency=efficiency, **found)


def read_run(folder: str | Path) -> Record:
    """Read the record of a run from its folder in a campaign, or make one from the ``output_dir`` of any Trainer.

    For the latter, the log history, the results and the calibration files are read, and a ``run.json`` if you have
    written one beside them, with any of ``name``, ``scoring_rule``, ``status`` (``finished`` or ``failed``),
    ``message``, ``seed``, ``command``, ``versions``, ``seconds``, ``cpu_seconds``, ``peak_memory_mb``.

    Raises:
        ValueError: the folder does not exist, holds no run, or holds a file that is not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory; give the output_dir of a finished run.")
    if (folder / RECORD_NAME).exists():
        return read_record(folder / RECORD_NAME)
    run, state = (read_json(folder / name) if (folder / name).exists() else {} for name in ("run.json", STATE_NAME))
    if not run and not state:
        raise ValueError(f"{folder} holds neither {STATE_NAME} nor run.json; give the output_dir of a run.")
    name, ended = str(run.get("name", folder.name)), str(run.get("status", "finished"))
    rule = run.get("scoring_rule", run.get("loss_type", name))  # the second is the former name
    record = Record(
        name, name, "", {"scoring_rule": str(rule), "seed": run.get("seed")},
        status="ok" if ended == "finished" else ended if ended in STATUSES else "failed",
        message=str(run.get("message", "")), command=run.get("command", ()),
        attempts=[{key: run.get(key) for key in ("seconds", "exit_code")}],
        machine={"versions": run.get("versions", {})},
        efficiency={key: run.get(key) for key in ("cpu_seconds", "peak_memory_mb")},
    )  # fmt: skip
    record = collect(record, folder, logged=True)
    why = diverged(record) if record.status == "ok" else None
    return record if why is None else replace(record, status="diverged", message=why)


def _outcome_of_files(
    folder: Path, results: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return an outcome made from the files of the Trainer and of the callbacks, as far as they go."""
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        prefix, _, name = key.partition("_")
        if prefix in _SPLITS and isinstance(value, (int, float)):
            metrics.setdefault(_SPLITS[prefix], {})[name] = value
    calibration: dict[str, Any] = {}
    for path in sorted((folder / "calibration").glob("*.json")):  # by split, then by step
        content = read_if_whole(path)
        if content.get("split") in _SPLITS:
            calibration[_SPLITS[content["split"]]] = content
    for split, content in calibration.items():
        shown, reported = metrics.get(split, {}), content.get("reported", {})
        if shown and shown.get("nll") == reported.get("nll"):  # the same evaluation, of which the log shows a part
            metrics[split] = {**reported, **shown}
    speeds = [entry["tokens_per_second"] for entry in history if entry.get("tokens_per_second") is not None]
    speed = statistics.median(speeds) if speeds else None
    efficiency = {"tokens_per_second": speed, "steps": newest_state(folder).get("global_step")}
    last = {"last": strict(metrics)} if metrics else {}
    return {"metrics": last, "efficiency": efficiency, "calibration": calibration}


def diverged(record: Record) -> str | None:
    """Return a sentence on the first result of a finished run that is not finite; None if all are finite."""
    for split, figures in record.metrics.get("last", {}).items():
        for name in ("nll", "loss"):
            if name in figures and figures[name] is None:
                return f"its {name} on the {split} split is not finite at the end"
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    return "its training loss is not finite at the end" if losses and losses[-1] is None else None
