"""What single runs show, one of each variation, in plain sentences derived from their numbers alone.

A campaign of several seeds is judged by tests (`verdict`); one run each allows no test, so these only describe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runner.records import Record

# Differences below this share are called equal: one run cannot tell them from the choice of seed.
TIE = 0.005
# ROUGE-Lsum (out of 100) of texts that share little more than frequent words with the reference.
WEAK_ROUGE = 10.0
# How a run ended that is not compared.
_ENDED = {
    "failed": "failed",
    "interrupted": "was interrupted",
    "oom": "ran out of memory",
    "paused": "was paused",
    "pruned": "was stopped early",
    "running": "has not ended",
}


@dataclass(frozen=True)
class SingleRun:
    """A run among others that differ in the loss.

    Args:
        name: unique among them.
        title: in words.
        record: of the run.
        split: whose figures are compared.
    """

    name: str
    title: str
    record: Record
    split: str = "validation"

    @property
    def loss_type(self) -> str:
        """Return the loss that it was trained with."""
        return str(self.record.arguments.get("loss_type", self.name))

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Return the figures of the evaluation at the end."""
        return self.record.metrics.get("last", {}).get(self.split, {})

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Return the calibration curve at the end and what goes with it."""
        return self.record.calibration.get(self.split) or {}

    @property
    def comparable(self) -> bool:
        """Return whether it ended well and was evaluated."""
        return self.record.status == "ok" and bool(self.metrics)

    @property
    def diverged_at(self) -> int | None:
        """Return the first logged step with a figure that is not finite, None where there is none."""
        keys = ("loss", "nll", "grad_norm", "eval_nll", "eval_loss")
        bad = (entry for entry in self.record.history if any(key in entry and entry[key] is None for key in keys))
        found = next(bad, None)
        return None if found is None else int(found.get("step", 0))

    def value(self, metric: str) -> float | None:
        """Return a figure of the end or of what the training cost, None where it is missing or not finite."""
        if metric in self.record.efficiency:
            return self.record.efficiency[metric]
        return self.record.value(metric, split=self.split)


@dataclass(frozen=True)
class _Measure:
    key: str
    words: str
    higher_is_better: bool = False
    points: bool = False
    decimals: int = 4


_PERPLEXITY = _Measure("perplexity", "perplexity", decimals=2)
_BRIER = _Measure("brier", "Brier score")
_ECE = _Measure("ece_15", "ECE-15")
_ACCURACY = _Measure("token_accuracy", "token accuracy", higher_is_better=True, points=True)
_ROUGE = _Measure("rougeLsum", "ROUGE-Lsum", higher_is_better=True, decimals=2)
_MEASURES = (_ROUGE, _PERPLEXITY, _BRIER, _ECE, _ACCURACY)


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _change(measure: _Measure, run: SingleRun, reference: SingleRun) -> float | None:
    """Relative difference of a run to the reference; positive is higher. ``None`` when either figure is missing."""
    ours, theirs = run.value(measure.key), reference.value(measure.key)
    if ours is None or theirs is None:
        return None
    if theirs == 0:
        return 0.0 if ours == 0 else math.copysign(math.inf, ours)
    return (ours - theirs) / abs(theirs)


def _side(measure: _Measure, change: float) -> int:
    """+1 when the run is better than the reference, -1 when worse, 0 for a tie."""
    if abs(change) < TIE:
        return 0
    return 1 if (change > 0) == measure.higher_is_better else -1


def _phrase(measure: _Measure, run: SingleRun, reference: SingleRun) -> str:
    ours, theirs, change = run.value(measure.key), reference.value(measure.key), _change(measure, run, reference)
    assert ours is not None and theirs is not None and change is not None  # only called for measures both have
    if measure.points:
        figures = f"{100 * ours:.2f} % against {100 * theirs:.2f} %"
        size = f"{100 * abs(ours - theirs):.2f} points"
    else:
        figures = f"{ours:,.{measure.decimals}f} against {theirs:,.{measure.decimals}f}"
        size = f"{100 * abs(change):.1f} %"
    if _side(measure, change) == 0:
        return f"{measure.words} the same within {100 * TIE:g} % ({figures})"
    if change >= 2:
        return f"{measure.words} {change + 1:.1f} times as high ({figures})"
    return f"{measure.words} {size} {'higher' if change > 0 else 'lower'} ({figures})"


def _compare(run: SingleRun, reference: SingleRun) -> list[str]:
    """Compare one run with the reference in a few sentences: the sum first, then the figures."""
    changes = [(measure, _change(measure, run, reference)) for measure in _MEASURES]
    known = [(measure, change) for measure, change in changes if change is not None]
    if not known:
        return [f"{run.title} and {reference.title} have no evaluation figure in common, so they cannot be compared."]
    wins = [measure.words for measure, change in known if _side(measure, change) > 0]
    losses = [measure.words for measure, change in known if _side(measure, change) < 0]
    a, b = run.title, reference.title
    if wins and losses:
        head = f"On this run {a} is better than {b} on {_join(wins)} and worse on {_join(losses)}."
    elif wins:
        head = f"On this run {a} is better than {b} on {_join(wins)} and worse on none of the figures compared."
    elif losses:
        head = (
            f"On this run {a} loses to {b}: it is worse on {_join(losses)} and better on none of the figures compared."
        )
    else:
        head = f"On this run {a} and {b} come out the same within {100 * TIE:g} % on every figure compared."
    figures = "; ".join(_phrase(measure, run, reference) for measure, _ in known)
    return [head, f"{a} against {b}: {figures}.", *_bins_disagree(run, reference), *_on_the_way(run, reference)]


def _bins_disagree(run: SingleRun, reference: SingleRun) -> list[str]:
    sides = {}
    for bins in (10, 15, 100):
        change = _change(_Measure(f"ece_{bins}", ""), run, reference)
        if change is not None:
            sides[bins] = _side(_ECE, change)
    if not (1 in sides.values() and -1 in sides.values()):
        return []
    parts = [f"{'better' if side > 0 else 'worse' if side < 0 else 'equal'} at {n}" for n, side in sides.items()]
    return [f"Who is better calibrated depends on the number of bins: {run.title} is {_join(parts)}."]


def _calibration(tested: Sequence[SingleRun], base: SingleRun) -> list[str]:
    sentences = []
    changes = [(_change(_ECE, run, base), _change(_PERPLEXITY, run, base)) for run in tested]
    if any(ece is not None and ppl is not None and ece <= -TIE and ppl >= TIE for ece, ppl in changes):
        sentences.append(
            "A lower ECE beside a higher perplexity is not a better model: one that only ever predicts the overall "
            "frequencies of the tokens has an ECE near 0."
        )
    gaps = [(record.title, record.value("signed_gap")) for record in (base, *tested)]
    words = [
        f"{title} {100 * gap:+.2f} points ({'over' if gap > 0 else 'under'}confident)" for title, gap in gaps if gap
    ]
    if words:
        sentences.append(f"Mean confidence minus accuracy: {_join(words)}.")
    return sentences


def _schedule(run: SingleRun) -> list[str]:
    alphas = [float(entry["alpha"]) for entry in run.record.history if entry.get("alpha") is not None]
    if run.loss_type != "dpsm" or not alphas:
        return []
    if max(alphas) < 1:
        return [
            f"α, the weight of the Brier score, never exceeded {max(alphas):.2f}: part of the loss stayed "
            "cross-entropy."
        ]
    described = next((str(e["alpha_schedule"]) for e in run.record.history if "alpha_schedule" in e), "")
    ramp = re.fullmatch(r"(linear|cosine): alpha \S+ -> 1 over (\d+) steps \(of (\d+)\)", described)
    if ramp is None:
        return [f"α followed the schedule {described!r}."] if described else []
    warmup, total = int(ramp[2]), int(ramp[3])
    return [
        f"α reached 1 after {warmup:,} of {total:,} steps, so the last {100 * (total - warmup) / total:.0f} % of "
        "training was pure Brier score."
    ]


def _on_the_way(run: SingleRun, reference: SingleRun) -> list[str]:
    """Say at how many evaluations during training the run's ECE was the lower: one at the end may be luck."""
    series = [
        {int(e["step"]): float(e["eval_ece_15"]) for e in r.record.history if e.get("eval_ece_15") is not None}
        for r in (run, reference)
    ]
    steps = sorted((set(series[0]) & set(series[1])) - {0})
    if len(steps) < 3:
        return []
    lower = sum(series[0][step] < series[1][step] for step in steps)
    moral = "" if lower in (0, len(steps)) else ": the more mixed, the less the last one alone means"
    return [
        f"Over the {len(steps)} evaluations during training {run.title}'s ECE-15 was lower than {reference.title}'s "
        f"at {lower}{moral}."
    ]


