"""The report of a campaign: one HTML page that needs no network, the same in Markdown, and the verdict as JSON."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...runtime.files import read_json, write_json
from ..audit.audit import AUDIT_NAME
from ..audit.audit import table as audit_rows
from ..runner.records import Record, read_records
from ..spec.design import Campaign
from ..verdict.audited_claims import audited_claims
from ..verdict.finding import Finding
from ..verdict.results import Results, Setting
from ..verdict.verdict import MAIN_STUDY, overall, verdict
from . import tables
from .document_tests import document_table
from .pages import Pictures, render
from .pictures import drawn, picture_sections
from .words import GLOSSARY, claim_line, headline, settings_line

VERDICT_NAME, HTML_NAME, MARKDOWN_NAME, TABLES_NAME = "verdict.json", "report.html", "report.md", "figures.json"


def write_campaign_report(campaign: Campaign, directory: Path, only: Sequence[str] = ()) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``verdict.json``, ``figures.json`` and ``plots/`` from the records.

    Args:
        campaign: its design; runs without a record are named as missing.
        directory: of the campaign.
        only: what the campaign was cut down to, in words, where it is a part; the page says so.

    Returns:
        The files, the page first.

    Raises:
        ValueError: if there is no record at all, or one that cannot be read.
    """
    directory = Path(directory)
    records = read_records(directory, campaign.order)
    if not any(record.status == "ok" for record in records.values()):
        ended = Counter(record.status for record in records.values())
        what = ", ".join(f"{number} {status}" for status, number in sorted(ended.items())) or "none has begun"
        raise ValueError(
            f"{directory} holds no run of this campaign that ended well ({what}). 'dpsm campaign run' does what is "
            "missing; 'dpsm campaign status' says why others ended, --retry takes them up again."
        )
    results = Results(campaign, records)
    audit = read_json(directory / AUDIT_NAME) if (directory / AUDIT_NAME).exists() else None
    findings = verdict(results) + (audited_claims(campaign, audit) if audit is not None else [])
    context = {**_context(campaign, results, findings, directory, audit), "only": " ".join(only)}
    written = [
        render(template, directory / name, **context)
        for name, template in ((HTML_NAME, "campaign.html.j2"), (MARKDOWN_NAME, "campaign.md.j2"))
    ]
    content = {
        "schema": 1,
        "campaign": campaign.name,
        "scale": campaign.scale,
        "headline": context["headline"],
        "overall": {v.name: overall(findings, v.name) for v in _judged(campaign, findings)},
        "findings": [finding.as_dict() for finding in findings],
    }
    write_json(content, directory / VERDICT_NAME)
    write_json({"schema": 1, "tables": [asdict(t) for t in context["all_tables"]]}, directory / TABLES_NAME)
    return [*written, directory / VERDICT_NAME, directory / TABLES_NAME]


def _judged(campaign: Campaign, findings: Sequence[Finding]) -> list[Any]:
    names = {finding.variation for finding in findings}
    return [v for v in campaign.variations if v.name in names]


def _context(
    campaign: Campaign,
    results: Results,
    findings: Sequence[Finding],
    directory: Path,
    audit: Mapping[str, Any] | None,
) -> dict[str, Any]:
    pictures = Pictures(directory / "plots")
    settings = results.settings(MAIN_STUDY) or results.settings()[:1]
    quality = tables.QUALITY.get(campaign.task, tables.QUALITY["language-modelling"])
    best = Results(campaign, results.records, checkpoint="best")
    blocks: dict[str, list[tables.Table | None]] = {"final": [], "efficiency": [], "robustness": []}
    for setting in settings:
        blocks["final"] += [
            tables.comparison(results, setting, (*quality, *tables.CALIBRATION), "Last checkpoint"),
            tables.comparison(results, setting, tables.AFTER, "Last checkpoint, after temperature scaling"),
            tables.comparison(best, setting, (*quality, *tables.CALIBRATION), "Best checkpoint on validation"),
            document_table(results, setting, directory),
        ]
        blocks["efficiency"].append(tables.cost(results, setting))
        blocks["robustness"] += tables.out_of_domain(results, setting, (*quality, *tables.CALIBRATION[:4]))
        blocks["robustness"].append(tables.spread(results, setting, (*quality[:1], *tables.CALIBRATION[:4])))
    blocks["efficiency"].append(audit_table(audit) if audit is not None else None)
    blocks["robustness"][:0] = tables.differences(results, (*quality[:2], *tables.CALIBRATION[:5]))
    unknown = _unfinished_ablations(results)
    told = [f for f in findings if f.estimate is not None or f.variation not in unknown]
    shown = {name: [t for t in found if t is not None and t.rows] for name, found in blocks.items()}
    return {
        "campaign": campaign,
        "headline": headline(campaign, findings),
        "claims": [
            {"family": family, "rows": [_claim_row(campaign, f) for f in told if f.family == family]}
            for family in dict.fromkeys(f.family for f in told)
        ],
        "unjudged": [campaign.variation(name).title for name in unknown],
        "main": [v for v in campaign.variations if v.role == "main"],
        "settings": settings_line(campaign, results),
        "tables": shown,
        "all_tables": [table for found in shown.values() for table in found],
        "sections": picture_sections(results, settings, pictures),
        "missing": tables.missing_runs(results),
        "stopped": tables.stopped_early(results),
        "samples": _samples(results, settings[0]),
        "glossary": GLOSSARY,
        "reproduce": _reproduce(campaign, results, directory),
        "counts": dict(Counter(r.status for r in results.records.values())),
    }


