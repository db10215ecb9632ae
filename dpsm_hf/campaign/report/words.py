"""The verdict in words."""

from __future__ import annotations

from collections.abc import Sequence

from ..spec.design import Campaign
from ..verdict.claims import FAMILIES, Finding
from ..verdict.results import Results
from ..verdict.verdict import MAIN_STUDY, overall

# What a claim is called where there is no room for its sentence.
_SHORT = {
    "perplexity-gap": "perplexity within 0.3 of cross-entropy's",
    "rouge-gain": "ROUGE-L 0.3 above cross-entropy's",
    "not-worst": "never worse than both",
    "ece-gain": "ECE 25 % below cross-entropy's",
    "ece-brier": "ECE within 5 % of Brier's",
    "ece-gain-scaled": "ECE 25 % below cross-entropy's, both scaled",
    "ece-brier-scaled": "ECE within 5 % of Brier's, both scaled",
    "time-to-quality": "quality within 110 % of cross-entropy's time",
    "time-to-quality-brier": "quality within 60 % of Brier's time",
    "throughput": "throughput",
    "memory": "memory",
    "audited-throughput": "throughput in the audit",
    "audited-memory": "memory in the audit",
}
_SIGN_OF = {"perplexity-gap": "perplexity", "rouge-gain": "ROUGE-L", "ece-gain": "ECE"}


def headline(campaign: Campaign, findings: Sequence[Finding]) -> list[str]:
    """Return a sentence for each main variation that is judged, the method's own first: what holds, fails, is open."""
    families = {f.key: FAMILIES.index(f.family) if f.family in FAMILIES else len(FAMILIES) for f in findings}
    sentences = []
    for variation in sorted(campaign.variations, key=lambda v: not v.name.startswith("dpsm")):
        words = overall(findings, variation.name)
        if variation.role != "main" or not words:
            continue
        parts = []
        for decision in ("holds", "fails", "cannot tell"):
            keys = sorted((key for key, said in words.items() if said == decision), key=families.__getitem__)
            if keys:
                parts.append(f"{decision.capitalize()}: {'; '.join(map(_short, keys))}.")
        held = sum(said == "holds" for said in words.values())
        sentences.append(f"{variation.title}: {held} of {len(words)} claims hold. {' '.join(parts)}")
    return sentences or ["No variation has been compared with the reference yet."]


#: What the columns of the tables mean; docs/calibration.md defines them.
GLOSSARY = (
    "ECE-10, -15, -100: expected calibration error with so many bins; signed gap: confidence less accuracy, above 0 "
    "is overconfident; spherical: 1 less the spherical score; depth: the layer from which on the most likely token "
    "stays the same; T: fitted temperature."
)


def claim_line(finding: Finding) -> str:
    """Return the figures of a finding: ``1.62 [1.40, 1.85], claimed: at most 0.3; 3 seeds; p = .02 (Holm .08)``."""
    if finding.estimate is None and finding.low is None and finding.high is None:
        return "no figure"
    decimals = 3 if finding.scale in ("ratio", "share") else 2
    text = "–" if finding.estimate is None else _digits(finding.estimate, decimals)
    if finding.unit:
        text += f" {finding.unit}"
    if finding.low is not None or finding.high is not None:
        least = "(0" if finding.scale == "ratio" else "(-∞"  # an open end of the interval
        low = least if finding.low is None else f"[{_digits(finding.low, decimals)}"
        high = "∞)" if finding.high is None else f"{_digits(finding.high, decimals)}]"
        text += f" {low}, {high}"
    bounds = (("at least", finding.at_least), ("at most", finding.at_most))
    limits = [f"{word} {value:g}" for word, value in bounds if value is not None]
    what = {"ratio": "ratio", "share": "share"}.get(finding.scale, "difference")
    text += f"; claimed: {what} {' and '.join(limits)}; n = {finding.pairs}"
    # where the claim is undecided, show the smaller of the two p-values
    nearer = finding.p_fails is not None and (finding.p_value is None or finding.p_fails < finding.p_value)
    fails = finding.decision == "fails" or (finding.decision != "holds" and nearer)
    p, adjusted = (finding.p_fails, finding.p_fails_adjusted) if fails else (finding.p_value, finding.p_adjusted)
    if p is not None:
        text += f"; p {'of failing ' if fails else ''}= {p:.3g}"
        if adjusted is not None:
            text += f", Holm {adjusted:.3g}"
    return text


def _digits(value: float, decimals: int) -> str:
    """Return a number with so many decimals, or with two digits where these would leave nothing of it."""
    text = f"{value:,.{decimals}f}"
    return text if value == 0 or float(text.replace(",", "")) != 0 else f"{value:.2g}"


def settings_line(campaign: Campaign, results: Results) -> str:
    """Return what the figures are: split, checkpoint, settings and seeds of the main study."""
    settings = results.settings(MAIN_STUDY)
    seeds = sorted({p.seed for p in campaign.points if p.study == MAIN_STUDY})
    places = "; ".join(dict.fromkeys(f"{s.size} on {s.data}" for s in settings))
    return (
        f"Judged on the {results.split} split at the {results.checkpoint} checkpoint; main study: {places}; seeds "
        f"{', '.join(map(str, seeds))}. Calibration is token-level and top-label. 'Holds' and 'fails' are one-sided "
        "paired tests at 5 % with Holm's correction over the variations of a role; intervals are 90 %, so that each "
        "end is wrong with a chance of 5 %; everything else cannot be told."
    )


def _short(key: str) -> str:
    same = key.removeprefix("same-sign-")
    return _SHORT.get(key, key) if same == key else f"sign of the {_SIGN_OF.get(same, same)} difference elsewhere"
