"""What single runs show, one of each variation, in plain sentences derived from their numbers alone.

A campaign of several seeds is judged by tests (`verdict`); one run each allows no test over seeds. "Better" and
"worse" are said here only where the 95 % intervals of the two evaluations do not overlap (`standing`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...calibration.intervals import Interval
from ...statistics import Standing, standing
from ..runner.records import Record

#: Sentences on the page beside the headline; what else there is to say stands in its details.
POINTS = 5
# Differences below this share are called equal: one run cannot tell them from the choice of seed.
TIE = 0.005
# Relative difference of two sums of the same float32 numbers in another order, over a batch's tokens.
_FLOAT_ERROR = 1e-5
# ROUGE-Lsum (out of 100) of texts that share little more than frequent words with the reference.
WEAK_ROUGE = 10.0
# How a run ended that is not compared.
_ENDED = {
    "failed": "failed", "interrupted": "was interrupted", "oom": "ran out of memory", "paused": "was paused",
    "pruned": "was stopped early", "running": "has not ended",
}  # fmt: skip


@dataclass(frozen=True)
class SingleRun:
    """A run among others that differ in the loss: its name among them, its title, its record, the split compared.

    ``scaled`` is a run that is read after temperature scaling, beside itself before.
    """

    name: str
    title: str
    record: Record
    split: str = "validation"
    scaled: bool = False

    @property
    def scoring_rule(self) -> str:
        """Return the loss that it was trained with."""
        return str(self.record.arguments.get("scoring_rule", self.name))

    @property
    def is_reference(self) -> bool:
        """Return whether the others are compared with it: cross-entropy as it is."""
        return self.scoring_rule == "ce" and not self.scaled

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
        return self.record.value(metric, split=self.split, scaled=self.scaled)

    def interval(self, metric: str) -> Interval | None:
        """Return the 95 % interval of a figure of the evaluation, None where it has none."""
        ending = "_scaled" if self.scaled else ""
        bounds = [self.metrics.get(f"{metric}_{end}{ending}") for end in ("low", "high")]
        if None in bounds:
            held = self.calibration.get("scaled") if self.scaled else self.calibration
            bounds = ((held or {}).get("intervals") or {}).get(metric) or [None, None]
        low, high = bounds
        return None if low is None or high is None else Interval(float(low), float(high))

    def logged(self, key: str) -> list[tuple[int, float]]:
        """Return steps and values of a figure of the log, without those that are missing or not finite."""
        found = [(entry.get("step", 0), entry.get(key)) for entry in self.record.history]
        return [(int(step), float(value)) for step, value in found if value is not None]


@dataclass(frozen=True)
class Story:
    """What runs show: the chief sentence, at most `POINTS` more, and the details."""

    headline: str
    points: tuple[str, ...]
    details: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """Return all of them, the most important first."""
        return (self.headline, *self.points, *self.details)


class Measure(NamedTuple):
    """A figure that runs are compared by; ``better`` is 1 where more is better, -1 where less is."""

    key: str
    words: str
    better: int = -1
    decimals: int = 4
    points: bool = False


_PERPLEXITY = Measure("perplexity", "perplexity", decimals=2)
_ECE = Measure("ece_15", "ECE-15")
_ROUGE = Measure("rougeLsum", "ROUGE-Lsum", better=1, decimals=2)
_ACCURACY = Measure("token_accuracy", "token accuracy", better=1, points=True)
MEASURES = (_ROUGE, _PERPLEXITY, Measure("brier", "Brier score"), _ECE, _ACCURACY)


def _join(words: Sequence[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _change(key: str, run: SingleRun, reference: SingleRun) -> float | None:
    """Return a run's relative difference from the reference, above 0 where it is higher."""
    ours, theirs = run.value(key), reference.value(key)
    if ours is None or theirs is None:
        return None
    if theirs == 0:
        return 0.0 if ours == 0 else math.copysign(math.inf, ours)
    return (ours - theirs) / abs(theirs)