def _overfit(run: SingleRun) -> list[str]:
    evals = [(int(e["step"]), float(e["eval_nll"])) for e in run.record.history if e.get("eval_nll") is not None]
    evals = [(step, value) for step, value in evals if math.isfinite(value)]
    final = run.value("nll")
    if not evals or final is None:
        return []
    step, lowest = min(evals, key=lambda pair: pair[1])
    if final <= lowest * 1.01:
        return []
    return [
        f"The held-out NLL of {run.title} was lowest at step {step:,} ({lowest:.4f}) and has risen to {final:.4f}."
    ]


def _cost(run: SingleRun, reference: SingleRun) -> list[str]:
    ours, theirs = run.value("tokens_per_second"), reference.value("tokens_per_second")
    if not ours or not theirs:
        return []
    return [
        f"{run.title} trained {ours:,.0f} scored tokens a second and {reference.title} {theirs:,.0f} "
        f"(median of the log, {ours / theirs:.2f} times as many)."
    ]


def seconds_of(record: Record) -> float:
    """Return how long a run took, all its attempts together.

    Args:
        record: of the run.
    """
    return sum(attempt.get("seconds") or 0.0 for attempt in record.attempts)


def _busy(records: Sequence[SingleRun]) -> list[str]:
    """Name the runs that shared the machine with other programs: their seconds say nothing about the loss."""
    usage = [(r.value("cpu_seconds"), seconds_of(r.record)) for r in records]
    cores = {r.name: cpu / wall for r, (cpu, wall) in zip(records, usage, strict=True) if cpu and wall}
    sentences = []
    for record in records:
        speeds = sorted(float(e["tokens_per_second"]) for e in record.record.history if e.get("tokens_per_second"))
        if len(speeds) >= 5 and speeds[len(speeds) // 5] < 0.6 * speeds[len(speeds) // 2]:
            why = f"its speed varied between {speeds[0]:,.0f} and {speeds[-1]:,.0f} tokens a second"
        elif record.name in cores and cores[record.name] < 0.7 * max(cores.values()):
            why = f"it got {cores[record.name]:.1f} processor cores where another run got {max(cores.values()):.1f}"
        else:
            continue
        sentences.append(
            f"Caution: the run {record.name!r} shared the machine with other programs ({why}), so its speed and its "
            "seconds compare with nothing."
        )
    return sentences


def _failures(records: Sequence[SingleRun]) -> list[str]:
    sentences = []
    for run in records:
        what = _ENDED.get(run.record.status, "has no evaluation figures")
        if run.record.status == "diverged":
            where = f" from step {run.diverged_at:,} on" if run.diverged_at is not None else ""
            sentences.append(f"The run {run.name!r} ({run.title}) diverged (not finite{where}) and is not compared.")
        elif not run.comparable:
            reason = f": {run.record.message}" if run.record.message else ""
            sentences.append(f"The run {run.name!r} {what} and is not compared{reason}.")
    return sentences


def _same_start(records: Sequence[SingleRun]) -> list[str]:
    starts = {}
    for record in records:
        first = next((e for e in record.record.history if e.get("step") == 0 and e.get("eval_nll") is not None), None)
        if first is not None:
            starts[record.name] = float(first["eval_nll"])
    if len(records) < 2 or len(starts) < len(records):
        return []
    if len(set(starts.values())) == 1:
        value = next(iter(starts.values()))
        return [f"All runs started from the same weights: the held-out NLL before training is {value:.4f} for each."]
    figures = ", ".join(f"{name} {value:.4f}" for name, value in starts.items())
    return [f"Caution: the runs did NOT start from the same weights (held-out NLL before training: {figures})."]


def _weak_texts(records: Sequence[SingleRun]) -> list[str]:
    scores = [score for record in records if (score := record.value(_ROUGE.key)) is not None]
    if not scores or max(scores) >= WEAK_ROUGE:
        return []
    return [
        f"No ROUGE-Lsum reaches {WEAK_ROUGE:g}: none of these models writes usable texts, and which of them leads "
        "on ROUGE says nothing."
    ]


def _noise(base: SingleRun) -> str:
    """Say how far figures can move by chance; for ECE, what a perfectly calibrated model would show."""
    text = "One seed: differences of a few per cent can be noise. Repeat with other seeds before believing them."
    floor, tokens = base.value("ece_15_null"), base.value("tokens")
    if floor is None or tokens is None:
        return text
    return (
        f"{text} On {tokens:,.0f} tokens even a perfectly calibrated model would show an ECE-15 of about {floor:.4f}, "
        "so smaller differences in ECE say nothing here."
    )


def _scope(records: Sequence[SingleRun]) -> str:
    """Say what the figures are: kind, split, size, bins and seeds."""
    splits = sorted({str(r.calibration["split"]) for r in records if r.calibration.get("split")})
    counts = sorted({int(count) for r in records if (count := r.value("tokens")) is not None})
    given = [r.record.arguments.get("seed") for r in records]
    seeds = sorted({str(seed) for seed in given if seed is not None})
    split = f" on the {'/'.join(splits)} split" if splits else " on the evaluation split"
    size = f" ({'–'.join(f'{count:,}' for count in (counts[:1] + counts[1:][-1:]))} tokens)" if counts else ""
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}" if seeds else "seed not recorded"
    return (
        f"All figures are token-level{split}{size}; calibration is top-label (confidence is the largest probability), "
        f"ECE-10/15/100 with 10, 15 and 100 bins of equal width. One run each, {seed}."
    )