def _unfinished_ablations(results: Results) -> list[str]:
    """Return the main study's ablations without a finished run; the page leaves out their claims."""
    settings = results.settings(MAIN_STUDY)
    planned = {name for setting in settings for name in results.variations(setting)}
    done = {name for setting in settings for name in planned if results.finished(setting, name)}
    return [v.name for v in results.campaign.variations if v.role == "ablation" and v.name in planned - done]


def _claim_row(campaign: Campaign, finding: Finding) -> dict[str, Any]:
    return {
        "decision": finding.decision,
        "css": finding.decision.replace(" ", "-"),
        "title": campaign.variation(finding.variation).title,
        "role": finding.role,
        "words": finding.words,
        "setting": finding.setting,
        "figures": claim_line(finding),
        "note": finding.note,
    }


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
            value = entry.get(key)
            text = "not measured" if value is None else f"{value:,.{decimals}f}"
            if value is not None and entry.get(f"{key}_p10") is not None:
                text += f" ({entry[f'{key}_p10']:,.{decimals}f} to {entry[f'{key}_p90']:,.{decimals}f})"
            cells.append(tables.Cell(text))
        rows.append(cells)
    caption = (
        f"Audit: one training step of {content['settings']['tokens']:,} tokens of the same text on "
        f"{content['machine']['device']}; median, 10th and 90th percentile of {content['settings']['repeats']} rounds"
    )
    return tables.Table(caption, ["", *(label for _, label, _ in shown)], rows)


def _samples(results: Results, setting: Setting) -> list[dict[str, Any]]:
    """Return the texts of the first seed side by side: a prompt, the reference, and what each variation wrote."""
    found: dict[str, dict[str, Any]] = {}
    for name in results.variations(setting):
        if not drawn(results.campaign, name):
            continue
        points = [p for p in results.points(setting, name) if results.record(p) is not None]
        record = results.record(points[0]) if points else None
        for sample in record.samples if record is not None else ():
            entry = found.setdefault(
                sample["prompt"], {"prompt": sample["prompt"], "reference": sample.get("reference", ""), "outputs": []}
            )
            entry["outputs"].append((results.campaign.variation(name).title, sample["output"]))
    return list(found.values())


def _reproduce(campaign: Campaign, results: Results, directory: Path) -> dict[str, Any]:
    machines: dict[str, Mapping[str, Any]] = {}
    for record in results.records.values():
        machines.setdefault(json.dumps(record.machine, sort_keys=True), record.machine)
    plan = directory / "plan.json"
    command = read_json(plan).get("command") if plan.exists() else None
    return {
        "command": command or f"dpsm campaign run FILE --scale {campaign.scale}",
        "machines": [_flat(machine) for machine in machines.values()],
        "source": campaign.source,
        "source_sha": hashlib.sha256(campaign.source.encode()).hexdigest()[:16],
        "runs": [_run_line(results.records[i]) for i in campaign.order if i in results.records],
    }


def _flat(machine: Mapping[str, Any]) -> str:
    parts = []
    for key, value in machine.items():
        inner = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        parts.append(f"{key}: {inner}")
    return "; ".join(parts)


def _run_line(record: Record) -> dict[str, Any]:
    seconds = sum(a.get("seconds") or 0.0 for a in record.attempts)
    return {
        "id": record.run_id, "name": record.name, "status": record.status, "attempts": len(record.attempts),
        "seconds": f"{seconds:,.0f}",
    }  # fmt: skip
