"""The result of testing a claim, and Holm's correction over a family of claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...runtime.files import json_number
from ...statistics import ClaimTest, Decision, claim_test, holm
from .claims import Claim

#: Family-wise error rate: the chance that any wrong claim of a family is said to hold.
ALPHA = 0.05


@dataclass(frozen=True)
class Finding:
    """What the runs say about a claim, for one variation in one setting.

    Args:
        key, family, words: of the claim.
        variation: that it is about.
        setting: in words.
        role: of the variation: the claims of ``main`` variations are one Holm family, those of ablations another.
        decision: ``holds``, ``fails`` or ``cannot tell``, after Holm's correction over the family.
        estimate: difference or ratio; None where there is no pair.
        low, high: its interval, of level 0.90 (each limit is wrong with a chance of 5 %); None where it has none.
        at_least, at_most: the limits of the claim.
        scale, unit: of the estimate.
        pairs: seeds compared.
        p_value: one-sided, small where the claim holds.
        p_adjusted: the same after Holm's correction.
        p_fails: one-sided, small where the claim fails.
        p_fails_adjusted: the same after Holm's correction.
        note: what the figures cannot show, in words.
    """

    key: str
    family: str
    words: str
    variation: str
    setting: str
    role: str
    decision: str
    estimate: float | None
    low: float | None
    high: float | None
    at_least: float | None
    at_most: float | None
    scale: str
    unit: str
    pairs: int
    p_value: float | None = None
    p_adjusted: float | None = None
    p_fails: float | None = None
    p_fails_adjusted: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def undecided(claim: Claim, variation: str, setting: str, role: str, pairs: int = 0, note: str = "") -> Finding:
    """Return the finding on a claim before anything is tested: it cannot be told."""
    return Finding(
        claim.key, claim.family, claim.words, variation, setting, role, Decision.CANNOT_TELL.value, None, None, None,
        claim.at_least, claim.at_most, claim.scale, claim.unit, pairs, note=note,
    )  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A finding before the correction, and its one-sided p-values: small where it holds and where it fails, or NaN."""

    finding: Finding
    p_holds: float = math.nan
    p_fails: float = math.nan


def both_ends(finding: Finding, ours: np.ndarray, theirs: np.ndarray) -> tuple[ClaimTest, ClaimTest]:
    """Test that a finding's claim holds, and that it fails; figures that cannot be tested are a ValueError."""
    holds, fails = (
        claim_test(ours, theirs, at_least=low, at_most=high, scale=finding.scale, alpha=ALPHA)
        for low, high in ((finding.at_least, finding.at_most), (finding.at_most, finding.at_least))
    )
    return holds, fails


def corrected(tests: Sequence[Judged]) -> list[Finding]:
    """Return the findings of one family (of one claim and role) with their decisions, by Holm-corrected p-values."""
    holds = holm([None if math.isnan(test.p_holds) else test.p_holds for test in tests])
    fails = holm([None if math.isnan(test.p_fails) else test.p_fails for test in tests])
    found = []
    for test, p_holds, p_fails in zip(tests, holds.tolist(), fails.tolist(), strict=True):
        decision = Decision.CANNOT_TELL
        if p_holds <= ALPHA:  # False for NaN
            decision = Decision.HOLDS
        elif p_fails <= ALPHA:
            decision = Decision.FAILS
        found.append(
            replace(
                test.finding, decision=decision.value, p_adjusted=json_number(p_holds),
                p_fails=json_number(test.p_fails), p_fails_adjusted=json_number(p_fails),
            )
        )  # fmt: skip
    return found


def with_note(finding: Finding, *notes: str) -> Finding:
    """Return a finding whose note goes on."""
    return replace(finding, note="; ".join(note for note in (finding.note, *notes) if note))
