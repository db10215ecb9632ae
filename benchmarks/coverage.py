"""Measure the coverage of the 95 % intervals of calibration metrics, on labels drawn from known distributions.

python -m benchmarks.coverage --repetitions 100

This tests the estimators of `dpsm_hf.calibration.intervals` and says nothing about trained models. The coverage of the
basic bootstrap, from the same resamples, is reported too.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from benchmarks.common import HERE, commit
from dpsm_hf import TokenCalibration
from dpsm_hf.calibration import intervals

VOCABULARY = 8

#: Metrics that are 0 for a calibrated model, and that noise biases upwards.
ERRORS = ("ece_15", "ece_100", "smooth_ece", "adaptive_ece", "debiased_ece", "mce")
METRICS = (*ERRORS, "nll", "brier", "token_accuracy")


class World(NamedTuple):
    """A known truth: labels are drawn from ``softmax(z / temperature)``, the model predicts ``softmax(z)``."""

    temperature: float
    correlation: float  # within a document, of the normal scores from which labels are drawn

    def draw(self, seed: int, documents: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return predicted and true probabilities ``[n, V]``, the most probable first, and labels ``[n]``."""
        rng = np.random.default_rng(seed)
        difficulty = np.exp(rng.normal(0.3, 0.6, (documents, 1, 1)))
        z = -np.sort(-rng.normal(size=(documents, length, VOCABULARY)) * difficulty, axis=-1).reshape(-1, VOCABULARY)
        shared = np.repeat(rng.normal(size=documents), length)
        own = rng.normal(size=documents * length)
        # u is uniform for every token and correlated within a document: calibrated, but with dependent tokens
        score = math.sqrt(self.correlation) * shared + math.sqrt(1 - self.correlation) * own
        u = torch.special.ndtr(torch.from_numpy(score)).numpy()
        truth = softmax(z / self.temperature)
        return softmax(z), truth, (truth.cumsum(-1)[:, :-1] < u[:, None]).sum(-1)

    def truth(self) -> dict[str, float]:
        """Return the true metrics: their limits for many tokens, from true probabilities in place of labels."""
        p, q, _ = self.draw(10**6, 25_000, 12)
        confidence, right = p[:, 0], q[:, 0]
        gap = right - confidence
        cells = np.histogram(confidence, bins=1000, range=(0, 1), weights=gap)[0] / len(gap)
        bins = np.ceil(confidence * 15).astype(int)
        count, sums = np.bincount(bins), np.abs(np.bincount(bins, weights=gap))
        ordered = gap[np.argsort(confidence)]
        found = {
            "ece_15": sums.sum() / len(gap),
            "ece_100": np.abs(np.bincount(np.ceil(confidence * 100).astype(int), weights=gap)).sum() / len(gap),
            "smooth_ece": smooth(cells),
            "adaptive_ece": sum(abs(part.sum()) for part in np.array_split(ordered, 15)) / len(gap),
            "debiased_ece": sums.sum() / len(gap),
            "mce": (sums[count > 0] / count[count > 0]).max(),
            "nll": -(q * np.log(p)).sum(-1).mean(),
            "brier": ((p**2).sum(-1) - 2 * (p * q).sum(-1) + 1).mean(),
            "token_accuracy": right.mean(),
            "signed_gap": -gap.mean(),
        }
        return {name: float(value) for name, value in found.items()}

    def sample(self, seed: int, documents: int, length: int) -> dict[str, np.ndarray]:
        """Return one evaluation set, as arguments of `TokenCalibration.update`."""
        p, _, labels = self.draw(seed, documents, length)
        p_y = p[np.arange(len(labels)), labels]
        return {
            "confidence": p[:, 0].copy(),
            "correct": labels == 0,
            "nll": -np.log(p_y),
            "brier": (p**2).sum(-1) - 2 * p_y + 1,
            "document": np.repeat(np.arange(documents), length),
        }


class Case(NamedTuple):
    """A world, and the size of the evaluation sets drawn from it."""

    name: str
    world: World
    documents: int = 200
    length: int = 50


CASES = (
    Case("calibrated, tokens independent", World(1.0, 0.0)),
    Case("calibrated, tokens of a document alike", World(1.0, 0.3)),
    Case("T = 1.1, alike", World(1.1, 0.3)),
    Case("T = 1.5, alike", World(1.5, 0.3)),
    Case("T = 1.5, alike, 40 documents", World(1.5, 0.3), documents=40),
    Case("T = 2, alike", World(2.0, 0.2)),
)


