"""Campaigns and records made by hand, for tests of what reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpsm_hf.campaign.runner.records import Record
from dpsm_hf.campaign.spec.design import Campaign, Point, Run, Variation

VARIATIONS = (
    Variation("ce-baseline", "cross-entropy", arguments={"scoring_rule": "ce"}),
    Variation("brier-baseline", "Brier", arguments={"scoring_rule": "brier"}),
    Variation("dpsm-linear", "DPSM, linear", arguments={"scoring_rule": "dpsm"}),
    Variation("ce+tempscale", "cross-entropy, temperature-scaled", of="ce-baseline"),
    Variation("focal", "focal loss", role="ablation", arguments={"scoring_rule": "focal"}),
)

#: What a run's record says: metrics of the test split, seconds and NLL of its evaluations, and efficiency.
Make = Callable[[Point], Mapping[str, Any] | None]


def campaign(
    seeds: Sequence[int] = (1, 2, 3),
    studies: Sequence[str] = ("main",),
    variations: Sequence[Variation] = VARIATIONS,
    **changes: Any,
) -> Campaign:
    """Return a campaign of one size and one data set."""
    runs: dict[str, Run] = {}
    points = []
    for study in studies:
        for seed in seeds:
            for v in variations:
                arguments = {**v.arguments, "seed": seed, "study": study}
                if v.of is not None:
                    source = next(other for other in variations if other.name == v.of)
                    arguments = {**source.arguments, "seed": seed, "study": study}
                run = Run("language-modelling", arguments)
                runs[run.id] = run
                points.append(Point(study, v.name, "tiny", "docs", seed, run.id, scaled=v.of is not None))
    options: dict[str, Any] = {
        "name": "by-hand", "title": "Made by hand", "scale": "small", "task": "language-modelling",
        "reference": "ce-baseline", "brier": "brier-baseline", **changes,
    }  # fmt: skip
    return Campaign(variations=tuple(variations), points=tuple(points), runs=runs, **options)


def records(of: Campaign, make: Make) -> dict[str, Record]:
    """Return a record for each run, from ``make`` of its first point; None leaves the run out.

    ``make`` returns ``status``, ``metrics`` (of the test split), ``curve`` (``(seconds, NLL)`` at steps 0, 100, ...)
    and ``efficiency``.
    """
    found = {}
    for run_id in of.order:
        point = next(p for p in of.points if p.run_id == run_id)
        said = make(point)
        if said is None:
            continue
        curve = said.get("curve", ())
        history = [
            {
                "step": 100 * i,
                "eval_nll": nll,
                "eval_perplexity": math.exp(nll),
                "eval_ece_15": nll / 100,
                "eval_train_seconds": seconds,
            }
            for i, (seconds, nll) in enumerate(curve)
        ]
        efficiency = dict(said.get("efficiency", {}))
        if curve:
            efficiency.setdefault("train_seconds", curve[-1][0])
        found[run_id] = Record(
            run_id, f"{point.variation}/{point.seed}", of.task, of.runs[run_id].arguments, said.get("status", "ok"),
            metrics={"last": {"test": said.get("metrics", {})}}, history=history, efficiency=efficiency,
        )  # fmt: skip
    return found
