"""The report of a campaign: one HTML page that needs no network, the same in Markdown, and the verdict as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...runtime.files import read_json, write_json
from ..audit.audit import AUDIT_NAME
from ..audit.audit import table as audit_rows
from ..runner.records import read_records
from ..spec.design import Campaign, Setting
from ..verdict.claims import Finding
from ..verdict.results import Results
from ..verdict.verdict import MAIN_STUDY, audited_claims, overall, verdict
from . import tables
from .matrix import claim_matrix
from .pictures import Pictures, colours, drawn, picture_sections, render
from .words import (
    GLOSSARY,
    MARK,
    METHOD,
    SHOWN,
    claim_line,
    estimate_of,
    headline,
    lead,
    limits_of,
    settings_line,
    shown,
    test_of,
    weights_line,
)

VERDICT_NAME, HTML_NAME, MARKDOWN_NAME, TABLES_NAME = "verdict.json", "report.html", "report.md", "figures.json"


def write_campaign_report(campaign: Campaign, directory: Path, only: Sequence[str] = ()) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``verdict.json``, ``figures.json`` and ``plots/`` from the records.

    ``only`` is what the campaign was cut down to, in words, where it is a part. Returns the files, the page first. No
    record of a run that ended well, or one that cannot be read, is a ValueError.
    """
    directory = Path(directory)
    records = read_records(directory, campaign.order)
    ended = Counter(record.status for record in records.values())
    if not ended["ok"]:
        what = ", ".join(f"{number} {status}" for status, number in sorted(ended.items())) or "none has begun"
        raise ValueError(
            f"{directory} holds no run of this campaign that ended well ({what}). 'dpsm campaign run' does what is "
            "missing; 'dpsm campaign status' says why others ended, --retry takes them up again."
        )
    results = Results(campaign, records)
    audit = read_json(directory / AUDIT_NAME) if (directory / AUDIT_NAME).exists() else None
    findings = verdict(results) + (audited_claims(campaign, audit) if audit is not None else [])
    made = _tables(results, directory, audit)
    context = {**_context(results, findings, directory), "tables": made, "counts": ended, "only": " ".join(only)}
    written = [
        render(template, directory / name, **context)
        for name, template in ((HTML_NAME, "campaign.html.j2"), (MARKDOWN_NAME, "campaign.md.j2"))
    ]
    judged = {finding.variation for finding in findings}
    content = {
        "schema": 1, "campaign": campaign.name, "scale": campaign.scale, "headline": context["headline"],
        "overall": {v.name: overall(findings, v.name) for v in campaign.variations if v.name in judged},
        "findings": list(map(asdict, findings)),
    }  # fmt: skip
    write_json(content, directory / VERDICT_NAME)
    write_json({"schema": 1, "tables": [asdict(t) for of in made.values() for t in of]}, directory / TABLES_NAME)
    return [*written, directory / VERDICT_NAME, directory / TABLES_NAME]


def _settings(results: Results) -> list[Setting]:
    return results.settings(MAIN_STUDY) or results.settings()[:1]


def _tables(results: Results, directory: Path, audit: Mapping[str, Any] | None) -> dict[str, list[tables.Table]]:
    """Return the tables by section, without those that have no rows."""
    quality = tables.QUALITY.get(results.campaign.task, tables.QUALITY["language-modelling"])
    columns = tables.key_first((*quality, *tables.CALIBRATION))
    best = Results(results.campaign, results.records, checkpoint="best")
    final: list[tables.Table | None] = []
    efficiency: list[tables.Table | None] = []
    chief = tables.key_first((*quality[:2], *tables.CALIBRATION[:5]))
    robustness: list[tables.Table | None] = [*tables.differences(results, chief)]
    for setting in _settings(results):
        final += [
            tables.comparison(results, setting, columns, "Last checkpoint"),
            tables.comparison(results, setting, tables.AFTER, "Last checkpoint, after temperature scaling"),
            tables.comparison(best, setting, columns, "Best checkpoint on the validation split"),
            tables.document_table(results, setting, directory),
        ]
        efficiency.append(tables.cost(results, setting))
        robustness += tables.out_of_domain(results, setting, tables.key_first((*quality, *tables.CALIBRATION[:4])))
        robustness.append(tables.spread(results, setting, (*quality[:1], *tables.CALIBRATION[:4])))
    efficiency.append(audit_table(audit) if audit is not None else None)
    found = {"final": final, "efficiency": efficiency, "robustness": robustness}
    return {name: [t for t in of if t is not None and t.rows] for name, of in found.items()}


def _context(results: Results, findings: Sequence[Finding], directory: Path) -> dict[str, Any]:
    campaign, settings = results.campaign, _settings(results)
    unknown = _unfinished_ablations(results)
    told = [f for f in findings if f.estimate is not None or f.variation not in unknown]
    return {
        "campaign": campaign,
        "headline": headline(campaign, findings),
        "lead": lead(campaign, findings),
        "matrices": {role: claim_matrix(campaign, told, role) for role in ("main", "ablation")},
        "legend": SHOWN,
        "colours": colours(results),
        "claims": _claims(results, told),
        "unjudged": list(map(results.title, unknown)),
        "settings": settings_line(campaign, results),
        "sections": picture_sections(results, settings, Pictures(directory / "plots")),
        "missing": tables.missing_runs(results),
        "stopped": tables.stopped_early(results),
        "samples": texts_of(results, settings[0]),
        "mark": MARK,
        "weights": weights_line(campaign),
        "glossary": GLOSSARY,
        "method": METHOD,
        "reproduce": _reproduce(results, directory),
    }


