"""Throughput and memory judged by an audit, on an audit made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.audit.audit import audited_runs
from dpsm_hf.campaign.spec.design import Campaign, Variation
from dpsm_hf.campaign.verdict.verdict import audited_claims
from tests.campaign.files import FILE, edit, load, with_files
from tests.campaign.hand_made import VARIATIONS, campaign

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
            "run": runs[known].id, "samples": samples, "peak_memory_difference_mb": memory,
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
    whole["variations"]["focal"]["run"] = "another"
    assert {finding.variation for finding in audited_claims(made, whole)} == {"dpsm-linear"}


def test_files_may_move_between_an_audit_and_its_reading_but_not_change(tmp_path: Path) -> None:
    here = load(tmp_path / "here", with_files(tmp_path / "here"))
    made = audit(here, ce=(1.0, 0.0), brier=(1.0, 0.0), dpsm=(0.9, 0.0))
    there = load(tmp_path / "there", with_files(tmp_path / "there"))
    assert audited_claims(there, made) == audited_claims(here, made) != []
    assert audited_claims(load(tmp_path / "there", with_files(tmp_path / "there", "other\n")), made) == []


def test_a_tokenizer_may_move_with_the_run_that_others_start_from(tmp_path: Path) -> None:
    def started(folder: str, merges: str) -> Campaign:
        (tmp_path / folder / "words").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "words" / "merges.txt").write_text(merges)
        trained = "      tokenizer_name: train-bpe\n"
        text = with_files(tmp_path / folder).replace(
            trained, "      tokenizer_name: ./words\n    start_from: {seed: 7}\n"
        )
        return load(tmp_path / folder, text)

    here = started("here", "t h\n")
    assert audited_runs(here)["dpsm"].arguments["tokenizer_name"] == str(tmp_path / "here" / "words")
    made = audit(here, ce=(1.0, 0.0), dpsm=(0.9, 0.0))
    assert audited_claims(started("there", "t h\n"), made) == audited_claims(here, made) != []
    assert audited_claims(started("there", "h e\n"), made) == []


def test_the_processes_that_a_run_has_leave_its_audit(tmp_path: Path) -> None:
    made = load(tmp_path, FILE)
    known = audit(made, ce=(1.0, 0.0), dpsm=(0.9, 0.0))
    two = load(tmp_path, edit("  tiny:\n", "  tiny:\n    processes: 2\n"))
    assert audited_claims(two, known) == audited_claims(made, known) != []
    assert audited_claims(load(tmp_path, edit("n_embd=32", "n_embd=64")), known) == []


def test_holm_over_the_variations_of_a_role() -> None:
    cosine = Variation("dpsm-cosine", "DPSM, cosine", arguments={"scoring_rule": "dpsm", "alpha_schedule": "cosine"})
    made = campaign(variations=(*VARIATIONS, cosine))
    entries = {v.name.replace("-", "_"): (1.0, 0.0) for v in made.variations if v.of is None}
    found = [f for f in audited_claims(made, audit(made, **entries)) if f.key == "audited-throughput"]
    assert len(found) == len(entries) - 2
    for finding in found:
        alike = [f for f in found if f.role == finding.role]
        assert finding.p_value is not None and finding.p_adjusted is not None
        assert (finding.p_adjusted > finding.p_value) == (len(alike) == 2)
