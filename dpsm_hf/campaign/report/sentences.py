"""What single runs show, one of each variation, in plain sentences derived from their numbers alone.

A campaign of several seeds is judged by tests (`verdict`); one run each allows no test, so these only describe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..runner.records import Record

# Differences below this share are called equal: one run cannot tell them from the choice of seed.
TIE = 0.005
# ROUGE-Lsum (out of 100) of texts that share little more than frequent words with the reference.
WEAK_ROUGE = 10.0
# How a run ended that is not compared.
_ENDED = {
    "failed": "failed", "interrupted": "was interrupted", "oom": "ran out of memory", "paused": "was paused",
    "pruned": "was stopped early", "running": "has not ended",
}  # fmt: skip


@dataclass(frozen=True)
class SingleRun:
    """A run among others that differ in the loss: its name among them, its title, its record, the split compared."""

    name: str
    title: str
    record: Record
    split: str = "validation"

    @property
    def scoring_rule(self) -> str:
        """Return the loss that it was trained with."""
        return str(self.record.arguments.get("scoring_rule", self.name))

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

    def value(self, metric: str) -> float | None:
        """Return a figure of the end or of what the training cost, None where it is missing or not finite."""
        if metric in self.record.efficiency:
            return self.record.efficiency[metric]
        return self.record.value(metric, split=self.split)

    def logged(self, key: str) -> list[tuple[int, float]]:
        """Return steps and values of a figure of the log, without those that are missing or not finite."""
        found = [(entry.get("step", 0), entry.get(key)) for entry in self.record.history]
        return [(int(step), float(value)) for step, value in found if value is not None]


class _Measure(NamedTuple):
    key: str
    words: str
    better: int = -1
    decimals: int = 4
    points: bool = False


_PERPLEXITY = _Measure("perplexity", "perplexity", decimals=2)
_ECE = _Measure("ece_15", "ECE-15")
_ROUGE = _Measure("rougeLsum", "ROUGE-Lsum", better=1, decimals=2)
_ACCURACY = _Measure("token_accuracy", "token accuracy", better=1, points=True)
_MEASURES = (_ROUGE, _PERPLEXITY, _Measure("brier", "Brier score"), _ECE, _ACCURACY)


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _change(key: str, run: SingleRun, reference: SingleRun) -> float | None:
    """Return a run's relative difference from the reference, above 0 where it is higher."""
    ours, theirs = run.value(key), reference.value(key)
    if ours is None or theirs is None:
        return None
    if theirs == 0:
        return 0.0 if ours == 0 else math.copysign(math.inf, ours)
    return (ours - theirs) / abs(theirs)


def _side(measure: _Measure, change: float) -> int:
    """Return 1 where the run is better than the reference, -1 where it is worse, 0 for a tie."""
    return 0 if abs(change) < TIE else measure.better if change > 0 else -measure.better


def _phrase(measure: _Measure, change: float, ours: float, theirs: float) -> str:
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
    words: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    phrases = []
    for measure in _MEASURES:
        ours, theirs = run.value(measure.key), reference.value(measure.key)
        change = _change(measure.key, run, reference)
        if ours is not None and theirs is not None and change is not None:
            words[_side(measure, change)].append(measure.words)
            phrases.append(_phrase(measure, change, ours, theirs))
    a, b = run.title, reference.title
    if not phrases:
        return [f"{a} and {b} have no evaluation figure in common, so they cannot be compared."]
    wins, losses = words[1], words[-1]
    if wins:
        rest = f"worse on {_join(losses)}" if losses else "worse on none of the figures compared"
        head = f"{a} is better than {b} on {_join(wins)} and {rest}."
    elif losses:
        head = f"{a} loses to {b}: it is worse on {_join(losses)} and better on none of the figures compared."
    else:
        head = f"{a} and {b} come out the same within {100 * TIE:g} % on every figure compared."
    figures = f"{a} against {b}: {'; '.join(phrases)}."
    return [f"On this run {head}", figures, *_bins_disagree(run, reference), *_on_the_way(run, reference)]


