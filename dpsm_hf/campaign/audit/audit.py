"""`run_audit`: measure what a training step of every variation costs, on the same text and the same machine.

Every variation takes real steps of its trainer on a fixed batch. Peak memory is measured in one process for each
variation, times in one process that interleaves all of them. Measurements are written at once; after a kill, the next
audit of the same commit on the same machine measures only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ...data.python_text import load_python_docs
from ...measuring.processes import commit, device_name, own_process_environment, source_hash, spread
from ...runtime.child_process import tail_of
from ...runtime.files import strict, write_json
from ..spec.design import Campaign, Point, Run

SCHEMA = 1
AUDIT_NAME = "audit.json"
_TAIL_LINES = 5


@dataclass(frozen=True)
class AuditSettings:
    """What an audit measures; the section ``audit`` of a campaign."""

    tokens: int = 2000  # in the fixed batch; for summarization sources and summaries together
    repeats: int = 5  # time samples of each variation
    steps: int = 0  # steps of the sustained measurement; 0 leaves it out
    sequences: int = 64  # rows in a step of the sustained measurement
    length: int = 1024  # tokens in such a row
    size: str | None = None  # size of the model; None takes that of the reference's first run

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("repeats", 1), ("steps", 0), ("sequences", 1), ("length", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"audit: {name}={value!r} must be a whole number from {least} on.")

    @classmethod
    def of(cls, campaign: Campaign) -> AuditSettings:
        """Return the settings of a campaign; the default of ``steps`` is 1,000 at paper scale, 0 at small scale.

        Raises:
            ValueError: for an unknown key or a value out of range.
        """
        given = dict(campaign.audit or {})
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ValueError(f"audit: {', '.join(map(str, unknown))} is unknown; there are {', '.join(known)}.")
        given.setdefault("steps", 1000 if campaign.scale == "paper" else 0)
        return cls(**given)


def audited_runs(campaign: Campaign, size: str | None = None) -> dict[str, Run]:
    """Return one run of each variation to audit, such that they differ in the variation as little else as possible.

    Variations without runs, because they stand for another's results or the plan has none, are left out. A run that
    starts from another's model is audited with random weights, which cost the same. Steps are audited in one process,
    whatever number the run trains on.

    Args:
        campaign: the campaign.
        size: of the model; None takes that of the reference's first run.

    Raises:
        ValueError: if the reference has no run of that size.
    """
    own = [point for point in campaign.points if not point.scaled]
    mine = [p for p in own if p.variation == campaign.reference and size in (None, p.size)]
    if not mine:
        sizes = ", ".join(sorted({point.size for point in own})) or "none"
        what = f"the reference {campaign.reference!r} has no run of size {size!r}; the plan has the sizes {sizes}."
        raise ValueError(f"audit: {what}")
    first = mine[0]

    def rank(point: Point) -> tuple[bool, ...]:
        return (point.study != first.study, point.data != first.data, point.seed != first.seed)

    found: dict[str, Run] = {}
    for variation in campaign.variations:
        points = [p for p in own if p.variation == variation.name and p.size == first.size]
        if variation.of is None and points:
            run = campaign.runs[min(points, key=rank).run_id]
            found[variation.name] = dataclasses.replace(campaign.with_architecture(run), processes=1)
    return found


def run_audit(campaign: Campaign, directory: Path) -> dict[str, Any]:
    """Measure what is missing in a campaign's audit, and return the whole audit.

    Args:
        campaign: the campaign; its ``audit`` has the `AuditSettings`.
        directory: folder of the campaign; ``audit.json`` is written there, text and logs into ``audit/``.

    Returns:
        The content of ``audit.json``, see docs/audit.md. A variation that could not be measured has the status
        ``failed`` and a message; the next audit tries it again.

    Raises:
        ValueError: for settings that do not fit.
    """
    return _Audit(campaign, Path(directory)).run()


class _Audit:
    """One audit of a campaign in a folder."""

    def __init__(self, campaign: Campaign, directory: Path) -> None:
        self.campaign, self.directory, self.folder = campaign, directory, directory / "audit"
        self.settings = AuditSettings.of(campaign)
        self.runs = audited_runs(campaign, self.settings.size)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.content = self._begin()
        #: The measurements of each variation.
        self.entries: dict[str, dict[str, Any]] = self.content["variations"]

    def run(self) -> dict[str, Any]:
        """Measure what is missing, and return the content of ``audit.json``."""
        for name in self.runs:
            if "peak_memory_mb" not in self.entries[name]:
                self._measure("memory", [name])
        if untimed := [name for name in self._sound() if self._rounds_missing(name)]:
            reference = self.campaign.reference
            together = untimed if reference in untimed or reference not in self._sound() else [reference, *untimed]
            rounds = max(self._rounds_missing(name) for name in untimed)
            self._measure("time", together, rounds)
        unsustained = [name for name in self._sound() if "sustained" not in self.entries[name]]
        if unsustained and self.settings.steps:
            self._measure("sustain", unsustained)
        for name in self._sound():
            self.entries[name]["status"] = "ok"
        self._save()
        return self.content

    def _sound(self) -> list[str]:
        return [name for name in self.runs if self.entries[name]["status"] != "failed"]

    def _rounds_missing(self, name: str) -> int:
        entry = self.entries[name]
        missing = self.settings.repeats - len(entry["samples"])
        # the profile is taken after the rounds, in the same process, so it needs at least one
        return max(missing, 0 if "profile" in entry and "gpu" in entry else 1)

    # ---- what is kept and written ----------------------------------------------------------------------------------

    def _begin(self) -> dict[str, Any]:
        use_cpu = any(run.arguments.get("use_cpu") for run in self.runs.values())
        device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
        content: dict[str, Any] = {
            "schema": SCHEMA, "campaign": self.campaign.name, "scale": self.campaign.scale,
            "task": self.campaign.task, "reference": self.campaign.reference, "device": device.type,
            "machine": describe_machine(device), "settings": asdict(self.settings), "variations": {},
        }  # fmt: skip
        before, content["text"] = self._read_previous(content)
        content["variations"] = {name: entry for name, entry in before.items() if name not in self.runs}
        for name, run in self.runs.items():
            kept = before.get(name)
            if kept is None or kept.get("run") != run.id or kept.get("status") == "failed":
                kept = {"samples": []}
            known = {"title": self.campaign.variation(name).title, "status": "running", "message": "", "run": run.id}
            content["variations"][name] = {**kept, **known}
        for entry in content["variations"].values():  # samples taken while the reference failed cannot be compared
            entry["samples"] = [sample for sample in entry["samples"] if sample["reference_seconds"]]
        return content

    def _read_previous(self, content: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return variations and text of an earlier audit with the same machine, commit and settings; else none."""
        try:
            previous = json.loads((self.directory / AUDIT_NAME).read_text(encoding="utf-8"))
            same = all(previous[key] == content[key] for key in content if key not in ("variations", "settings"))
            found = previous["variations"]
            # a change of repeats keeps the samples taken so far; any other change makes them incomparable
            old, new = ({**s, "repeats": 0} for s in (previous["settings"], content["settings"]))
            return (dict(found), previous["text"]) if same and old == new else ({}, None)
        except (OSError, ValueError, KeyError, TypeError):
            return {}, None

    def _save(self) -> None:
        summarise(self.content)
        write_json(strict(self.content), self.directory / AUDIT_NAME)

    @functools.cached_property
    def _spec(self) -> Path:
        """Write what the measuring processes need (arguments, tokenizer, text as ids), and return the file's path."""
        from .step import parse_arguments

        first = self.runs[self.campaign.reference]
        run = parse_arguments(self.campaign.task, first.arguments, self.folder)
        texts = list(load_python_docs()["train"]["text"])
        tokenizer = run.load_tokenizer(lambda: texts)  # train-bpe at the run's size, on the audit's own text
        tokenizer.save_pretrained(self.folder / "text-tokenizer")
        large = self.settings.sequences * self.settings.length
        # sustained steps move through the text; after ten different batches it may start over
        wanted = max(2 * self.settings.tokens, 10 * large if self.settings.steps else 0)
        ids, used = _ids(tokenizer, texts, wanted)
        np.save(self.folder / "ids.npy", np.asarray(ids, dtype=np.int32))
        self.content["text"] = {
            "name": "python-docs, train split, from its beginning", "tokens": len(ids),
            "sha256": hashlib.sha256("\n".join(used).encode()).hexdigest(),
        }  # fmt: skip
        spec = {
            "task": self.campaign.task, "reference": self.campaign.reference, "settings": asdict(self.settings),
            "tokenizer": str(self.folder / "text-tokenizer"), "ids": str(self.folder / "ids.npy"),
            "runs": {name: dict(run.arguments) for name, run in self.runs.items()},
        }  # fmt: skip
        write_json(spec, self.folder / "spec.json")
        return self.folder / "spec.json"

    # ---- processes -------------------------------------------------------------------------------------------------

    def _measure(self, kind: str, names: Sequence[str], rounds: int | None = None) -> None:
        """Run one measuring process and store what it finds; variations that it leaves unmeasured have failed."""
        command = [sys.executable, "-m", "dpsm_hf.campaign.audit.worker", kind, str(self._spec), *names]
        if rounds is not None:
            command += ["--rounds", str(rounds)]
        log = self.folder / "log.txt"
        with log.open("a", encoding="utf-8") as errors:
            start = errors.tell()
            print(f"== {kind} {' '.join(names)}", file=errors, flush=True)
            for finding in _findings(command, errors, exact_memory=kind == "memory"):
                if "progress" in finding:
                    print(f"audit: {finding['progress']}", file=sys.stderr, flush=True)
                else:
                    self._take(finding)
                    self._save()
        wanted = {"memory": "peak_memory_mb", "time": "profile", "sustain": "sustained"}[kind]
        for entry in map(self.entries.__getitem__, names):
            if wanted not in entry and entry["status"] != "failed":
                tail = "\n".join(tail_of(log, start, _TAIL_LINES))
                entry.update(status="failed", message=f"the process that measures {kind} ended early: {tail}")
        self._save()

    def _take(self, finding: Mapping[str, Any]) -> None:
        if "round" in finding:
            seconds = finding["round"]
            base = seconds.get(self.campaign.reference)
            for name, value in seconds.items():
                samples = self.entries[name]["samples"]
                if len(samples) < self.settings.repeats:
                    samples.append({"seconds": value, "reference_seconds": base, "steps": finding["steps_per_sample"]})
            return
        entry = self.entries[finding["variation"]]
        if "failed" in finding:
            entry.update(status="failed", message=finding["failed"])
        else:
            entry.update({key: value for key, value in finding.items() if key != "variation"})


