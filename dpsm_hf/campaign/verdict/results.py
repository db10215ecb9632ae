"""The results at the points of a campaign, and their pairs: same seed and setting, another variation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runner.records import Record
from ..spec.design import Campaign, Point, Setting

#: Share of the reference's improvement during training after which its final quality counts as reached.
ARRIVED = 0.95

# figures of `Record.efficiency`, as opposed to metrics of an evaluation
_EFFICIENCY = (
    "train_seconds", "tokens_per_second", "peak_memory_mb", "peak_device_memory_mb", "flops_per_step", "steps",
    "cpu_seconds", "energy_joules",
)  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Figures of a variation and of the one that it is compared with, seed by seed, and the seeds that lack either."""

    seeds: tuple[int, ...]
    ours: np.ndarray
    theirs: np.ndarray
    missing: tuple[int, ...] = ()


class Results:
    """The records of a campaign, read by study, size, data, variation and seed; missing runs are missing figures.

    They are those of the ``last`` or the ``best`` checkpoint, on a split (the campaign's own when None).
    """

    def __init__(
        self, campaign: Campaign, records: Mapping[str, Record], checkpoint: str = "last", split: str | None = None
    ) -> None:
        self.campaign = campaign
        self.records = records
        self.checkpoint = checkpoint
        self.split = split or campaign.test_split
        self._points: dict[tuple[Setting, str], list[Point]] = {}
        for point in campaign.points:
            self._points.setdefault((point.setting, point.variation), []).append(point)

    def settings(self, study: str | None = None) -> list[Setting]:
        """Return the settings in the order of the design, of one study or of all."""
        found = dict.fromkeys(setting for setting, _ in self._points)
        return [setting for setting in found if study is None or setting.study == study]

    def variations(self, setting: Setting) -> list[str]:
        """Return the variations that are run in a setting, in the order of the campaign's tables."""
        return [v.name for v in self.campaign.variations if (setting, v.name) in self._points]

    def title(self, variation: str) -> str:
        """Return a variation's title by its name."""
        return self.campaign.variation(variation).title

    def points(self, setting: Setting, variation: str) -> list[Point]:
        """Return the points of a variation in a setting: its seeds."""
        return self._points.get((setting, variation), [])

    def finished(self, setting: Setting, variation: str) -> bool:
        """Return whether any run of a variation in a setting has ended well."""
        records = map(self.record, self.points(setting, variation))
        return any(record is not None and record.status == "ok" for record in records)

    def record(self, point: Point) -> Record | None:
        """Return the record of the run at a point, None where there is none yet."""
        return self.records.get(point.run_id)

    def value(
        self, point: Point, metric: str, *, scaled: bool | None = None, split: str | None = None
    ) -> float | None:
        """Return a figure at a point; None where its run has not ended well or does not have it.

        Args:
            point: of the design.
            metric: of an evaluation, without prefix; a field of `Record.efficiency`; or ``seconds_to_quality`` and
                ``steps_to_quality``, see `to_quality`.
            scaled: after temperature scaling; None is as the point's variation reads it.
            split: of the evaluation; None is the campaign's.
        """
        record = self.record(point)
        if record is None or record.status != "ok":
            return None
        if metric in _EFFICIENCY:
            found = record.efficiency.get(metric)
            return None if found is None else float(found)
        if metric in ("seconds_to_quality", "steps_to_quality"):
            reached = self.to_quality(point)
            return None if reached is None else reached[metric == "steps_to_quality"]
        scaled = point.scaled if scaled is None else scaled
        return record.value(metric, split=split or self.split, checkpoint=self.checkpoint, scaled=scaled)

    def values(self, setting: Setting, variation: str, metric: str, **how: Any) -> dict[int, float]:
        """Return the figures of a variation by seed, without those that are missing."""
        found = {p.seed: self.value(p, metric, **how) for p in self.points(setting, variation)}
        return {seed: value for seed, value in found.items() if value is not None}

    def pairs(self, setting: Setting, variation: str, other: str, metric: str, **how: Any) -> Pairs:
        """Return the figures of two variations of the same setting, paired by seed."""
        planned = {p.seed for p in self.points(setting, variation)} & {p.seed for p in self.points(setting, other)}
        ours, theirs = (self.values(setting, name, metric, **how) for name in (variation, other))
        seeds = tuple(sorted(planned & set(ours) & set(theirs)))
        first, second = (np.array([values[seed] for seed in seeds]) for values in (ours, theirs))
        return Pairs(seeds, first, second, tuple(sorted(planned - set(seeds))))

    def to_quality(self, point: Point) -> tuple[float, float] | None:
        """Return the training seconds and the steps after which a run has 95 % of the reference's final quality.

        Where more is better (ROUGE), that is 0.95 times the reference's last value. Where less is better, it is 95 %
        of the way that the reference went, on the NLL for perplexity: ``start - 0.95 (start - end)``, with ``start``
        before training. Between two evaluations the crossing is interpolated linearly. The reference is the run of
        the same setting and seed; its ``end`` is its last evaluation during training.

        Returns:
            Infinity twice where the run never gets there; None where the curves that it needs are missing: of runs
            that have not ended well, or, where less is better, of ones that were not evaluated before training.
        """
        own = self.curve(point)
        others = [p for p in self.points(point.setting, self.campaign.reference) if p.seed == point.seed]
        base = self.curve(others[0]) if others else []
        better_high = self.campaign.quality[1]
        if not own or len(base) < 2 or (not better_high and base[0][1] > 0):
            return None
        start, end = base[0][2], base[-1][2]
        target = ARRIVED * end if better_high else start - ARRIVED * (start - end)
        sign = 1.0 if better_high else -1.0
        before: tuple[float, float, float] | None = None
        for seconds, step, value in own:
            if sign * value >= sign * target:
                if before is None:
                    return seconds, step
                share = (target - before[2]) / (value - before[2])
                return before[0] + share * (seconds - before[0]), before[1] + share * (step - before[1])
            before = (seconds, step, value)
        return math.inf, math.inf

    def curve(self, point: Point) -> list[tuple[float, float, float]]:
        """Return training seconds, step and quality at each evaluation of a run's training; NLL for perplexity."""
        name = "nll" if self.campaign.quality[0] == "perplexity" else self.campaign.quality[0]
        record = self.record(point)
        return [] if record is None or record.status != "ok" else series(record, f"eval_{name}")


def series(record: Record, key: str) -> list[tuple[float, float, float]]:
    """Return ``(training seconds, step, value)`` of a logged figure, evaluation time excluded from the seconds."""
    found = []
    for entry in record.history:
        value = entry.get(key)
        seconds = entry.get("eval_train_seconds", entry.get("train_seconds"))
        if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(seconds, (int, float)):
            found.append((float(seconds), float(entry.get("step", 0)), float(value)))
    return found
