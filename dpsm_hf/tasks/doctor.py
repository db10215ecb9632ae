"""The command ``dpsm doctor``: what is installed on this machine, and which path a given model would take.

    dpsm doctor
    dpsm doctor --model openai-community/gpt2 --json

No weights are downloaded: a model is made from its configuration, one layer deep, with random weights. A package that
is broken is a line of the report. The exit code is 0 unless something was found that training would stop at.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from ..runtime.processor import processor_fact, processor_name
from ..version import __version__

#: What training needs, with the oldest and the newest version that the tests were run with.
TESTED: Mapping[str, tuple[str, str]] = {
    "torch": ("2.8.0", "2.13.0"),
    "transformers": ("5.18.0", "5.23.0"),
    "accelerate": ("1.12.0", "1.15.0"),
    "datasets": ("4.5.0", "5.2.0"),
    "peft": ("0.19.0", "0.21.2"),
}
#: What one feature needs: the package, the module that is imported, and what it is for.
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "trl": ("trl", "TRL's trainers"),
    "triton": ("triton", "the CUDA kernel of the fused head"),
    "deepspeed": ("deepspeed", "--deepspeed"),
    "optuna": ("optuna", "hyperparameter_search"),
    "bitsandbytes": ("bitsandbytes", "4-bit and 8-bit weights"),
    "nvidia-ml-py": ("pynvml", "the energy that a GPU takes"),
}
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "clearml", "swanlab")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_LEAST_FREE_GB = 1.0
_WORDS = {"ok": "  ", "warning": "! ", "error": "X "}


class Report:
    """Findings under headings; what cannot be found out is a finding too."""

    def __init__(self) -> None:
        self.parts: dict[str, list[dict[str, str]]] = {}

    def add(self, part: str, name: str, said: str, state: str = "ok") -> None:
        """Note a finding; its state is ok, warning, or error where training would stop."""
        self.parts.setdefault(part, []).append({"name": name, "said": said, "state": state})

    def ask(self, part: str, question: Callable[[], None]) -> None:
        """Ask a question that notes its findings; whatever it fails with becomes one."""
        try:
            question()
        except Exception as error:
            self.add(part, "unknown", f"could not be found out: {_one_line(error)}", "error")

    @property
    def sound(self) -> bool:
        """Return whether nothing was found that training would stop at."""
        return all(line["state"] != "error" for lines in self.parts.values() for line in lines)

    def text(self) -> str:
        """Return the report for people."""
        lines = []
        for part, found in self.parts.items():
            lines.append(f"{part}")
            lines += [f"{_WORDS[line['state']]}{line['name']:<15} {line['said']}" for line in found]
            lines.append("")
        lines.append("! is worth a look, X would stop training." if not self.sound else "Nothing stands in the way.")
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 0, or 1 where something was found that training would stop at."""
    parser = argparse.ArgumentParser(
        prog="dpsm doctor",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a model to ask about: folder, or name on the hub (its config is looked up)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    report = Report()
    report.ask("Versions", lambda: _versions(report))
    report.ask("Devices", lambda: _devices(report))
    report.ask("Extras", lambda: _extras(report))
    report.ask("Trackers", lambda: _trackers(report))
    report.ask("Caches", lambda: _caches(report))
    if options.model is not None:
        report.ask("Model", lambda: _model(report, options.model))
    print(json.dumps({"sound": report.sound, **report.parts}, indent=1) if options.json else report.text())
    return 0 if report.sound else 1


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _versions(report: Report) -> None:
    report.add("Versions", "dpsm_hf", __version__)
    report.add("Versions", "python", platform.python_version())
    for name, (oldest, newest) in TESTED.items():
        found = _installed(name)
        if found is None:
            report.add("Versions", name, f"is missing: pip install {name}", "error")
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # also what a broken binary raises
            report.add("Versions", name, f"{found}, but it cannot be imported: {_one_line(error)}", "error")
            continue
        tested = oldest if oldest == newest else f"{oldest} to {newest}"
        if _number(found) < _number(oldest):
            report.add(
                "Versions", name, f"{found}, older than what was tested ({tested}): pip install -U {name}", "error"
            )
        elif _number(found) > _number(newest):
            report.add("Versions", name, f"{found}, newer than what was tested ({tested})", "warning")
        else:
            report.add("Versions", name, f"{found} (tested: {tested})")


def _devices(report: Report) -> None:
    flags = (processor_fact("flags") or "").split()
    known = ", ".join(name for name in _INSTRUCTIONS if name in flags) or "no AVX that the system tells of"
    report.add("Devices", "CPU", f"{processor_name()}, {os.cpu_count()} cores; {known}")
    import torch

    if not torch.cuda.is_available():
        report.add("Devices", "GPU", "none that this torch can use" + ("" if torch.version.cuda else " (a CPU build)"))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        report.add("Devices", f"GPU {index}", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {bf16}")
    if torch.cuda.is_available() and _installed("triton") is None:
        report.add(
            "Devices", "Triton", "missing: the fused head runs without its kernel; pip install triton", "warning"
        )


def _extras(report: Report) -> None:
    for name, (_, purpose) in OPTIONAL.items():
        found = _installed(name)
        said = f"{found}, for {purpose}" if found else f"not installed; for {purpose}: pip install {name}"
        report.add("Extras", name, said)


def _trackers(report: Report) -> None:
    found = [f"{name} {version}" for name in TRACKERS if (version := _installed(name.replace("_", "-")))]
    report.add("Trackers", "--report_to", ", ".join(found) or f"none of {', '.join(TRACKERS)} is installed")


def _caches(report: Report) -> None:
    from datasets import config
    from huggingface_hub import constants

    for name, place in (("HF_HOME", constants.HF_HOME), ("datasets", config.HF_DATASETS_CACHE)):
        folder = Path(place).expanduser()
        there = next(above for above in (folder, *folder.parents) if above.is_dir())
        free = shutil.disk_usage(there).free / 1e9
        state = "ok"
        if not os.access(there, os.W_OK):
            state = "error"
        elif free < _LEAST_FREE_GB:
            state = "warning"
        said = "cannot be written to" if state == "error" else f"{free:.1f} GB free"
        report.add("Caches", name, f"{folder}, {said}", state)
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        report.add("Caches", "HF_HUB_OFFLINE", "is set: nothing is downloaded", "warning")


def _model(report: Report, name: str) -> None:
    from .model_path import path_of

    for finding in path_of(name):
        report.add("Model", *finding)


if __name__ == "__main__":
    sys.exit(main())
