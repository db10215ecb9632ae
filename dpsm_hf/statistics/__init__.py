"""Statistics for comparing systems over few seeds and on one test set: pure functions of numbers and arrays.

`paired` summarises and compares runs of the same seeds; `documents` and `resampling` compare two systems on the same
documents; `power` computes detectable differences; `agreement` counts signs over settings; `decision` turns an
interval into "holds", "fails" or "cannot tell" and corrects the p-values of many tests. docs/statistics.md has the
formulas.
"""

from .agreement import SignAgreement, sign_agreement
from .decision import AdjustedTest, Decision, Standing, all_of, any_of, decide, holm, holm_family, standing, stars
from .documents import DocumentBins, DocumentMeans
from .paired import ClaimTest, PairedComparison, Summary, claim_test, paired_difference, paired_ratio, summarize
from .power import PowerNote, detectable_difference, pairs_needed, power_note, t_test_power
from .resampling import DocumentBootstrap, Randomization, approximate_randomization, paired_bootstrap

__all__ = [
    "AdjustedTest", "ClaimTest", "Decision", "DocumentBins", "DocumentBootstrap", "DocumentMeans",
    "PairedComparison", "PowerNote", "Randomization", "SignAgreement", "Standing", "Summary", "all_of", "any_of",
    "approximate_randomization", "claim_test", "decide", "detectable_difference", "holm", "holm_family",
    "paired_bootstrap", "paired_difference", "paired_ratio", "pairs_needed", "power_note", "sign_agreement",
    "standing", "stars", "summarize", "t_test_power",
]  # fmt: skip