def judged(run: SingleRun, reference: SingleRun, key: str, better: int) -> Standing:
    """Say whether a run's figure is better or worse than another's, by their intervals; the one place that decides."""
    ours, theirs = run.value(key), reference.value(key)
    if ours is None or theirs is None:
        return Standing.CANNOT_TELL
    return standing(ours, theirs, run.interval(key), reference.interval(key), better=better)


def compared(run: SingleRun, reference: SingleRun) -> list[tuple[Measure, Standing, float]]:
    """Return the figures that both runs have, how the run stands on each, and its relative difference."""
    changes = [(measure, _change(measure.key, run, reference)) for measure in MEASURES]
    return [(m, judged(run, reference, m.key, m.better), change) for m, change in changes if change is not None]


def size_of(measure: Measure, change: float, ours: float, theirs: float) -> str:
    """Return how much higher or lower a figure is, in words."""
    if abs(change) < TIE:
        return f"the same within {100 * TIE:g} %"
    if measure.points:
        return f"{100 * abs(ours - theirs):.2f} points {'higher' if change > 0 else 'lower'}"
    if change >= 2:
        return f"{change + 1:.1f} times as high"
    return f"{100 * abs(change):.1f} % {'higher' if change > 0 else 'lower'}"


def _phrase(measure: Measure, change: float, ours: float, theirs: float) -> str:
    if measure.points:
        figures = f"{100 * ours:.2f} % against {100 * theirs:.2f} %"
    else:
        figures = f"{ours:,.{measure.decimals}f} against {theirs:,.{measure.decimals}f}"
    return f"{measure.words} {size_of(measure, change, ours, theirs)} ({figures})"


def _head(run: SingleRun, reference: SingleRun) -> str:
    """Say in a sentence on which figures a run is better, on which it is worse, and which leave it open."""
    found = compared(run, reference)
    a, b = run.title, reference.title
    if not found:
        return f"{a} and {b} have no evaluation figure in common, so they cannot be compared."
    wins, losses, open_ = (
        [measure.words for measure, said, _ in found if said is kind]
        for kind in (Standing.BETTER, Standing.WORSE, Standing.CANNOT_TELL)
    )
    rest = f"; {_join(open_)} cannot be told apart" if open_ else ""
    if wins and losses:
        return f"On this run {a} is better than {b} on {_join(wins)} and worse on {_join(losses)}{rest}."
    if wins:
        return f"On this run {a} is better than {b} on {_join(wins)}{rest or ' and worse on none of the figures'}."
    if losses:
        return f"On this run {a} loses to {b}: it is worse on {_join(losses)} and better on none of the figures{rest}."
    if all(abs(change) < TIE for *_, change in found):
        return f"On this run {a} and {b} come out the same within {100 * TIE:g} % on every figure compared."
    return f"On this run {a} and {b} cannot be told apart on {_join(open_, 'or')}."


def _figures(run: SingleRun, reference: SingleRun) -> str | None:
    phrases = []
    for measure, _, change in compared(run, reference):
        ours, theirs = run.value(measure.key), reference.value(measure.key)
        assert ours is not None and theirs is not None  # they have a difference
        phrases.append(_phrase(measure, change, ours, theirs))
    return f"{run.title} against {reference.title}: {'; '.join(phrases)}." if phrases else None


def _bins_disagree(run: SingleRun, reference: SingleRun) -> Iterator[str]:
    sides = {bins: judged(run, reference, f"ece_{bins}", -1) for bins in (10, 15, 100)}
    if {Standing.BETTER, Standing.WORSE} <= set(sides.values()):
        words = {Standing.CANNOT_TELL: "not to be told apart"}
        parts = [f"{words.get(side, side.value)} at {bins}" for bins, side in sides.items()]
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


def _not_a_better_model(tested: Sequence[SingleRun], base: SingleRun) -> str | None:
    changes = [(_change("ece_15", run, base), _change("perplexity", run, base)) for run in tested]
    if any(ece is not None and ppl is not None and ece <= -TIE and ppl >= TIE for ece, ppl in changes):
        return (
            "A lower ECE beside a higher perplexity is not a better model: one that only ever predicts the overall "
            "frequencies of the tokens has an ECE near 0."
        )
    return None