def _bins_disagree(run: SingleRun, reference: SingleRun) -> Iterator[str]:
    changes = {bins: _change(f"ece_{bins}", run, reference) for bins in (10, 15, 100)}
    sides = {bins: _side(_ECE, change) for bins, change in changes.items() if change is not None}
    if {1, -1} <= set(sides.values()):
        parts = [f"{('equal', 'better', 'worse')[side]} at {bins}" for bins, side in sides.items()]
        yield f"Who is better calibrated depends on the number of bins: {run.title} is {_join(parts)}."


def _on_the_way(run: SingleRun, reference: SingleRun) -> Iterator[str]:
    """Say at how many evaluations during training the run's ECE was the lower: one at the end may be luck."""
    ours, theirs = dict(run.logged("eval_ece_15")), dict(reference.logged("eval_ece_15"))
    steps = (set(ours) & set(theirs)) - {0}
    if len(steps) >= 3:
        lower = sum(ours[step] < theirs[step] for step in steps)
        moral = "" if lower in (0, len(steps)) else ": the more mixed, the less the last one alone means"
        yield (
            f"Over the {len(steps)} evaluations during training {run.title}'s ECE-15 was lower than "
            f"{reference.title}'s at {lower}{moral}."
        )


def _calibration(tested: Sequence[SingleRun], base: SingleRun) -> Iterator[str]:
    changes = [(_change("ece_15", run, base), _change("perplexity", run, base)) for run in tested]
    if any(ece is not None and ppl is not None and ece <= -TIE and ppl >= TIE for ece, ppl in changes):
        yield (
            "A lower ECE beside a higher perplexity is not a better model: one that only ever predicts the overall "
            "frequencies of the tokens has an ECE near 0."
        )
    gaps = [(run.title, gap) for run in (base, *tested) if (gap := run.value("signed_gap"))]
    if gaps:
        words = [f"{title} {100 * gap:+.2f} points ({'over' if gap > 0 else 'under'}confident)" for title, gap in gaps]
        yield f"Mean confidence minus accuracy: {_join(words)}."


def _schedule(run: SingleRun) -> str | None:
    highest = max((alpha for _, alpha in run.logged("alpha")), default=None)
    if highest is None:
        return None
    if highest < 1:
        return (
            f"α, the weight of the Brier score, never exceeded {highest:.2f}: part of the loss stayed cross-entropy."
        )
    described = next((str(e["alpha_schedule"]) for e in run.record.history if "alpha_schedule" in e), "")
    ramp = re.fullmatch(r"(?:linear|cosine): alpha \S+ -> 1 over (\d+) steps \(of (\d+)\)", described)
    if ramp is None:
        return f"α followed the schedule {described!r}." if described else None
    warmup, total = int(ramp[1]), int(ramp[2])
    return (
        f"α reached 1 after {warmup:,} of {total:,} steps, so the last {100 * (total - warmup) / total:.0f} % of "
        "training was pure Brier score."
    )


def _cost(run: SingleRun, reference: SingleRun) -> str | None:
    ours, theirs = run.value("tokens_per_second"), reference.value("tokens_per_second")
    if not ours or not theirs:
        return None
    return (
        f"{run.title} trained {ours:,.0f} scored tokens a second and {reference.title} {theirs:,.0f} "
        f"(median of the log, {ours / theirs:.2f} times as many)."
    )


def _overfit(run: SingleRun) -> str | None:
    evals = [pair for pair in run.logged("eval_nll") if math.isfinite(pair[1])]
    step, lowest = min(evals, key=lambda pair: pair[1], default=(0, math.inf))
    final = run.value("nll")
    if final is None or final <= lowest * 1.01:
        return None
    return f"The held-out NLL of {run.title} was lowest at step {step:,} ({lowest:.4f}) and has risen to {final:.4f}."


