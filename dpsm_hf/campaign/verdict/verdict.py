"""The verdict of a campaign: for every claim, variation and setting holds, fails or cannot tell, with its interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...statistics import ClaimTest, Decision, claim_test, decide, power_note, sign_agreement
from .claims import Claim, claims_of
from .finding import ALPHA, Finding, Judged, corrected, finite, join, undecided
from .results import Pairs, Results, Setting

#: Share of settings and seeds that have to agree.
AGREEMENT = 0.75

#: Fewer settings and seeds than this cannot agree: three quarters of them would be all.
FEWEST_SIGNS = 4

MAIN_STUDY = "main"


def verdict(results: Results, claims: Sequence[Claim] | None = None, study: str = MAIN_STUDY) -> list[Finding]:
    """Judge every claim for every variation but the two that it compares with, in every setting of a study.

    ``holds`` and ``fails`` are both conclusions of a one-sided paired test at 5 %, corrected by Holm within a family:
    the same claim over all variations of a role and all settings. Everything else is ``cannot tell``.

    Args:
        results: figures of the campaign.
        claims: by default those of the task.
        study: whose settings are judged.
    """
    campaign = results.campaign
    claims = claims_of(campaign.task) if claims is None else claims
    found: list[Finding] = []
    for claim in claims:
        tests: dict[str, list[Judged]] = {}
        for setting in results.settings(study):
            for name in results.variations(setting):
                if name in (campaign.reference, campaign.brier):
                    continue
                role = campaign.variation(name).role
                if campaign.variation(name).of is not None and not _about_scaling(claim):
                    continue
                tests.setdefault(role, []).append(_judge(results, claim, setting, name, role))
        for family in tests.values():
            found += corrected(family)
    return [*found, *robustness(results, claims, study)]


def robustness(results: Results, claims: Sequence[Claim], main_study: str = MAIN_STUDY) -> list[Finding]:
    """Judge whether the signs of the main study's differences return in the other settings and seeds.

    For quality and for calibration before scaling: the sign of the mean difference to the reference in the first
    setting of the main study is what is expected; it has to return in at least 75 % of all other settings and seeds.
    """
    campaign = results.campaign
    found = []
    for claim in claims:
        if claim.against != "reference" or claim.scaled is True or claim.family not in ("quality", "calibration"):
            continue
        for variation in campaign.variations:
            if variation.name in (campaign.reference, campaign.brier) or variation.of is not None:
                continue
            first = next(iter(results.settings(main_study)), None)
            if first is None or variation.name not in results.variations(first):
                continue
            known = {point.run_id for point in results.points(first, variation.name)}
            cells: dict[Hashable, dict[Hashable, float | None]] = {}
            for setting in results.settings():
                if setting == first or variation.name not in results.variations(setting):
                    continue
                # leave out runs that belong to the first setting too: they would agree with themselves
                seeds = {p.seed for p in results.points(setting, variation.name) if p.run_id not in known}
                found_there = _differences(results, claim, setting, variation.name)
                cell: dict[Hashable, float | None] = {s: x for s, x in found_there.items() if s in seeds}
                if cell:  # empty where the setting has no reference runs
                    cells[setting.label] = cell
            if cells:
                main = list(_differences(results, claim, first, variation.name).values())
                found.append(_agreement(claim, variation.name, variation.role, main, cells))
    return found


def _differences(results: Results, claim: Claim, setting: Setting, variation: str) -> dict[int, float | None]:
    """Return the difference to the reference by seed; None where one of the two is missing."""
    pairs = _pairs(results, claim, setting, variation)
    found: dict[int, float | None] = dict(zip(pairs.seeds, (pairs.ours - pairs.theirs).tolist(), strict=True))
    return {**found, **dict.fromkeys(pairs.missing)}


def overall(findings: Iterable[Finding], variation: str) -> dict[str, str]:
    """Return one word for each claim about a variation: over all settings it holds, fails in one, or cannot be told.

    Args:
        findings: of `verdict`.
        variation: name.
    """
    words: dict[str, list[str]] = {}
    for finding in findings:
        if finding.variation == variation:
            words.setdefault(finding.key, []).append(finding.decision)
    return {
        key: Decision.FAILS.value
        if Decision.FAILS.value in decisions
        else Decision.HOLDS.value
        if set(decisions) == {Decision.HOLDS.value}
        else Decision.CANNOT_TELL.value
        for key, decisions in words.items()
    }


def _about_scaling(claim: Claim) -> bool:
    """Return whether a claim applies to variations that read figures after scaling: only unscaled calibration."""
    return claim.family == "calibration" and claim.scaled is False


def _pairs(results: Results, claim: Claim, setting: Setting, variation: str) -> Pairs:
    campaign = results.campaign
    # a variation that reads figures after scaling is compared with the others' before scaling
    read = None if campaign.variation(variation).of is not None else claim.scaled
    how: dict[str, Any] = {} if read is None else {"scaled": read}
    if claim.against != "worse of both":
        other = campaign.reference if claim.against == "reference" else campaign.brier
        pairs = results.pairs(setting, variation, other, claim.metric, **how)
    else:
        ours, theirs = (
            results.pairs(setting, variation, other, claim.metric, **how)
            for other in (campaign.reference, campaign.brier)
        )
        worst = max if claim.at_most is not None else min
        both = {
            seed: (x, worst(y, theirs.theirs[theirs.seeds.index(seed)]))
            for seed, x, y in zip(ours.seeds, ours.ours, ours.theirs, strict=True)
            if seed in theirs.seeds
        }
        missing = (set(ours.seeds) | set(theirs.seeds) | set(ours.missing) | set(theirs.missing)) - set(both)
        pairs = Pairs(
            tuple(both),
            np.array([x for x, _ in both.values()]),
            np.array([y for _, y in both.values()]),
            tuple(sorted(missing)),
        )
    return pairs


def _judge(results: Results, claim: Claim, setting: Setting, variation: str, role: str) -> Judged:
    pairs = _pairs(results, claim, setting, variation)
    missing = f"missing: seed {', '.join(map(str, pairs.missing))}" if pairs.missing else ""
    finding = undecided(claim, variation, setting.label, role, len(pairs.seeds), missing)
    if not len(pairs.seeds):
        return Judged(finding, math.nan, math.nan)
    if not (np.isfinite(pairs.ours).all() and np.isfinite(pairs.theirs).all()):
        return _censored(claim, pairs, finding, _training_times(results, claim, setting, variation, pairs))
    try:
        test, opposite = (
            claim_test(pairs.ours, pairs.theirs, at_least=low, at_most=high, scale=claim.scale, alpha=ALPHA)
            for low, high in ((claim.at_least, claim.at_most), (claim.at_most, claim.at_least))
        )
    except ValueError as error:  # a ratio needs positive figures
        return Judged(replace(finding, note=join(finding.note, str(error))), math.nan, math.nan)
    note = finding.note
    if len(pairs.seeds) < 2:
        note = join(note, "one seed has no spread: repeat with others")
    elif claim.scale == "difference" and test.decision is Decision.CANNOT_TELL:
        differences = pairs.ours - pairs.theirs
        note = join(note, power_note(float(differences.std(ddof=1)), len(differences), unit=claim.unit).sentence)
    return Judged(
        replace(
            finding, estimate=test.estimate, low=finite(test.interval.low), high=finite(test.interval.high),
            p_value=finite(_p_of(test)), note=note,
        ),
        _p_of(test),
        _p_of(opposite),
    )  # fmt: skip


def _p_of(test: ClaimTest) -> float:
    """Return the p-value that decides; 0 where the figures have no variance and lie exactly on the limit."""
    return 0.0 if test.decision is Decision.HOLDS and test.p_value == 1 else test.p_value


def _training_times(
    results: Results, claim: Claim, setting: Setting, variation: str, pairs: Pairs
) -> tuple[np.ndarray, np.ndarray]:
    """Return the whole training time of each run of the pairs, NaN where it is not known."""
    other = results.campaign.brier if claim.against == "brier" else results.campaign.reference
    ours, theirs = (results.values(setting, name, "train_seconds") for name in (variation, other))
    times = ([of.get(seed, math.nan) for seed in pairs.seeds] for of in (ours, theirs))
    first, second = (np.array(values) for values in times)
    return first, second


def _censored(claim: Claim, pairs: Pairs, finding: Finding, whole: tuple[np.ndarray, np.ndarray]) -> Judged:
    """Judge times of which some are infinite, of runs that never arrived.

    All that is known of such a time is that it is longer than the training. With the training's time in its place
    the ratio is too small where ours never arrived, so that the claim may fail by it but not hold, and too large where
    the others never did, so that it may hold but not fail.
    """
    ours_never, theirs_never = np.isinf(pairs.ours), np.isinf(pairs.theirs)
    note = (
        f"{int(ours_never.sum())} of its {len(pairs.ours)} runs never got there, {int(theirs_never.sum())} of those "
        "that it is compared with"
    )
    finding = replace(finding, note=join(finding.note, note))
    ours = np.where(ours_never, whole[0], pairs.ours)
    theirs = np.where(theirs_never, whole[1], pairs.theirs)
    neither = bool((ours_never & theirs_never).any())
    if neither or claim.at_most is None or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return Judged(finding, math.nan, math.nan)
    try:
        test = claim_test(ours, theirs, at_most=claim.at_most, scale=claim.scale, alpha=ALPHA)
        opposite = claim_test(ours, theirs, at_least=claim.at_most, scale=claim.scale, alpha=ALPHA)
    except ValueError as error:  # a run had the quality before its first step, so a time is 0
        return Judged(replace(finding, note=join(finding.note, str(error))), math.nan, math.nan)
    may_hold, may_fail = not ours_never.any(), not theirs_never.any()
    bound = "at most" if may_hold else "at least"  # the training time stands in for an unknown, longer one
    finding = replace(
        finding,
        estimate=test.estimate if may_hold != may_fail else None,
        high=finite(test.interval.high) if may_hold else None,
        low=finite(test.interval.low) if may_fail else None,
        p_value=finite(test.p_value) if may_hold else None,
        note=join(finding.note, f"so the ratio is {bound} this") if may_hold != may_fail else finding.note,
    )
    return Judged(finding, test.p_value if may_hold else math.nan, opposite.p_value if may_fail else math.nan)


def _agreement(
    claim: Claim,
    variation: str,
    role: str,
    main: Sequence[float | None],
    cells: Mapping[Hashable, Mapping[Hashable, float | None]],
) -> Finding:
    known = [value for value in main if value is not None]
    mean = float(np.mean(known)) if known else math.nan
    same_sign = Claim(
        f"same-sign-{claim.key}",
        "robustness",
        f"differs from cross-entropy in {_metric_words(claim.metric)} in the same direction as in the first setting "
        f"of the main study, in at least {100 * AGREEMENT:.0f} % of all other settings and seeds",
        claim.metric,
        scale="share",
        at_least=AGREEMENT,
    )
    settings = "1 other setting" if len(cells) == 1 else f"{len(cells)} other settings"
    finding = undecided(same_sign, variation, settings, role)
    if math.isnan(mean) or mean == 0:
        return replace(finding, note="the main study has no difference whose sign could return")
    agreement = sign_agreement(cells, 1 if mean > 0 else -1)
    seen = agreement.same + agreement.opposite + agreement.zero
    if not seen:
        return replace(finding, note="no other setting has been run")
    note = f"{agreement.same} of {seen} settings and seeds"
    decision = decide(agreement.bounds, at_least=AGREEMENT)
    if seen + agreement.missing < FEWEST_SIGNS:
        decision, note = (
            Decision.CANNOT_TELL,
            f"{note}, which are too few to agree: at least {FEWEST_SIGNS} are needed",
        )
    if agreement.missing:
        note += f"; {agreement.missing} missing"
    return replace(
        finding, decision=decision.value, estimate=agreement.share, low=agreement.interval.low,
        high=agreement.interval.high, pairs=seen, note=note,
    )  # fmt: skip


def _metric_words(metric: str) -> str:
    return metric.replace("ece_", "ECE-").replace("rouge", "ROUGE-") if "_" in metric or "rouge" in metric else metric
