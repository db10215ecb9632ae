"""Shared by the benchmarks: the CSV, the command line, interleaved timing and peak memory."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dpsm_hf.measuring.processes import commit, device_name, own_process_environment, peak_above, percentile

HERE = Path(__file__).resolve().parent


@dataclass
class Row:
    """One measured variant; each ratio is against the reference variant in the same round."""

    benchmark: str
    variant: str
    dtype: str
    tokens: int
    width: int
    vocabulary: int
    samples: int = 0
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    ratio: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None
    peak_mib: float | None = None
    peak_ratio: float | None = None
    note: str = ""
    date: str = ""
    device: str = ""
    torch: str = ""
    transformers: str = ""
    python: str = ""
    commit: str = ""


def slug(device: torch.device) -> str:
    """Return the name of the device's CSV file."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    name += f"-{torch.get_num_threads()}-cores" if device.type == "cpu" else ""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


class Table:
    """A CSV to which each row is written as soon as it is measured, so that an interrupt loses none."""

    def __init__(self, path: Path, device: torch.device) -> None:
        import transformers

        self.path = path
        self.stamp = {
            "date": datetime.date.today().isoformat(), "device": device_name(device), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(), "commit": commit(),
        }  # fmt: skip

    def add(self, row: Row) -> None:
        """Write a row and print it; it replaces the row of an earlier run of the same case."""
        for name, value in self.stamp.items():
            setattr(row, name, value)
        names = [f.name for f in fields(Row)]
        key = [str(getattr(row, name)) for name in names[:6]]
        before = read(self.path)
        kept = [old for old in before if [old[name] for name in names[:6]] != key]
        new = {k: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for k, v in asdict(row).items()}
        if not row.samples and len(kept) < len(before):  # only memory was measured again
            timed = next(old for old in before if [old[name] for name in names[:6]] == key)
            new = {**timed, "peak_mib": new["peak_mib"], "peak_ratio": new["peak_ratio"]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows([*kept, new])
        os.replace(part, self.path)
        ratio = f"{row.ratio:6.2f} ({row.ratio_p10:.2f} to {row.ratio_p90:.2f})" if row.ratio is not None else " " * 22
        peak = f"{row.peak_mib:8.0f} MiB" if row.peak_mib is not None else " " * 12
        share = f" {row.peak_ratio:5.2f}" if row.peak_ratio is not None else ""
        milliseconds = f"{row.median_ms:10.1f} ms" if row.median_ms is not None else " " * 13
        print(f"{row.variant:28}{row.dtype:6}N={row.tokens:<6}D={row.width:<6}V={row.vocabulary:<8}"
              f"{milliseconds} {ratio} {peak}{share} {row.note}", flush=True)  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; an empty list if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- command lines -------------------------------------------------------------------------------------------------


def add_target(p: argparse.ArgumentParser) -> None:
    """Add the options for the device and the output file."""
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--output", type=Path, help="CSV (default: benchmarks/results/<device>.csv)")


def add_options(p: argparse.ArgumentParser, *, samples: int, rounds: str, budget: float) -> None:
    """Add the options of `measure`, with their defaults, and those of `add_target`."""
    p.add_argument("--samples", type=int, default=samples, help=rounds)
    p.add_argument("--budget", type=float, default=budget, help="seconds per case after which no new round begins")
    add_target(p)


def open_table(arguments: argparse.Namespace, device: torch.device) -> Table:
    """Return the table for the options of `add_target`."""
    return Table(arguments.output or HERE / "results" / f"{slug(device)}.csv", device)


def main(
    p: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Table, torch.device], None],
    own_peak: Callable[..., float | None] | None = None,
) -> None:
    """Run a benchmark from the command line.

    Args:
        p: its parser, with `add_options`.
        run: measures, and adds rows to the table.
        own_peak: measures the peak of a case in this process, in MiB; `peak_in_own_process` calls it in a new one.
    """
    if own_peak is not None:
        p.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    arguments = p.parse_args()
    device = torch.device(arguments.device)
    if own_peak is not None and arguments.memory_of is not None:
        print(json.dumps(own_peak(device, *arguments.memory_of)))
        return
    run(arguments, open_table(arguments, device), device)


# ---- measuring -----------------------------------------------------------------------------------------------------


def peak_in_own_process(module: str, case: list[Any]) -> float | None:
    """Return the peak of a case in MiB, measured by ``python -m module --memory-of CASE`` in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--memory-of", json.dumps(case)],
        env=own_process_environment(exact_memory=True), capture_output=True, text=True, check=False, cwd=HERE.parent,
    )  # fmt: skip
    if done.returncode:
        print(f"{module} {case} ended with {done.returncode}: {done.stderr[-500:]}", file=sys.stderr)
        return None
    value = json.loads(done.stdout.strip().splitlines()[-1])
    return None if value is None else float(value)


def measure(
    variants: dict[str, Callable[[], object]],
    reference: str,
    *,
    samples: int,
    budget: float,
    device: torch.device,
    clean: Callable[[], None],
    peak: Callable[[str], float | None] | None = None,
) -> dict[str, dict[str, float | int | str | None]]:
    """Time every variant once per round, in rotating order, until there are enough rounds or the time is up.

    Args:
        variants: calls by name.
        reference: the variant that ratios are taken against.
        samples: number of rounds; 0 measures memory only.
        budget: seconds after which no new round begins, once there are three.
        device: the device to synchronise with.
        clean: called before each call, not timed.
        peak: measures the memory of a variant, in MiB; None measures it in this process.

    Returns:
        For each variant its columns of `Row`; for one that failed only a ``note``.
    """
    times: dict[str, list[float]] = {}
    found: dict[str, dict[str, float | int | str | None]] = {}
    for name, call in variants.items():  # warm-up: compiles, allocates, and sorts out variants that fail
        clean()
        try:
            call()
            clean()
            found[name] = {"peak_mib": peak_above(call, device) if peak is None else peak(name)}
            times[name] = []
        except Exception as error:  # out of memory, an unsupported combination: a row with a note
            found[name] = {"note": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    order, started = list(times), time.perf_counter()
    for number in range(samples):
        if number >= 3 and time.perf_counter() - started > budget:
            break
        for name in order[number % len(order) :] + order[: number % len(order)]:
            clean()
            if device.type == "cuda":
                torch.cuda.synchronize()
            before = time.perf_counter()
            variants[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - before))
    clean()
    base = times.get(reference)
    base_peak = found.get(reference, {}).get("peak_mib")
    for name, values in times.items():
        row = found[name]
        if values and base:
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            row.update(
                samples=len(values), median_ms=statistics.median(values), p10_ms=percentile(values, 0.1),
                p90_ms=percentile(values, 0.9), ratio=statistics.median(ratios), ratio_p10=percentile(ratios, 0.1),
                ratio_p90=percentile(ratios, 0.9),
            )  # fmt: skip
        peak = row["peak_mib"]
        if isinstance(peak, float) and isinstance(base_peak, float) and base_peak > 0:
            row["peak_ratio"] = peak / base_peak
    return found
