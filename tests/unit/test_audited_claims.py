"""Throughput and memory judged by an audit, on an audit made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dpsm_hf.campaign.audit import arguments_key, audited_runs
from dpsm_hf.campaign.audited_claims import audited_claims
from dpsm_hf.campaign.design import Campaign, Variation
from tests.hand_made_campaigns import VARIATIONS, campaign

SECONDS = (1.00, 1.02, 0.99, 1.01, 1.00)


def audit(of: Campaign, **entries: tuple[float | None, float | None]) -> dict[str, Any]:
    """Return an audit in which a variation's steps take so many times the reference's, and so many MB more."""
    variations, runs = {}, audited_runs(of)
    for i, (name, (ratio, memory)) in enumerate(entries.items()):
        wobble = [1 + 0.002 * ((i + j) % 3 - 1) for j in range(len(SECONDS))]
        samples = [] if ratio is None else [
            {"seconds": ratio * w * s, "reference_seconds": s} for w, s in zip(wobble, SECONDS, strict=True)
        ]  # fmt: skip
        known = name.replace("_", "-")
        variations[known] = {
            "arguments": arguments_key(runs[known]), "samples": samples, "peak_memory_difference_mb": memory,
            "message": "" if samples else "out of memory",
        }  # fmt: skip
    return {
        "reference": of.reference,
        "scale": of.scale,
        "settings": {"tokens": 2000},
        "machine": {"device": "CPU"},
        "variations": variations,
    }


@pytest.mark.parametrize(
    ("ratio", "memory", "words"),
    [
        (0.97, -100.0, ("holds", "holds")),
        (1.015, 500.0, ("holds", "holds")),  # 1 / 1.015 is 0.985
        (1.08, 500.1, ("fails", "fails")),
        (1.0204, 0.0, ("cannot tell", "holds")),
        (None, None, ("cannot tell", "cannot tell")),
    ],
)
def test_what_an_audit_tells(ratio: float | None, memory: float | None, words: tuple[str, str]) -> None:
    made = campaign(variations=VARIATIONS)
    found = audited_claims(
        made, audit(made, ce_baseline=(1.0, 0.0), brier_baseline=(1.0, 0.0), dpsm_linear=(ratio, memory))
    )
    assert {finding.variation for finding in found} == {"dpsm-linear"}
    assert tuple(finding.decision for finding in found) == words
    speed, peak = found
    assert speed.setting == "audit, 2,000 tokens a step, CPU"
    if ratio is None:
        assert speed.note == peak.note == "out of memory" and speed.estimate is None
    else:
        assert speed.pairs == len(SECONDS) and speed.estimate == pytest.approx(1 / ratio, rel=2e-3)
        assert speed.low is not None and speed.high is not None and speed.low < speed.estimate < speed.high
        assert (peak.estimate, peak.low, peak.high) == (memory, None, None)


def test_an_audit_of_something_else_tells_nothing() -> None:
    made = campaign(variations=VARIATIONS)
    whole = audit(made, ce_baseline=(1.0, 0.0), dpsm_linear=(0.9, 0.0), focal=(0.9, 0.0))
    assert len(audited_claims(made, whole)) == 4
    for change in ({"scale": "paper"}, {"reference": "focal"}):
        assert audited_claims(made, {**whole, **change}) == []
    whole["variations"]["focal"]["arguments"] = "another"
    assert {finding.variation for finding in audited_claims(made, whole)} == {"dpsm-linear"}


def test_holm_over_the_variations_of_a_role() -> None:
    cosine = Variation("dpsm-cosine", "DPSM, cosine", arguments={"loss_type": "dpsm", "alpha_schedule": "cosine"})
    made = campaign(variations=(*VARIATIONS, cosine))
    entries = {v.name.replace("-", "_"): (1.0, 0.0) for v in made.variations if v.of is None}
    found = [f for f in audited_claims(made, audit(made, **entries)) if f.key == "audited-throughput"]
    assert len(found) == len(entries) - 2
    for finding in found:
        alike = [f for f in found if f.role == finding.role]
        assert finding.p_value is not None and finding.p_adjusted is not None
        assert (finding.p_adjusted > finding.p_value) == (len(alike) == 2)