def _gaps(runs: Sequence[SingleRun]) -> str | None:
    """Give the mean confidence less the accuracy of each run, with a word where the interval leaves no doubt."""
    words = []
    for run in runs:
        if gap := run.value("signed_gap"):
            interval = run.interval("signed_gap")
            sure = interval is not None and (interval.low > 0 or interval.high < 0)
            word = f" ({'over' if gap > 0 else 'under'}confident)" if sure else ""
            words.append(f"{run.title} {100 * gap:+.2f} points{word}")
    return f"Mean confidence minus accuracy: {_join(words)}." if words else None


def _conflict(run: SingleRun) -> str | None:
    """Say where confidence and NLL ask for opposite temperatures; of the figures before scaling alone."""
    if run.scaled or not run.value("temperature_conflict"):
        return None
    gap, excess = run.value("signed_gap"), run.value("nll_entropy_gap")
    if gap is None or excess is None:
        return None
    over = gap > 0
    return (
        f"No temperature can help both the confidence and the NLL of {run.title}: it is "
        f"{'over' if over else 'under'}confident by {100 * abs(gap):.2f} points, while its labels are "
        f"{'more' if over else 'less'} likely than it expects (NLL - entropy {excess:+.4f}), each beyond its interval."
    )


def _schedule(run: SingleRun) -> str | None:
    highest = max((alpha for _, alpha in run.logged("alpha")), default=None)
    if highest is None:
        return None
    if highest < 1:
        return (
            f"{run.title}: α, the weight of the Brier score, never exceeded {highest:.2f}; part of the loss stayed "
            "cross-entropy."
        )
    described = next((str(e["alpha_schedule"]) for e in run.record.history if "alpha_schedule" in e), "")
    ramp = re.fullmatch(r"(?:linear|cosine): alpha \S+ -> 1 over (\d+) steps \(of (\d+)\)", described)
    if ramp is None:
        return f"{run.title}: α followed the schedule {described!r}." if described else None
    warmup, total = int(ramp[1]), int(ramp[2])
    rest = f"{100 * (total - warmup) / total:.0f} %"
    return (
        f"{run.title}: α reached 1 after {warmup:,} of {total:,} steps, so the last {rest} of training was pure Brier "
        "score."
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
    return (
        f"The NLL of {run.title} on the {run.split} split was lowest at step {step:,} ({lowest:.4f}) and has risen to "
        f"{final:.4f}."
    )


def _busy(runs: Sequence[SingleRun]) -> dict[str, str]:
    """Return why runs seem to have shared the machine with other programs: then seconds say nothing about the loss."""
    found = {}
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
        found[run.name] = why
    return found


def _caution(busy: Mapping[str, str]) -> str | None:
    if not busy:
        return None
    return (
        f"Caution: the run{'' if len(busy) == 1 else 's'} {_join(list(map(repr, busy)))} shared the machine with "
        f"other programs ({'; '.join(busy.values())}), so speeds and seconds compare with nothing."
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
            said = run.record.message.removeprefix(run.record.status).lstrip(" ;:")
            yield f"The run {run.name!r} {what} and is not compared{f': {said}' if said else ''}."


def _starts(runs: Sequence[SingleRun]) -> dict[str, float]:
    """Return by name the NLL on the validation split before training, of the runs that were evaluated then."""
    found = {run.name: [nll for step, nll in run.logged("eval_nll") if step == 0] for run in runs}
    return {name: values[0] for name, values in found.items() if values}


def _first_batch(runs: Sequence[SingleRun]) -> float | None:
    """Return the NLL of the first batch before the first update, where all runs have logged the same.

    The figures of one batch differ by rounding where the losses sum in another order.
    """
    found = [[nll for step, nll in run.logged("nll") if step == 1] for run in runs]
    if not found or not all(found):
        return None
    first = [values[0] for values in found]
    return first[0] if all(math.isclose(nll, first[0], rel_tol=_FLOAT_ERROR) for nll in first) else None


def began_alike(runs: Sequence[SingleRun]) -> bool:
    """Return whether runs are known to have started from the same weights: by evaluations before it, or one batch."""
    usable = [run for run in runs if run.comparable and not run.scaled]
    starts = _starts(usable)
    if len(set(starts.values())) > 1:
        return False
    return len(starts) == len(usable) or _first_batch(usable) is not None


def _same_start(runs: Sequence[SingleRun]) -> str | None:
    """Say whether the runs began with the same weights; nothing where their logs do not show it."""
    if len(runs) < 2:
        return None
    starts = _starts(runs)
    if len(set(starts.values())) > 1:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in starts.items())
        return (
            "Caution: the runs did NOT start from the same weights (NLL on the validation split before training: "
            f"{figures})."
        )
    if len(starts) == len(runs):
        value = next(iter(starts.values()))
        return (
            "All runs started from the same weights: the NLL on the validation split before training is "
            f"{value:.4f} for each."
        )
    batch = _first_batch(runs)
    if batch is None:
        return None
    return f"All runs started from the same weights: the NLL of the first training batch is {batch:.4f} for each."


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
    splits = sorted({run.split for run in runs})
    counts = sorted({int(count) for run in runs if (count := run.value("tokens")) is not None})
    given = [run.record.arguments.get("seed") for run in runs]
    seeds = sorted({str(seed) for seed in given if seed is not None})
    split = f" on the {' and '.join(splits)} split"
    size = f" ({'–'.join(f'{count:,}' for count in (counts[:1] + counts[1:][-1:]))} tokens)" if counts else ""
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}" if seeds else "seed not recorded"
    return (
        f"All figures are token-level{split}{size}; calibration is top-label (confidence is the largest probability), "
        f"ECE-10/15/100 with 10, 15 and 100 bins of equal width. One run each, {seed}."
    )


