"""How a run is launched: arguments, command line and environment of its training script; facts about the machine.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...runtime.child_process import RUNNER_VARIABLE
from ...runtime.environment import ROOT, versions
from ...runtime.processor import processor_name
from ...tasks import TASKS
from ..spec.design import TRACKERS, Campaign, Run
from .lock import LAUNCHER, RunnerError
from .records import Record

SETTINGS_NAME = "settings.json"
LOG_NAME = "log.txt"

#: Arguments of Python that start the program ``dpsm``, whose commands are the tasks.
PROGRAM = ("-m", "dpsm_hf")

_PLACEHOLDER = re.compile(r"\{(run:([^{}]+)|campaign)\}")


@dataclass(frozen=True)
class Workplace:
    """What all runs of a campaign share: the campaign, its folder, the runs' names and their current records by id."""

    campaign: Campaign
    directory: Path
    names: Mapping[str, str]
    records: dict[str, Record]
    threads: int = 1


def run_folder(directory: Path, run_id: str) -> Path:
    """Return the folder of a run."""
    return directory / "runs" / run_id


def fill_in(value: Any, directory: Path) -> Any:
    """Replace ``{run:ID}`` by that run's folder and ``{campaign}`` by the campaign's, in strings at any depth."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda found: str(run_folder(directory, found[2]) if found[2] else directory), value)
    if isinstance(value, Mapping):
        return {key: fill_in(item, directory) for key, item in value.items()}
    return [fill_in(item, directory) for item in value] if isinstance(value, (list, tuple)) else value


def script_settings(
    campaign: Campaign, run: Run, name: str, directory: Path, tokenizer: Path | None = None, stop: float | None = None
) -> dict[str, Any]:
    """Return all arguments of a run's script: its own, and those that the campaign adds for saving, logging, tracking.

    Args:
        campaign: the campaign.
        run: the run.
        name: of the run, shown in trackers.
        directory: of the campaign.
        tokenizer: folder of the shared tokenizer, which replaces ``train-bpe``.
        stop: step, or share of the steps, to pause at; None runs to the end.
    """
    own = fill_in(run.arguments, directory)
    # A killed run needs a checkpoint to resume from. Saved at evaluations, so that the best one can be kept.
    by_steps = own.get("eval_strategy") == "steps"
    every = own.get("eval_steps", own.get("logging_steps", 500)) if by_steps else 0.1
    keeping = {"save_strategy": "steps", "save_total_limit": 2, "save_steps": every}
    if own.get("save_strategy", "steps") != "steps" or "save_steps" in own:
        keeping = {"save_total_limit": 2}
    settings: dict[str, Any] = {**keeping, "disable_tqdm": True, "log_level": "warning", **own}
    if tokenizer is not None:
        settings["tokenizer_name"] = str(tokenizer)
        settings.pop("tokenizer_vocab_size", None)
    if stop is not None:
        settings["stop_at_step"] = stop
    settings |= {"output_dir": str(run_folder(directory, run.id)), "report_to": list(campaign.track) or "none"}
    settings["run_name"] = name
    if "trackio" in campaign.track:
        settings.setdefault("project", _group(campaign))
    return settings


def launch_command(run: Run, settings: Path, threads: int) -> list[str]:
    """Return the command line of a run; its options override the user's own accelerate configuration."""
    options = f"--num_processes {run.processes} --num_machines 1 --num_cpu_threads_per_process {threads}"
    options += " --mixed_precision no --dynamo_backend no --main_process_port 0"  # the Trainer's own arguments decide
    several = ["--multi_gpu"] if run.processes > 1 else []
    program = [*PROGRAM, TASKS[run.task].command, str(settings)]
    return [sys.executable, "-m", LAUNCHER, *several, *options.split(), *program]


def shown_command(command: Sequence[str], directory: Path) -> list[str]:
    """Return a command line for a record: its paths are relative to the campaign's folder, not of this machine."""

    def shown(word: str) -> str:
        path = Path(word)
        if word == sys.executable or not path.is_absolute():
            return "python" if word == sys.executable else word
        return str(path.relative_to(directory)) if path.is_relative_to(directory) else path.name

    return list(map(shown, command))


def launch_environment(
    campaign: Campaign, run: Run, name: str, directory: Path, *, devices: Sequence[str] = (), threads: int = 1
) -> dict[str, str]:
    """Return the environment variables that a run gets in addition to the runner's."""
    added = {RUNNER_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
    if devices:
        added["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    # by default waiting threads spin, which slows down other runs on the same cores
    defaults = {"TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": "30000"}
    if "wandb" in campaign.track:
        added |= {"WANDB_RUN_GROUP": _group(campaign), "WANDB_RUN_ID": f"{_group(campaign)}-{run.id}"}
        # a resumed run continues the same run in W&B
        defaults |= {"WANDB_PROJECT": campaign.name, "WANDB_RESUME": "allow", "WANDB_DIR": str(directory)}
    if "tensorboard" in campaign.track:
        added["TENSORBOARD_LOGGING_DIR"] = str(directory / "tensorboard" / name)
    if "trackio" in campaign.track:
        defaults["TRACKIO_DIR"] = str(directory / "trackio")
    return added | {key: os.environ.get(key, value) for key, value in defaults.items()}


def _group(campaign: Campaign) -> str:
    return f"{campaign.name}-{campaign.scale}"


def check_campaign(campaign: Campaign, directory: Path) -> None:
    """Check a campaign, before its first run starts, for mistakes that would make runs fail.

    Raises:
        RunnerError: for an unknown tracker, braces in the directory's name, or a run that starts from an unknown one.
    """
    for tracker in campaign.track:
        if tracker not in TRACKERS:
            raise RunnerError(f"track: {tracker!r} is unknown; choose one of {', '.join(TRACKERS)}.")
    if any(character in str(directory) for character in "{}"):
        raise RunnerError(f"{directory} has braces in its name, which mark placeholders in arguments: rename it.")
    for run_id, run in campaign.runs.items():
        for needed in run.needs:
            if needed not in campaign.runs:
                raise RunnerError(f"Run {run_id} starts from {{run:{needed}}}, which this campaign does not have.")


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine_facts(devices: Sequence[str] = (), root: Path = ROOT) -> dict[str, Any]:
    """Return ``device``, ``versions`` and ``cores``, and ``commit`` and ``dirty`` for a git checkout."""
    names = gpu_names()
    device = ", ".join(names.get(d, f"GPU {d}") for d in devices) if devices else processor_name()
    return {"device": device, "cores": cores(), "versions": versions(), **code_state(root)}


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def gpu_names() -> dict[str, str]:
    """Return the names of the NVIDIA GPUs by index; empty if there are none."""
    listed = _output(["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader"])
    pairs = (line.split(",", 1) for line in (listed or "").splitlines() if "," in line)
    return {index.strip(): name.strip() for index, name in pairs}


def visible_devices() -> tuple[str, ...]:
    """Return the GPUs that runs may use: those of CUDA_VISIBLE_DEVICES, or all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part.strip() for part in named.split(",") if part.strip() and part.strip() != "-1")
    return tuple(gpu_names())


def code_state(root: Path) -> dict[str, Any]:
    """Return ``commit`` and ``dirty`` of a git checkout; empty if the folder is not the top of one."""
    git = ("git", "-C", str(root))
    top, _, commit = (_output([*git, "rev-parse", "--show-toplevel", "HEAD"]) or "").partition("\n")
    # a package installed somewhere below another project's checkout does not belong to it
    if not commit or Path(top).resolve() != root.resolve():
        return {}
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": bool(changed)} if changed is not None else {}


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