def softmax(z: np.ndarray) -> np.ndarray:
    """Return the softmax of the last axis."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def smooth(cells: np.ndarray) -> float:
    """Return the smooth ECE, independently of the package: by a kernel matrix with reflected images, and bisection."""
    t = (np.arange(len(cells)) + 0.5) / len(cells)

    def error(width: float) -> float:
        kernel = sum(np.exp(-((t[:, None] - image) ** 2) / (2 * width**2)) for image in (t, -t, 2 - t))
        return float(np.abs(kernel @ cells).mean() / (math.sqrt(2 * math.pi) * width))

    low, high = 0.0, 1.0
    for _ in range(12):
        width = (low + high) / 2
        low, high = (width, high) if error(width) > width else (low, width)
    return (low + high) / 2


def both_intervals(
    calibration: TokenCalibration, samples: int
) -> tuple[dict[str, intervals.Interval], dict[str, intervals.Interval]]:
    """Return the intervals of all metrics as the package reports them, and those of the basic bootstrap."""
    reported_kind, basic = intervals.error_interval, []

    def both(*arguments: Any) -> intervals.Interval:
        basic.append(intervals.basic_interval(*arguments))
        return reported_kind(*arguments)

    with mock.patch.object(intervals, "error_interval", both):
        reported = calibration.intervals(samples=samples)
    errors = [name for name in reported if name in intervals.NOISE_RAISES]
    return reported, {**reported, **dict(zip(errors, basic, strict=True))}


def measure(case: Case, repetitions: int, samples: int) -> list[dict[str, Any]]:
    """Return one row per metric: how often its intervals contained the truth, and their mean width."""
    truth = case.world.truth()
    if case.world.temperature == 1.0:
        truth |= dict.fromkeys(ERRORS, 0.0)
    kinds = ("", "_basic")
    hits, widths = ({(name, kind): 0.0 for name in METRICS for kind in kinds} for _ in range(2))
    for seed in range(repetitions):
        calibration = TokenCalibration()
        calibration.update(**case.world.sample(seed, case.documents, case.length))
        for kind, found in zip(kinds, both_intervals(calibration, samples), strict=True):
            for name in METRICS:
                low, high = found[name]
                hits[name, kind] += low <= truth[name] <= high
                widths[name, kind] += high - low
    return [
        {
            "model": case.name, "temperature": case.world.temperature, "correlation": case.world.correlation,
            "documents": case.documents, "tokens_of_document": case.length, "metric": name, "truth": truth[name],
            "repetitions": repetitions, "samples": samples,
            **{f"coverage{kind}": hits[name, kind] / repetitions for kind in kinds},
            **{f"width{kind}": widths[name, kind] / repetitions for kind in kinds},
        }
        for name in METRICS
    ]  # fmt: skip


def run(cases: Iterable[Case], repetitions: int, samples: int, output: Path) -> list[dict[str, Any]]:
    """Measure the cases, write the CSV and return its rows.

    Raises:
        ValueError: for less than one repetition.
    """
    if repetitions < 1:
        raise ValueError(f"--repetitions {repetitions} must be at least 1; of 100 a share is known to about 0.05.")
    stamp = {
        "date": datetime.date.today().isoformat(), "numpy": np.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        rows += [{**row, **stamp} for row in measure(case, repetitions, samples)]
        with open(output, "w", encoding="utf-8", newline="") as file:  # written after every case
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the coverage as a Markdown table, that of the basic bootstrap in brackets where it is different."""
    lines = [
        f"| model | true ECE-15 | {' | '.join(f'`{name}`' for name in METRICS)} |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["metric"]: row for row in rows if row["model"] == model}
        cells = [
            share(row["coverage"]) + (f" ({share(row['coverage_basic'])})" if name in ERRORS else "")
            for name, row in found.items()
        ]
        lines.append(f"| {model} | {found['ece_15']['truth']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(value: float) -> str:
    """Return a share with two decimals, without the leading zero."""
    return f"{value:.2f}".removeprefix("0")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repetitions", type=int, default=100, help="evaluation sets to draw for each case (%(default)s)")
    p.add_argument("--samples", type=int, default=300, help="resamples of each set (%(default)s, as in an evaluation)")
    p.add_argument(
        "--output",
        type=Path,
        default=HERE / "results" / "coverage.csv",
        help="CSV (default: benchmarks/results/coverage.csv)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(argv)
    print(table(run(CASES, arguments.repetitions, arguments.samples, arguments.output)))


if __name__ == "__main__":
    main()