def _findings(command: Sequence[str], errors: Any, *, exact_memory: bool) -> Iterator[dict[str, Any]]:
    """Yield the findings of a measuring process, one per line of its output; closing the iterator ends the process."""
    environment = {**own_process_environment(exact_memory), "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=errors, encoding="utf-8", env=environment) as process:
        try:
            assert process.stdout is not None  # it was opened as a pipe
            for line in process.stdout:
                yield json.loads(line)
        finally:
            if process.poll() is None:
                process.terminate()


def _ids(tokenizer: Any, texts: Iterable[str], wanted: int) -> tuple[list[int], list[str]]:
    """Return ``wanted`` token ids, and the texts that they come from; ids of too short texts are repeated."""
    ids: list[int] = []
    used: list[str] = []
    for text in texts:
        if len(ids) >= wanted:
            break
        used.append(text)
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    while len(ids) < wanted:
        ids += ids[: wanted - len(ids)]
    return ids[:wanted], used


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what a measurement depends on: device, versions, and the commit and sources of this package."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "device": device_name(device), "commit": commit(), "source": source_hash(),
        "versions": {**versions, "python": platform.python_version()},
    }  # fmt: skip


# ---- results -------------------------------------------------------------------------------------------------------


def summarise(content: dict[str, Any]) -> None:
    """Compute the results of each variation from its measurements, in place; None where a measurement is missing."""
    entries = content["variations"]
    base = entries.get(content["reference"], {}).get("peak_memory_mb")
    for entry in entries.values():
        seconds = [sample["seconds"] for sample in entry["samples"]]
        ratios = [s["seconds"] / s["reference_seconds"] for s in entry["samples"] if s["reference_seconds"]]
        for name, values in (("seconds_per_step", seconds), ("ratio", ratios)):
            entry[name] = spread(values) if values else None
        median = entry["seconds_per_step"]["median"] if seconds else None
        entry["tokens_per_second"] = content["settings"]["tokens"] / median if median else None
        peak = entry.get("peak_memory_mb")
        known = peak is not None and base is not None
        entry["peak_memory_difference_mb"] = peak - base if known else None
        gpu = (entry.get("sustained") or {}).get("gpu") or entry.get("gpu") or {}
        steps = (entry.get("sustained") or {}).get("steps") or gpu.get("steps")
        joules = gpu.get("joules")
        entry["utilisation_percent"] = gpu.get("utilisation_percent")
        entry["joules_per_step"] = joules / steps if joules is not None and steps else None
        entry["gpu_note"] = gpu.get("note", "not measured")


