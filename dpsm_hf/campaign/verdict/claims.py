"""The claims that a campaign tests, what is found on them, and Holm's correction over a family of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...runtime.files import json_number
from ...statistics import ClaimTest, Decision, claim_test, holm

#: Family-wise error rate: the chance that any wrong claim of a family is said to hold.
ALPHA = 0.05
#: Families in the order of the report.
FAMILIES = ("quality", "calibration", "convergence", "efficiency")


@dataclass(frozen=True)
class Claim:
    """One claim about a variation, tested over the seeds of a setting: a figure of `Results.value` and its limits."""

    key: str  # short name, unique
    family: str  # one of `FAMILIES`
    words: str  # the claim, as a sentence that follows the variation's name
    metric: str
    against: str = "reference"  # or brier, or worse of both: of each seed's reference and Brier figure the worse
    scale: str = "difference"  # or ratio
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""  # of a difference, for the tables
    scaled: bool | None = None  # figures before (False) or after (True) temperature scaling; None: as each reads them


_PERPLEXITY = (
    Claim(
        "perplexity-gap", "quality", "has a perplexity at most 0.3 above cross-entropy's", "perplexity",
        at_most=0.3, scaled=False,
    ),
    Claim(
        "not-worst", "quality", "has a perplexity not above both cross-entropy's and Brier's", "perplexity",
        "worse of both", at_most=0.0, scaled=False,
    ),
)  # fmt: skip
_ROUGE = (
    Claim(
        "rouge-gain", "quality", "gains at least 0.3 points of ROUGE-L over cross-entropy", "rougeL",
        at_least=0.3, unit="points",
    ),
    Claim(
        "not-worst", "quality", "has a ROUGE-L not below both cross-entropy's and Brier's", "rougeL",
        "worse of both", at_least=0.0, unit="points",
    ),
)  # fmt: skip
_COST = (
    Claim(
        "time-to-quality", "convergence",
        "needs at most 110 % of the training time of cross-entropy for 95 % of cross-entropy's final quality",
        "seconds_to_quality", scale="ratio", at_most=1.1,
    ),
    Claim(
        "time-to-quality-brier", "convergence",
        "needs at most 60 % of the training time of Brier for 95 % of cross-entropy's final quality",
        "seconds_to_quality", "brier", "ratio", at_most=0.6,
    ),
    Claim(
        "throughput", "efficiency", "trains at least 98 % of the tokens a second of cross-entropy",
        "tokens_per_second", scale="ratio", at_least=0.98,
    ),
    Claim(
        "memory", "efficiency", "needs at most 500 MB more memory than cross-entropy", "peak_memory_mb",
        at_most=500.0, unit="MB",
    ),
)  # fmt: skip
#: Throughput and memory as the audit measures them.
AUDITED = (
    Claim(
        "audited-throughput", "efficiency",
        "trains at least 98 % of the tokens a second of cross-entropy on the same batch",
        "tokens_per_second", scale="ratio", at_least=0.98,
    ),
    Claim(
        "audited-memory", "efficiency",
        "needs at most 500 MB more memory than cross-entropy for a step of the same batch", "peak_memory_mb",
        at_most=500.0, unit="MB",
    ),
)  # fmt: skip


def claims_of(task: str, ece: str = "ece_15") -> tuple[Claim, ...]:
    """Return the claims of the method for a task of `tasks.TASKS`, those of calibration stated in this error."""
    calibration = []
    name = ece.replace("ece_", "ECE-") if ece.startswith("ece_") else ece.replace("_", " ")
    for scaled, suffix, words in ((False, "", ""), (True, "-scaled", ", both after temperature scaling")):
        calibration += [
            Claim(
                f"ece-gain{suffix}", "calibration", f"has an {name} at least 25 % below cross-entropy's{words}", ece,
                scale="ratio", at_most=0.75, scaled=scaled,
            ),
            Claim(
                f"ece-brier{suffix}", "calibration", f"has an {name} within 5 % of Brier's, or below{words}", ece,
                "brier", "ratio", at_most=1.05, scaled=scaled,
            ),
        ]  # fmt: skip
    return (*(_ROUGE if task == "summarization" else _PERPLEXITY), *calibration, *_COST)


# ---- findings ------------------------------------------------------------------------------------------------------


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
