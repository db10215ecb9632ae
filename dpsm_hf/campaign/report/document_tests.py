"""Tests of variations against the reference over the same documents: how much hangs on the choice of documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...statistics import DocumentBins, DocumentMeans, approximate_randomization, paired_bootstrap
from ..verdict.results import Results, Setting
from .tables import Cell, Table, describe

#: Random sets of swaps, and resamples.
SAMPLES = 2000


def document_table(results: Results, setting: Setting, directory: Path) -> Table | None:
    """Compare each variation with the reference by blocks of the test documents, over the seeds that both have.

    The interval is of the difference of perplexity and of ECE-15 (paired bootstrap over blocks, 95 %), the p-value of
    approximate randomisation. Both speak of other documents, not of other seeds. The sums by block lie in the folders
    of the runs below ``directory``; None where fewer than two variations have them of the same documents.
    """
    least = 1.5 / (SAMPLES + 1)  # the smallest p-value that so many samples can give is 1 / (SAMPLES + 1)
    base = _sums(results, setting, results.campaign.reference, directory)
    rows = []
    for name in results.variations(setting):
        if name == results.campaign.reference:
            continue
        own = _sums(results, setting, name, directory)
        suffix = "_scaled" if any(p.scaled for p in results.points(setting, name)) else ""
        seeds = [s for s in own if s in base and _same_documents(own[s], base[s])]
        seeds = [s for s in seeds if f"count{suffix}" in own[s]]  # no scaled sums where no temperature could be fitted
        if not seeds:
            continue
        cells = [Cell(results.title(name)), Cell(str(len(seeds)))]
        for kind, decimals in (("perplexity", 2), ("ece", 4)):
            ours, theirs = (
                _documents([found[s] for s in seeds], kind, end) for found, end in ((own, suffix), (base, ""))
            )
            interval = paired_bootstrap(ours, theirs, samples=SAMPLES)
            p_value = approximate_randomization(ours, theirs, samples=SAMPLES).p_value
            low, high = interval.interval
            bounds = "" if math.isnan(low) else f" [{low:+.{decimals}f}, {high:+.{decimals}f}]"
            cells.append(Cell(f"{interval.estimate:+.{decimals}f}{bounds}"))
            cells.append(Cell(f"{'≤ ' if p_value < least else ''}{p_value:.4f}"))
        rows.append(cells)
    caption = f"By documents, difference from cross-entropy with its 95 % interval: {describe(results, setting)}"
    note = (
        f"Paired bootstrap and approximate randomisation ({SAMPLES:,} each) over blocks of test documents. They "
        "say what other documents would show; what other seeds would, the tables above say. The p-values are not "
        "corrected. An interval of ECE is too wide where two systems are nearly the same, and may then hold 0 "
        "beside a small p."
    )
    return Table(caption, ["", "seeds", "perplexity", "p", "ECE-15", "p"], rows, [note]) if rows else None


def _sums(results: Results, setting: Setting, name: str, directory: Path) -> dict[int, Mapping[str, np.ndarray]]:
    found: dict[int, Mapping[str, np.ndarray]] = {}
    for point in results.points(setting, name):
        record = results.record(point)
        if record is None or record.status != "ok":
            continue
        path = record.documents.get(f"{results.checkpoint}-{results.split}")
        file = directory / "runs" / record.run_id / path if path else None
        if file is not None and file.exists():
            with np.load(file) as arrays:
                found[point.seed] = {key: arrays[key] for key in arrays.files}
    return found


def _same_documents(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Return whether two runs were evaluated on the same rows: labels in the same order, and the same blocks."""
    labels = [str(found["labels"]) for found in (ours, theirs) if "labels" in found]
    return len(labels) == 2 and bool(labels[0]) and labels[0] == labels[1]


def _documents(runs: list[Mapping[str, np.ndarray]], kind: str, suffix: str) -> DocumentMeans | DocumentBins:
    def stacked(name: str) -> np.ndarray:
        return np.stack([run[f"{name}{suffix}"] for run in runs])

    if kind == "ece":
        return DocumentBins(stacked("count"), stacked("correct"), stacked("confidence"))
    return DocumentMeans(stacked("nll"), stacked("count").sum(-1), exponentiate=True)
