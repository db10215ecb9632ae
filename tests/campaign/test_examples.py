"""The campaigns under docs/examples: their records still give the verdict that lies beside them."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from dpsm_hf.campaign.audit.audit import AUDIT_NAME
from dpsm_hf.campaign.runner.records import read_records
from dpsm_hf.campaign.spec.loading import SHIPPED, SpecError, load_campaign
from dpsm_hf.campaign.verdict.results import Results
from dpsm_hf.campaign.verdict.verdict import audited_claims, verdict

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").rglob("verdict.json"))


def test_there_are_some() -> None:
    assert {path.parent.name.rsplit("-", 1)[0] for path in EXAMPLES} == {p.stem for p in SHIPPED.glob("exp-*.yaml")}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.parent.relative_to(ROOT / "docs" / "examples")))
def test_the_records_give_the_verdict(path: Path) -> None:
    folder = path.parent
    command = argparse.ArgumentParser()
    command.add_argument("--only", action="append")
    command.add_argument("--data")
    command.add_argument("--scale", default="small")
    words = shlex.split(json.loads((folder / "plan.json").read_text())["command"])
    chosen, _ = command.parse_known_args(words)
    file = folder.name.removesuffix(f"-{chosen.scale}")
    changes = [] if chosen.data is None else [f"data={chosen.data}"]
    try:
        campaign = load_campaign(file, chosen.scale, only=chosen.only, overrides=changes)
    except SpecError as error:
        assert "there is no file or folder" in str(error)
        pytest.skip("its data is not on this machine")
    records = read_records(folder)
    assert set(records) == set(campaign.order), "a run of the plan has no record, or another id"
    assert not any(
        "/" in word for record in records.values() for word in record.command if not word.startswith("runs/")
    )
    findings = verdict(Results(campaign, records))
    findings += audited_claims(campaign, json.loads((folder / AUDIT_NAME).read_text()))
    expected = json.loads(path.read_text())["findings"]
    assert len(findings) == len(expected)
    for mine, theirs in zip(findings, expected, strict=True):
        for key, value in asdict(mine).items():
            close = pytest.approx(theirs[key], rel=1e-9, abs=1e-12) if isinstance(theirs[key], float) else theirs[key]
            assert value == close, (mine.key, mine.variation, key)
