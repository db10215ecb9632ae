"""The verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...statistics import Decision
from ..spec.design import Campaign, Variation
from ..verdict.claims import FAMILIES, Finding
from ..verdict.results import Results
from ..verdict.verdict import MAIN_STUDY

# What a claim is called where there is no room for its sentence.
_SHORT = {
    "perplexity-gap": "perplexity within 0.3 of cross-entropy's",
    "rouge-gain": "ROUGE-L 0.3 above cross-entropy's",
    "not-worst": "not worse than both cross-entropy and Brier",
    "ece-gain": "ECE 25 % below cross-entropy's",
    "ece-brier": "ECE within 5 % of Brier's",
    "ece-gain-scaled": "ECE 25 % below cross-entropy's, both scaled",
    "ece-brier-scaled": "ECE within 5 % of Brier's, both scaled",
    "time-to-quality": "quality within 110 % of cross-entropy's time",
    "time-to-quality-brier": "quality within 60 % of Brier's time",
    "throughput": "98 % of cross-entropy's throughput",
    "memory": "at most 500 MB more memory",
    "audited-throughput": "98 % of cross-entropy's throughput, in the audit",
    "audited-memory": "at most 500 MB more memory, in the audit",
}
_SIGN_OF = {"perplexity-gap": "perplexity", "rouge-gain": "ROUGE-L", "ece-gain": "ECE"}


@dataclass(frozen=True)
class Shown:
    """How a decision is shown: its word, its sign, and the name of its colour in the page's style."""

    word: str
    sign: str
    css: str


HOLDS = Shown("holds", "✓", "holds")
WITHIN = Shown("within the limit", "≈", "within")
FAILS = Shown("fails", "✗", "fails")
CANNOT_TELL = Shown("cannot tell", "?", "cannot-tell")
#: In the order in which a variation's claims are told.
SHOWN = (HOLDS, WITHIN, FAILS, CANNOT_TELL)


def shown(finding: Finding) -> Shown:
    """Return how a finding's decision is shown; the one place that says "holds".

    A claim with a tolerance ("at most 0.3 above") may hold while the variation is worse, or no different. Then it is
    only "within the limit": "holds" is said where the whole interval (or a figure that has none) lies on the better
    side of no difference. For a share of settings and seeds with the same sign that is one half.
    """
    if finding.decision == Decision.FAILS.value:
        return FAILS
    if finding.decision != Decision.HOLDS.value:
        return CANNOT_TELL
    equal = {"ratio": 1.0, "share": 0.5}.get(finding.scale, 0.0)
    if finding.at_most is not None:
        end = finding.estimate if finding.high is None else finding.high
        return HOLDS if end is not None and end <= equal else WITHIN
    end = finding.estimate if finding.low is None else finding.low
    return HOLDS if end is not None and end >= equal else WITHIN


def over_settings(findings: Sequence[Finding], variation: str) -> dict[str, tuple[Shown, Finding]]:
    """Return for each claim about a variation the worst that is shown of it in any setting, and the finding."""
    order = (FAILS, CANNOT_TELL, WITHIN, HOLDS)
    found: dict[str, tuple[Shown, Finding]] = {}
    for finding in findings:
        if finding.variation == variation:
            now = shown(finding)
            before = found.get(finding.key)
            if before is None or order.index(now) < order.index(before[0]):
                found[finding.key] = now, finding
    return found


def headline(campaign: Campaign, findings: Sequence[Finding]) -> list[str]:
    """Return a sentence for each main variation that is judged, the method's own first: what holds, fails, is open."""
    families = {f.key: FAMILIES.index(f.family) if f.family in FAMILIES else len(FAMILIES) for f in findings}
    sentences = []
    for variation in _in_order(campaign):
        words = {key: said for key, (said, _) in over_settings(findings, variation.name).items()}
        if variation.role != "main" or not words:
            continue
        parts = []
        for decision in SHOWN:
            keys = sorted((key for key, said in words.items() if said is decision), key=families.__getitem__)
            if keys:
                parts.append(f"{decision.word.capitalize()}: {'; '.join(map(short, keys))}.")
        held = sum(said is HOLDS for said in words.values())
        sentences.append(f"{variation.title}: {held} of {len(words)} claims hold. {' '.join(parts)}")
    return sentences or ["No variation has been compared with the reference yet."]


