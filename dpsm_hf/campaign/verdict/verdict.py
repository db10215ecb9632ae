"""The verdict of a campaign: for every claim, variation and setting holds, fails or cannot tell, with its interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...runtime.files import json_number
from ...statistics import Decision, decide, power_note, sign_agreement
from ..audit.audit import audited_runs
from ..spec.design import Campaign, Setting, Variation
from .claims import AUDITED, Claim, Finding, Judged, both_ends, claims_of, corrected, undecided, with_note
from .results import Pairs, Results

#: Share of settings and seeds that have to agree.
AGREEMENT = 0.75

#: Fewer settings and seeds than this cannot agree: three quarters of them would be all.
FEWEST_SIGNS = 4

MAIN_STUDY = "main"


def verdict(results: Results, claims: Sequence[Claim] | None = None, study: str = MAIN_STUDY) -> list[Finding]:
    """Judge every claim for every variation but the two that it compares with, in every setting of a study.

    ``holds`` and ``fails`` are both conclusions of a one-sided paired test at 5 %, corrected by Holm within a family:
    the same claim over all variations of a role and all settings. Everything else is ``cannot tell``. The claims are
    by default those of the task.
    """
    claims = claims_of(results.campaign.task) if claims is None else claims
    found: list[Finding] = []
    for claim in claims:
        tests: dict[str, list[Judged]] = {}
        for setting in results.settings(study):
            for variation in _judged(results, setting):
                # a variation that reads figures after scaling is judged on calibration before scaling alone
                if variation.of is None or (claim.family == "calibration" and claim.scaled is False):
                    judged = _judge(results, claim, setting, variation)
                    tests.setdefault(variation.role, []).append(judged)
        found += [finding for family in tests.values() for finding in corrected(family)]
    return [*found, *robustness(results, claims, study)]


def _judged(results: Results, setting: Setting) -> list[Variation]:
    """Return the variations of a setting but the two that they are compared with."""
    campaign, there = results.campaign, results.variations(setting)
    return [v for v in campaign.variations if v.name in there and v.name not in (campaign.reference, campaign.brier)]


def robustness(results: Results, claims: Sequence[Claim], main_study: str = MAIN_STUDY) -> list[Finding]:
    """Judge whether the signs of the main study's differences return in the other settings and seeds.

    For quality and for calibration before scaling: the sign of the mean difference to the reference in the first
    setting of the main study is what is expected; it has to return in at least 75 % of all other settings and seeds.
    Where it is the worse sign that returns so often, the claim fails.
    """
    first = next(iter(results.settings(main_study)), None)
    if first is None:
        return []
    others = [setting for setting in results.settings() if setting != first]
    found = []
    for claim in claims:
        if claim.against != "reference" or claim.scaled is True or claim.family not in ("quality", "calibration"):
            continue
        for variation in _judged(results, first):
            if variation.of is not None:
                continue
            # leave out runs that belong to the first setting too: they would agree with themselves
            known = {point.run_id for point in results.points(first, variation.name)}
            cells: dict[Hashable, dict[Hashable, float | None]] = {}
            for setting in others:
                seeds = {p.seed for p in results.points(setting, variation.name) if p.run_id not in known}
                there = _differences(results, claim, setting, variation) if seeds else {}
                cell: dict[Hashable, float | None] = {s: x for s, x in there.items() if s in seeds}
                if cell:  # empty where the setting has no reference runs
                    cells[setting.label] = cell
            if cells:
                main = _differences(results, claim, first, variation).values()
                found.append(_agreement(claim, variation, [x for x in main if x is not None], cells))
    return found


def _differences(results: Results, claim: Claim, setting: Setting, variation: Variation) -> dict[int, float | None]:
    """Return the difference to the reference by seed; None where one of the two is missing."""
    pairs = _pairs(results, claim, setting, variation)
    found: dict[int, float | None] = dict(zip(pairs.seeds, (pairs.ours - pairs.theirs).tolist(), strict=True))
    return {**found, **dict.fromkeys(pairs.missing)}


def overall(findings: Iterable[Finding], variation: str) -> dict[str, str]:
    """Return a word for each claim about a variation: over all settings it holds, fails in one, or cannot be told."""
    words: dict[str, set[str]] = {}
    for finding in findings:
        if finding.variation == variation:
            words.setdefault(finding.key, set()).add(finding.decision)
    fails, unknown = Decision.FAILS.value, Decision.CANNOT_TELL.value
    return {
        key: fails if fails in said else unknown if unknown in said else Decision.HOLDS.value
        for key, said in words.items()
    }


def _pairs(results: Results, claim: Claim, setting: Setting, variation: Variation) -> Pairs:
    campaign = results.campaign
    # a variation that reads figures after scaling is compared with the others' before scaling
    scaled = None if variation.of is not None else claim.scaled
    by_reference, by_brier = (
        results.pairs(setting, variation.name, other, claim.metric, scaled=scaled)
        for other in (campaign.reference, campaign.brier)
    )
    if claim.against != "worse of both":
        return by_reference if claim.against == "reference" else by_brier
    worst = max if claim.at_most is not None else min
    brier = dict(zip(by_brier.seeds, by_brier.theirs, strict=True))
    triples = zip(by_reference.seeds, by_reference.ours, by_reference.theirs, strict=True)
    both = {seed: (x, worst(y, brier[seed])) for seed, x, y in triples if seed in brier}
    planned = {seed for pairs in (by_reference, by_brier) for seed in (*pairs.seeds, *pairs.missing)}
    ours, theirs = (np.array([pair[side] for pair in both.values()]) for side in (0, 1))
    return Pairs(tuple(both), ours, theirs, tuple(sorted(planned - set(both))))


def _judge(results: Results, claim: Claim, setting: Setting, variation: Variation) -> Judged:
    pairs = _pairs(results, claim, setting, variation)
    missing = f"missing: seed {', '.join(map(str, pairs.missing))}" if pairs.missing else ""
    finding = undecided(claim, variation.name, setting.label, variation.role, len(pairs.seeds), missing)
    if not pairs.seeds:
        return Judged(finding)
    if not (np.isfinite(pairs.ours).all() and np.isfinite(pairs.theirs).all()):
        other = results.campaign.brier if claim.against == "brier" else results.campaign.reference
        ours, theirs = (results.values(setting, name, "train_seconds") for name in (variation.name, other))
        times = ([of.get(seed, math.nan) for seed in pairs.seeds] for of in (ours, theirs))
        return _censored(finding, pairs, *map(np.array, times))
    try:
        test, opposite = both_ends(finding, pairs.ours, pairs.theirs)
    except ValueError as error:  # a ratio needs positive figures
        return Judged(with_note(finding, str(error)))
    if len(pairs.seeds) < 2:
        finding = with_note(finding, "one seed has no spread: repeat with others")
    elif math.isnan(test.p_value):
        finding = with_note(finding, "every seed shows exactly the same, so nothing is known of the spread over seeds")
    elif claim.scale == "difference" and test.decision is Decision.CANNOT_TELL:
        differences = pairs.ours - pairs.theirs
        power = power_note(float(differences.std(ddof=1)), len(differences), unit=claim.unit)
        finding = with_note(finding, power.sentence)
    finding = replace(
        finding, estimate=test.estimate, low=json_number(test.interval.low), high=json_number(test.interval.high),
        p_value=json_number(test.p_value),
    )  # fmt: skip
    return Judged(finding, test.p_value, opposite.p_value)


def _censored(finding: Finding, pairs: Pairs, our_training: np.ndarray, their_training: np.ndarray) -> Judged:
    """Judge times of which some are infinite, of runs that never arrived.

    All that is known of such a time is that it is longer than the training. With the training's time in its place
    the ratio is too small where ours never arrived, so that the claim may fail by it but not hold, and too large where
    the others never did, so that it may hold but not fail.
    """
    ours_never, theirs_never = np.isinf(pairs.ours), np.isinf(pairs.theirs)
    finding = with_note(
        finding,
        f"{ours_never.sum()} of its {len(pairs.ours)} runs never got there, {theirs_never.sum()} of those that it is "
        "compared with",
    )
    ours = np.where(ours_never, our_training, pairs.ours)
    theirs = np.where(theirs_never, their_training, pairs.theirs)
    neither = bool((ours_never & theirs_never).any())
    if neither or finding.at_most is None or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return Judged(finding)
    try:
        test, opposite = both_ends(finding, ours, theirs)
    except ValueError as error:  # a run had the quality before its first step, so a time is 0
        return Judged(with_note(finding, str(error)))
    may_hold, may_fail = not ours_never.any(), not theirs_never.any()
    if may_hold != may_fail:  # the training time stands in for an unknown, longer one
        finding = replace(finding, estimate=test.estimate)
        finding = with_note(finding, f"so the ratio is {'at most' if may_hold else 'at least'} this")
    finding = replace(
        finding,
        high=json_number(test.interval.high) if may_hold else None,
        low=json_number(test.interval.low) if may_fail else None,
        p_value=json_number(test.p_value) if may_hold else None,
    )
    return Judged(finding, test.p_value if may_hold else math.nan, opposite.p_value if may_fail else math.nan)


def _agreement(
    claim: Claim,
    variation: Variation,
    main: Sequence[float],
    cells: Mapping[Hashable, Mapping[Hashable, float | None]],
) -> Finding:
    metric = claim.metric
    if "_" in metric or "rouge" in metric:
        metric = metric.replace("ece_", "ECE-").replace("rouge", "ROUGE-")
    same_sign = Claim(
        f"same-sign-{claim.key}", "robustness",
        f"is on the better side of cross-entropy's {metric} in the first setting of the main study, and likewise in "
        f"at least {100 * AGREEMENT:.0f} % of all other settings and seeds",
        claim.metric, scale="share", at_least=AGREEMENT,
    )  # fmt: skip
    settings = "1 other setting" if len(cells) == 1 else f"{len(cells)} other settings"
    finding = undecided(same_sign, variation.name, settings, variation.role)
    mean = float(np.mean(main)) if main else math.nan
    if math.isnan(mean) or mean == 0:
        return with_note(finding, "the main study has no difference whose sign could return")
    agreement = sign_agreement(cells, 1 if mean > 0 else -1)
    seen = agreement.same + agreement.opposite + agreement.zero
    if not seen:
        return with_note(finding, "no other setting has been run")
    note = f"{agreement.same} of {seen} settings and seeds"
    decision = decide(agreement.bounds, at_least=AGREEMENT)
    if (mean > 0) == (claim.at_most is not None):  # the worse side: that it returns is no merit
        decision = Decision.FAILS if decision is Decision.HOLDS else Decision.CANNOT_TELL
        note = f"worse than cross-entropy in the first setting, and of the same sign in {note}"
    if seen + agreement.missing < FEWEST_SIGNS:
        decision = Decision.CANNOT_TELL
        note += f", which are too few to agree: at least {FEWEST_SIGNS} are needed"
    return replace(
        finding, decision=decision.value, estimate=agreement.share, low=agreement.interval.low,
        high=agreement.interval.high, pairs=seen,
        note=f"{note}; {agreement.missing} missing" if agreement.missing else note,
    )  # fmt: skip


# ---- by the audit --------------------------------------------------------------------------------------------------


def audited_claims(campaign: Campaign, audit: Mapping[str, Any]) -> list[Finding]:
    """Judge throughput and memory by the content of ``audit.json``, for every variation that it has measured.

    Throughput is tested on the rounds of the audit, each of which times all variations after another. Memory is
    counted, not sampled: its difference has no interval. What was audited with another reference, at another scale or
    with other arguments is left out.
    """
    if (audit["reference"], audit["scale"]) != (campaign.reference, campaign.scale):
        return []
    try:
        runs = audited_runs(campaign, audit["settings"].get("size"))
    except ValueError:  # the reference is not among the chosen points
        return []
    setting = f"audit, {audit['settings']['tokens']:,} tokens a step, {audit['machine']['device']}"
    speed: dict[str, list[Judged]] = {}
    memory = []
    for variation in campaign.variations:
        entry, run = audit["variations"].get(variation.name), runs.get(variation.name)
        compared = variation.name in (campaign.reference, campaign.brier)
        if compared or entry is None or run is None or entry.get("run") != run.id:
            continue
        throughput, need = (
            undecided(claim, variation.name, setting, variation.role, note=entry.get("message") or "not measured")
            for claim in AUDITED
        )
        speed.setdefault(variation.role, []).append(_speed(entry, throughput))
        memory.append(_memory(entry, need))
    return [finding for family in speed.values() for finding in corrected(family)] + memory


def _speed(entry: Mapping[str, Any], finding: Finding) -> Judged:
    rounds = [sample for sample in entry["samples"] if sample["reference_seconds"]]
    if not rounds:
        return Judged(finding)
    ours, theirs = (1 / np.array([sample[key] for sample in rounds]) for key in ("seconds", "reference_seconds"))
    test, opposite = both_ends(finding, ours, theirs)
    finding = replace(
        finding, estimate=test.estimate, low=json_number(test.interval.low), high=json_number(test.interval.high),
        pairs=len(rounds), p_value=json_number(test.p_value), note="pairs are rounds of the audit, not seeds",
    )  # fmt: skip
    return Judged(finding, test.p_value, opposite.p_value)


def _memory(entry: Mapping[str, Any], finding: Finding) -> Finding:
    difference = entry.get("peak_memory_difference_mb")
    if difference is None or finding.at_most is None:
        return finding
    decision = Decision.HOLDS if difference <= finding.at_most else Decision.FAILS
    note = "counted in one process, without spread"
    return replace(finding, decision=decision.value, estimate=difference, pairs=1, note=note)