def _busy(runs: Sequence[SingleRun]) -> Iterator[str]:
    """Name the runs that shared the machine with other programs: their seconds say nothing about the loss."""
    took = {run.name: run.record.seconds for run in runs}
    cores = {r.name: cpu / took[r.name] for r in runs if (cpu := r.value("cpu_seconds")) and took[r.name]}
    for run in runs:
        speeds = sorted(speed for _, speed in run.logged("tokens_per_second") if speed)
        if len(speeds) >= 5 and speeds[len(speeds) // 5] < 0.6 * speeds[len(speeds) // 2]:
            why = f"its speed varied between {speeds[0]:,.0f} and {speeds[-1]:,.0f} tokens a second"
        elif run.name in cores and cores[run.name] < 0.7 * max(cores.values()):
            why = f"it got {cores[run.name]:.1f} processor cores where another run got {max(cores.values()):.1f}"
        else:
            continue
        yield (
            f"Caution: the run {run.name!r} shared the machine with other programs ({why}), so its speed and its "
            "seconds compare with nothing."
        )


def _failures(runs: Sequence[SingleRun]) -> Iterator[str]:
    for run in runs:
        if run.record.status == "diverged":
            keys = ("loss", "nll", "grad_norm", "eval_nll", "eval_loss")
            bad = (e for e in run.record.history if any(key in e and e[key] is None for key in keys))
            first = next(bad, None)
            where = "" if first is None else f" from step {int(first.get('step', 0)):,} on"
            yield f"The run {run.name!r} ({run.title}) diverged (not finite{where}) and is not compared."
        elif not run.comparable:
            what = _ENDED.get(run.record.status, "has no evaluation figures")
            reason = f": {run.record.message}" if run.record.message else ""
            yield f"The run {run.name!r} {what} and is not compared{reason}."


def _same_start(runs: Sequence[SingleRun]) -> str | None:
    found = {run.name: [nll for step, nll in run.logged("eval_nll") if step == 0] for run in runs}
    if len(runs) < 2 or not all(found.values()):
        return None
    starts = {name: values[0] for name, values in found.items()}
    if len(set(starts.values())) == 1:
        value = next(iter(starts.values()))
        return f"All runs started from the same weights: the held-out NLL before training is {value:.4f} for each."
    figures = ", ".join(f"{name} {value:.4f}" for name, value in starts.items())
    return f"Caution: the runs did NOT start from the same weights (held-out NLL before training: {figures})."


def _weak_texts(runs: Sequence[SingleRun]) -> str | None:
    best = max((score for run in runs if (score := run.value(_ROUGE.key)) is not None), default=WEAK_ROUGE)
    if best >= WEAK_ROUGE:
        return None
    return (
        f"No ROUGE-Lsum reaches {WEAK_ROUGE:g}: none of these models writes usable texts, and which of them leads on "
        "ROUGE says nothing."
    )


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


def _scope(runs: Sequence[SingleRun]) -> str:
    """Say what the figures are: kind, split, size, bins and seeds."""
    splits = sorted({str(run.calibration["split"]) for run in runs if run.calibration.get("split")})
    counts = sorted({int(count) for run in runs if (count := run.value("tokens")) is not None})
    given = [run.record.arguments.get("seed") for run in runs]
    seeds = sorted({str(seed) for seed in given if seed is not None})
    split = f" on the {'/'.join(splits)} split" if splits else " on the evaluation split"
    size = f" ({'–'.join(f'{count:,}' for count in (counts[:1] + counts[1:][-1:]))} tokens)" if counts else ""
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}" if seeds else "seed not recorded"
    return (
        f"All figures are token-level{split}{size}; calibration is top-label (confidence is the largest probability), "
        f"ECE-10/15/100 with 10, 15 and 100 bins of equal width. One run each, {seed}."
    )


def sentences_on(runs: Sequence[SingleRun]) -> list[str]:
    """Say what runs show in sentences, the most important first: each against cross-entropy, DPSM first and in full.

    Runs that failed or diverged are named as such and not compared.
    """
    usable = [run for run in runs if run.comparable]
    base = next((run for run in usable if run.scoring_rule == "ce"), None)
    tested = [run for run in usable if run.scoring_rule != "ce"]
    tested.sort(key=lambda run: run.scoring_rule != "dpsm")
    said: list[str | None] = []
    if base is None:
        said.append("There is no finished 'ce' run to compare with.")
    elif not tested:
        said.append(f"Only the reference run {base.name!r} has finished: there is nothing to compare it with.")
    else:
        for run in tested:
            said += _compare(run, base)
            said += [_schedule(run), _cost(run, base)] if run.scoring_rule == "dpsm" else []
    said += [] if base is None else _calibration(tested, base)
    said += [_weak_texts(usable), *map(_overfit, usable), *_failures(runs)]
    said += [*_busy(usable), _same_start(usable), _scope(runs)]
    said.append(_noise(base) if base is not None and tested else None)
    return [sentence for sentence in said if sentence is not None]