def lead(campaign: Campaign, findings: Sequence[Finding]) -> str:
    """Return the page's first sentence: how many of the claims about the method's first variation hold."""
    for variation in _in_order(campaign):
        said = [how for how, _ in over_settings(findings, variation.name).values()]
        if variation.role == "main" and said:
            held, within, failed, open_ = (sum(how is kind for how in said) for kind in SHOWN)
            parts = [f"{held} of {len(said)} claims {'holds' if held == 1 else 'hold'}"]
            parts += [f"{within} {'is' if within == 1 else 'are'} within the limit"] if within else []
            parts += [f"{failed} {'fails' if failed == 1 else 'fail'}"] if failed else []
            parts += [f"{open_} cannot be told"] if open_ else []
            return f"{variation.title}: {', '.join(parts)}."
    return "No variation has been compared with the reference yet."


def _in_order(campaign: Campaign) -> list[Variation]:
    return sorted(campaign.variations, key=lambda v: not v.name.startswith("dpsm"))


#: Which figure of a column is marked, see `tables.comparison`.
MARK = (
    "better than every other variation with all its seeds (the 95 % intervals of the paired differences leave out 0)"
)


def weights_line(campaign: Campaign) -> str:
    """Say what the tables call the last and the best checkpoint."""
    chosen_by = {run.arguments.get("metric_for_best_model") for run in campaign.runs.values()} - {None}
    metric = " or ".join(sorted(str(name).removeprefix("eval_") for name in chosen_by)) or "loss"
    return (
        "Last checkpoint: the weights at the end of training; best checkpoint: those of the evaluation during "
        f"training with the best {metric} on the validation split."
    )


#: What the columns of the tables mean; docs/calibration.md defines them.
GLOSSARY = (
    "ECE-10, -15, -100: expected calibration error with so many bins; signed gap: confidence less accuracy, above 0 "
    "is overconfident; spherical: 1 less the spherical score; depth: the layer from which on the most likely token "
    "stays the same; T: fitted temperature."
)


def figure_of(finding: Finding) -> str:
    """Return a finding's estimate in few characters: ``+1.62``, ``0.59 ×`` or ``83 %``; a dash where it has none."""
    if finding.estimate is None:
        return "–"
    if finding.scale == "share":
        if finding.decision == Decision.FAILS.value and finding.estimate >= (finding.at_least or 0.0):
            return "worse"  # the same sign returns as often as is claimed, but it is the worse one
        return f"{100 * finding.estimate:.0f} %"
    if finding.scale == "ratio":
        return f"{finding.estimate:.2f} ×"
    decimals = 0 if abs(finding.estimate) >= 100 else 1 if abs(finding.estimate) >= 10 else 2
    return f"{finding.estimate:+,.{decimals}f}"


def estimate_of(finding: Finding) -> str:
    """Return a finding's estimate and interval: ``1.62 [1.40, 1.85]``."""
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
    return text


def limits_of(finding: Finding) -> str:
    """Return what is claimed of a finding's figure: ``difference at most 0.3``."""
    bounds = (("at least", finding.at_least), ("at most", finding.at_most))
    limits = [f"{word} {value:g}" for word, value in bounds if value is not None]
    what = {"ratio": "ratio", "share": "share"}.get(finding.scale, "difference")
    return f"{what} {' and '.join(limits)}"


def test_of(finding: Finding) -> str:
    """Return how often a finding was seen and the p-value of its test: ``n = 3; p = 0.02, Holm 0.08``."""
    text = f"n = {finding.pairs}"
    # where the claim is undecided, show the smaller of the two p-values
    nearer = finding.p_fails is not None and (finding.p_value is None or finding.p_fails < finding.p_value)
    fails = finding.decision == "fails" or (finding.decision != "holds" and nearer)
    p, adjusted = (finding.p_fails, finding.p_fails_adjusted) if fails else (finding.p_value, finding.p_adjusted)
    if p is not None:
        text += f"; p {'of failing ' if fails else ''}= {p:.3g}"
        if adjusted is not None:
            text += f", Holm {adjusted:.3g}"
    return text


def claim_line(finding: Finding) -> str:
    """Return the figures of a finding: ``1.62 [1.40, 1.85]; claimed: at most 0.3; n = 3; p = .02, Holm .08``."""
    estimate = estimate_of(finding)
    return estimate if estimate == "no figure" else f"{estimate}; claimed: {limits_of(finding)}; {test_of(finding)}"


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
        f"{', '.join(map(str, seeds))}."
    )


#: How the claims are judged.
METHOD = (
    "Calibration is token-level and top-label. 'Holds' and 'fails' are one-sided paired tests over seeds at 5 % with "
    "Holm's correction over the variations of a role; intervals are 90 %, so that each end is wrong with a chance of "
    "5 %; everything else cannot be told. A claim with a tolerance that holds without a gain is 'within the limit'."
)


def short(key: str) -> str:
    """Return what a claim is called in a heading."""
    same = key.removeprefix("same-sign-")
    return _SHORT.get(key, key) if same == key else f"better {_SIGN_OF.get(same, same)} in other settings too"