def sentences_on(records: Sequence[SingleRun], reference: str = "ce", focus: str = "dpsm") -> list[str]:
    """Say what the runs show.

    Args:
        records: the runs.
        reference: loss type to compare with.
        focus: loss type whose comparison comes first and in full.

    Returns:
        Sentences, the most important first. Runs that failed or diverged are named as such and not compared.
    """
    usable = [record for record in records if record.comparable]
    base = next((record for record in usable if record.loss_type == reference), None)
    tested = [record for record in usable if record.loss_type != reference]
    tested.sort(key=lambda record: record.loss_type != focus)
    sentences = []
    for record in tested if base is not None else []:
        assert base is not None
        sentences += _compare(record, base)
        sentences += _schedule(record) + _cost(record, base) if record.loss_type == focus else []
    sentences += _calibration(tested, base) if base is not None else []
    sentences += _weak_texts(usable)
    for record in usable:
        sentences += _overfit(record)
    sentences += _failures(records)
    if base is None:
        sentences.insert(0, f"There is no finished {reference!r} run to compare with.")
    elif not tested:
        sentences.insert(0, f"Only the reference run {base.name!r} has finished: there is nothing to compare it with.")
    sentences += _busy(usable) + _same_start(usable)
    sentences.append(_scope(records))
    if base is not None and tested:
        sentences.append(_noise(base))
    return sentences
