"""The claims that a campaign tests: what is compared with what, within which limits, in words."""

from __future__ import annotations

from dataclasses import dataclass

#: Families in the order of the report.
FAMILIES = ("quality", "calibration", "convergence", "efficiency")


@dataclass(frozen=True)
class Claim:
    """One claim about a variation, tested over the seeds of a setting.

    Args:
        key: short name, unique.
        family: one of `FAMILIES`.
        words: the claim, as a sentence that follows the variation's name.
        metric: figure that is compared, see `Results.value`.
        against: ``reference``, ``brier``, or ``worse of both``: of each seed's reference and Brier figure the worse.
        scale: ``difference`` or ``ratio``.
        at_least, at_most: the limits.
        unit: of a difference, for the tables.
        scaled: compare figures before (False) or after (True) temperature scaling; None: as each variation reads them.
    """

    key: str
    family: str
    words: str
    metric: str
    against: str = "reference"
    scale: str = "difference"
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    scaled: bool | None = None


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