def story_of(runs: Sequence[SingleRun]) -> Story:
    """Say what runs show, each against cross-entropy, DPSM first and in full.

    Runs that failed or diverged are named as such and not compared.
    """
    usable = [run for run in runs if run.comparable]
    base = next((run for run in usable if run.is_reference), None)
    tested = [run for run in usable if not run.is_reference]
    tested.sort(key=lambda run: run.scoring_rule != "dpsm")
    alone = [run for run in usable if not run.scaled]  # each run once
    busy = _busy(alone)
    heads = [_head(run, base) for run in tested] if base is not None else []
    if base is None:
        heads = ["There is no finished 'ce' run to compare with."]
    elif not tested:
        heads = [f"Only the reference run {base.name!r} has finished: there is nothing to compare it with."]
    stopped = " ".join(_failures([run for run in runs if not run.scaled])) or None
    start = _same_start(alone)
    unequal = start is not None and start.startswith("Caution")
    dpsm = [run for run in tested if run.scoring_rule == "dpsm"]
    # the most important first: what does not fit among the points stands in the details
    wanted: list[str | None] = [stopped, start if unequal else None, _caution(busy)]
    details: list[str | None] = []
    if base is not None and tested:
        wanted += [heads[1] if len(heads) == 2 else None, _not_a_better_model(tested, base), _weak_texts(usable)]
        wanted += [_noise(base), *map(_schedule, dpsm)]
        details += heads[2 if len(heads) == 2 else 1 :]
        for run in tested:
            details += [_figures(run, base), *_bins_disagree(run, base), *_on_the_way(run, base)]
        details += [_cost(run, base) for run in dpsm if not {run.name, base.name} & set(busy)]
    details += [_gaps([base, *tested] if base is not None else []), *map(_conflict, alone), *map(_overfit, alone)]
    details += [None if unequal else start, _scope(alone) if alone else None]
    points = [sentence for sentence in wanted if sentence is not None]
    rest = [sentence for sentence in details if sentence is not None]
    return Story(heads[0], tuple(points[:POINTS]), (*points[POINTS:], *rest))
