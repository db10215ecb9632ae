"""What the efficiency audit says of the claims of efficiency: all variations in turns, on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...runtime.files import json_number
from ...statistics import Decision
from ..audit.audit import audited_runs
from ..spec.design import Campaign
from .claims import Claim
from .finding import Finding, Judged, both_ends, corrected, undecided

THROUGHPUT = Claim(
    "audited-throughput", "efficiency",
    "trains at least 98 % of the tokens a second of cross-entropy on the same batch",
    "tokens_per_second", scale="ratio", at_least=0.98,
)  # fmt: skip
MEMORY = Claim(
    "audited-memory", "efficiency", "needs at most 500 MB more memory than cross-entropy for a step of the same batch",
    "peak_memory_mb", at_most=500.0, unit="MB",
)  # fmt: skip


def audited_claims(campaign: Campaign, audit: Mapping[str, Any]) -> list[Finding]:
    """Judge throughput and memory by the content of ``audit.json``, for every variation that it has measured.

    Throughput is tested on the rounds of the audit, each of which times all variations after another. Memory is
    counted, not sampled: its difference has no interval. What was audited with another reference, at another scale or
    with other arguments is left out.
    """
    if (audit["reference"], audit["scale"]) != (campaign.reference, campaign.scale):
        return []
    try:
        runs = audited_runs(campaign, audit["settings"].get("size"))
    except ValueError:  # the reference is not among the chosen points
        return []
    setting = f"audit, {audit['settings']['tokens']:,} tokens a step, {audit['machine']['device']}"
    speed: dict[str, list[Judged]] = {}
    memory = []
    for variation in campaign.variations:
        entry, run = audit["variations"].get(variation.name), runs.get(variation.name)
        compared = variation.name in (campaign.reference, campaign.brier)
        if compared or entry is None or run is None or entry.get("run") != run.id:
            continue
        throughput, need = (
            undecided(claim, variation.name, setting, variation.role, note=entry.get("message") or "not measured")
            for claim in (THROUGHPUT, MEMORY)
        )
        speed.setdefault(variation.role, []).append(_speed(entry, throughput))
        memory.append(_memory(entry, need))
    return [finding for family in speed.values() for finding in corrected(family)] + memory


def _speed(entry: Mapping[str, Any], finding: Finding) -> Judged:
    rounds = [sample for sample in entry["samples"] if sample["reference_seconds"]]
    if not rounds:
        return Judged(finding)
    ours, theirs = (1 / np.array([sample[key] for sample in rounds]) for key in ("seconds", "reference_seconds"))
    test, opposite = both_ends(finding, ours, theirs)
    finding = replace(
        finding, estimate=test.estimate, low=json_number(test.interval.low), high=json_number(test.interval.high),
        pairs=len(rounds), p_value=json_number(test.p_value), note="pairs are rounds of the audit, not seeds",
    )  # fmt: skip
    return Judged(finding, test.p_value, opposite.p_value)


def _memory(entry: Mapping[str, Any], finding: Finding) -> Finding:
    difference = entry.get("peak_memory_difference_mb")
    if difference is None or finding.at_most is None:
        return finding
    decision = Decision.HOLDS if difference <= finding.at_most else Decision.FAILS
    note = "counted in one process, without spread"
    return replace(finding, decision=decision.value, estimate=difference, pairs=1, note=note)
