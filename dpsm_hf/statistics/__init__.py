"""Statistics for comparing systems over few seeds and on one test set: pure functions on numbers and arrays.

`samples` checks and summarises numbers, `paired` compares runs of the same seeds, `multiple` corrects for many tests,
`documents`, `resampling` and `error_contrasts` compare two systems on the same documents, `power` computes detectable
differences, `agreement` counts signs over settings, and `decision` turns intervals into holds, fails or cannot tell.
docs/statistics.md has the formulas.
"""

from .agreement import SignAgreement, sign_agreement
from .decision import Decision, all_of, any_of, decide
from .documents import DocumentBins, DocumentMeans
from .multiple import AdjustedTest, holm, holm_family
from .paired import ClaimTest, PairedComparison, claim_test, paired_difference, paired_ratio, stars
from .power import PowerNote, detectable_difference, pairs_needed, power_note, t_test_power
from .resampling import DocumentBootstrap, Randomization, approximate_randomization, paired_bootstrap
from .samples import Summary, summarize

__all__ = [
    "AdjustedTest",
    "ClaimTest",
    "Decision",
    "DocumentBins",
    "DocumentBootstrap",
    "DocumentMeans",
    "PairedComparison",
    "PowerNote",
    "Randomization",
    "SignAgreement",
    "Summary",
    "all_of",
    "any_of",
    "approximate_randomization",
    "claim_test",
    "decide",
    "detectable_difference",
    "holm",
    "holm_family",
    "paired_bootstrap",
    "paired_difference",
    "paired_ratio",
    "pairs_needed",
    "power_note",
    "sign_agreement",
    "stars",
    "summarize",
    "t_test_power",
]