def _unfinished_ablations(results: Results) -> list[str]:
    """Return the main study's ablations without a finished run; the page leaves out their claims."""
    settings = results.settings(MAIN_STUDY)
    planned = {name for setting in settings for name in results.variations(setting)}
    done = {name for setting in settings for name in planned if results.finished(setting, name)}
    return [v.name for v in results.campaign.variations if v.role == "ablation" and v.name in planned - done]


def _claims(results: Results, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return the findings by family, and within it by claim."""
    rows = [_claim_row(results, finding, number) for number, finding in enumerate(findings)]
    families = []
    for family in dict.fromkeys(f.family for f in findings):
        of = [row for row in rows if row["family"] == family]
        claims = [
            {"words": words, "rows": [row for row in of if row["words"] == words]}
            for words in dict.fromkeys(row["words"] for row in of)
        ]
        families.append({"family": family, "rows": of, "claims": claims})
    return families


def _claim_row(results: Results, finding: Finding, number: int) -> dict[str, Any]:
    return {
        **asdict(finding), "shown": shown(finding), "title": results.title(finding.variation), "place": number,
        "figures": claim_line(finding), "estimated": estimate_of(finding), "limits": limits_of(finding),
        "test": test_of(finding),
    }  # fmt: skip


def audit_table(content: Mapping[str, Any]) -> tables.Table:
    """Return the efficiency audit's table from what ``audit.json`` holds."""
    shown = (
        ("seconds_per_step", "s a step", 4), ("ratio", "time, ratio", 3), ("tokens_per_second", "tokens/s", 0),
        ("peak_memory_mb", "peak memory, MB", 0), ("peak_memory_difference_mb", "difference, MB", 0),
        ("gflops_per_step", "GFLOP a step", 2), ("head_share", "share of the head", 2),
        ("utilisation_percent", "utilisation, %", 0), ("joules_per_step", "J a step", 2),
    )  # fmt: skip
    rows = []
    for entry in audit_rows(content):
        cells = [tables.Cell(entry["title"] or entry["variation"])]
        for key, _, decimals in shown:
            value, low, high = (entry.get(f"{key}{end}") for end in ("", "_p10", "_p90"))
            text = "not measured" if value is None else f"{round(value, decimals) + 0.0:,.{decimals}f}"  # no "-0"
            known = value is not None and low is not None
            cells.append(tables.Cell(f"{text} ({low:,.{decimals}f} to {high:,.{decimals}f})" if known else text))
        rows.append(cells)
    caption = (
        f"Audit: one training step of {content['settings']['tokens']:,} tokens of the same text on "
        f"{content['machine']['device']}; median, 10th and 90th percentile of {content['settings']['repeats']} rounds"
    )
    return tables.Table(caption, ["", *(label for _, label, _ in shown)], rows)


def texts_of(results: Results, setting: Setting) -> list[dict[str, Any]]:
    """Return the texts of the first seed side by side: a prompt, the reference, and what each variation wrote."""
    found: dict[str, dict[str, Any]] = {}
    for name in results.variations(setting):
        if not drawn(results.campaign, name):
            continue
        records = map(results.record, results.points(setting, name))
        record = next((record for record in records if record is not None), None)
        for sample in record.samples if record is not None else ():
            new = {"prompt": sample["prompt"], "reference": sample.get("reference", ""), "outputs": []}
            entry = found.setdefault(sample["prompt"], new)
            entry["outputs"].append((results.title(name), _without_gaps(sample["output"])))
    return list(found.values())


def _without_gaps(text: str) -> str:
    """Return a text whose gaps are counted, not shown: a small model may write nothing but hundreds of empty lines."""
    return re.sub(r"\n(?:[^\S\n]*\n){3,}", lambda gap: f"\n[{gap[0].count(chr(10)) - 1} empty lines]\n", text)


def _reproduce(results: Results, directory: Path) -> dict[str, Any]:
    campaign, records = results.campaign, [results.records[i] for i in results.campaign.order if i in results.records]
    machines = {json.dumps(r.machine, sort_keys=True): r.machine for r in results.records.values()}
    plan = directory / "plan.json"
    command = read_json(plan).get("command") if plan.exists() else None
    return {
        "command": command or f"dpsm campaign run {campaign.name} --scale {campaign.scale}",
        "machines": list(map(_flat, machines.values())),
        "source": campaign.source,
        "source_sha": hashlib.sha256(campaign.source.encode()).hexdigest()[:16],
        "runs": records,
    }


def _flat(machine: Mapping[str, Any]) -> str:
    """Return what a record says of its machine as one line."""
    words = []
    for key, value in machine.items():
        if key == "dirty":  # the checkout that `commit` names had changes of its own
            words.append(f"{'with' if value else 'without'} uncommitted changes")
        elif isinstance(value, Mapping):
            words.append(f"{key}: {', '.join(f'{name} {of}' for name, of in value.items())}")
        else:
            words.append(f"{key}: {value}")
    return "; ".join(words)