def table(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each variation, for a report; values that were not measured are None.

    Args:
        content: the content of ``audit.json``.

    Returns:
        Rows with ``variation``, ``title``, ``status``, ``message``, ``seconds_per_step`` (median; ``..._p10``,
        ``..._p90``), ``ratio`` against the reference (likewise), ``tokens_per_second``, ``peak_memory_mb``,
        ``peak_memory_difference_mb``, ``gflops_per_step``, ``head_share`` (of the time of a step, 0 to 1),
        ``utilisation_percent``, ``joules_per_step``, ``sustained_tokens_per_second`` and ``device``.
    """
    rows = []
    measured = ("tokens_per_second", "peak_memory_mb", "peak_memory_difference_mb", "utilisation_percent")
    for name, entry in content["variations"].items():
        row = {key: entry.get(key) for key in ("title", "status", "message")}
        for key in ("seconds_per_step", "ratio"):
            figures = entry.get(key) or {}
            row |= {key: figures.get("median"), f"{key}_p10": figures.get("p10"), f"{key}_p90": figures.get("p90")}
        row |= {key: entry.get(key) for key in (*measured, "joules_per_step")}
        flops = entry.get("flops")
        row["gflops_per_step"] = flops["total"] / 1e9 if flops else None
        row["head_share"] = _share(entry.get("profile") or {}, "head")
        row["sustained_tokens_per_second"] = (entry.get("sustained") or {}).get("tokens_per_second")
        rows.append({"variation": name, **row, "device": content["machine"]["device"]})
    return rows


def _share(profile: Mapping[str, Mapping[str, float | None]], name: str) -> float | None:
    """Return a named range's share of the time of a step: of kernel time if there are kernels, else of host time."""
    if name not in profile or "step" not in profile:
        return None
    kind = "device_ms" if profile["step"]["device_ms"] else "cpu_ms"
    whole, part = profile["step"][kind], profile[name][kind]
    return part / whole if whole and part is not None else None
