"""The outcomes of the tests as a CSV, and as a page of the documentation."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.hf_trainer_suite import differences
from benchmarks.hf_trainer_suite.columns import COLUMNS

#: Parts of the error with which `DPSMTrainer` refuses a model that is not a language model.
REFUSALS = ("a scoring rule scores token ids",)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one test with one trainer."""

    outcome: str
    trainers: int
    error: str


@dataclass
class Row:
    """One test: its outcome in every column, and the verdict."""

    test: str
    trainers: int = 0
    stock: str = ""
    ce: str = ""
    ce_bare: str = ""
    dpsm: str = ""
    verdict: str = ""
    reason: str = ""
    error: str = ""
    dpsm_error: str = ""

    @property
    def comparable(self) -> bool:
        """Return whether the test can be compared: it makes a trainer, and passes with `Trainer`."""
        return self.stock == "passed" and self.trainers > 0

    @property
    def name(self) -> str:
        """Return the name of the test without file, class and parameters."""
        return self.test.rsplit("::", 1)[-1].split("[", 1)[0]

    @property
    def file(self) -> str:
        """Return the name of its file."""
        return Path(self.test.split("::", 1)[0]).name


def read(path: Path) -> dict[str, Outcome]:
    """Return the outcomes in the plugin's file, by test."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["test"]: Outcome(line["outcome"], line["trainers"], line["error"]) for line in lines}


def earlier(path: Path) -> dict[str, dict[str, Outcome]]:
    """Return the outcomes in a CSV by column and test; empty if there is no such file."""
    found: dict[str, dict[str, Outcome]] = {}
    if not path.exists():
        return found
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for name in COLUMNS:
                if not line[name]:
                    continue
                error = line["dpsm_error" if name == "dpsm" else "error"]
                ended = "failed" if line[name] == "refused" else line[name]
                found.setdefault(name, {})[line["test"]] = Outcome(ended, int(line["trainers"]), error)
    return found


def rows(outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[Row]:
    """Return the rows of the table from the outcomes by column and test."""
    made = []
    for test in sorted({test for column in outcomes.values() for test in column}):
        of = {name: column[test] for name, column in outcomes.items() if test in column}
        row = Row(test)
        for name, found in of.items():
            setattr(row, name, found.outcome)
        row.trainers = max((found.trainers for found in of.values()), default=0)
        if "ce" in of:
            row.error = of["ce"].error if of["ce"].outcome == "failed" else ""
        if row.stock != "passed" and "stock" in of:
            row.error = of["stock"].error
        if "dpsm" in of and of["dpsm"].outcome == "failed" and row.comparable:
            row.dpsm_error = of["dpsm"].error
            if any(refusal in row.dpsm_error for refusal in REFUSALS):
                row.dpsm = "refused"
        row.verdict, row.reason = _verdict(row)
        made.append(row)
    return made


def _verdict(row: Row) -> tuple[str, str]:
    if not row.comparable:
        return "not comparable", "" if row.stock != "passed" else "makes no trainer"
    if row.ce == "passed":
        return "same", ""
    if reason := differences.CROSS_ENTROPY.get(row.name):
        return "differs", reason
    return "open", ""


def unexplained(table: Iterable[Row]) -> list[str]:
    """Return the tests that pass with `Trainer`, fail with `DPSMTrainer`, and have no reason in `differences`."""
    found = [row.test for row in table if row.verdict == "open" and row.ce]
    found += [
        f"{row.test} (dpsm)"
        for row in table
        if row.verdict == "same" and row.dpsm == "failed" and row.name not in differences.DPSM
    ]
    return found


def write_csv(table: Sequence[Row], path: Path) -> None:
    """Write the table as CSV, one row per test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)


def page(table: Sequence[Row], heading: str) -> str:
    """Return the Markdown of the documentation page."""
    comparable = [row for row in table if row.comparable]
    lines = [heading.strip(), "", "## Result", "", *_summary(table, comparable), "", "## By file", ""]
    lines += _by_file(comparable)
    lines += ["", "## What differs, and why", "", *_differing(comparable), ""]
    return "\n".join(lines)


def _summary(table: Sequence[Row], comparable: Sequence[Row]) -> list[str]:
    other = Counter("makes no trainer" if row.stock == "passed" else row.stock for row in table if not row.comparable)
    lines = [
        f"{len(table)} tests ran; {len(comparable)} are comparable: they make a trainer and pass with `Trainer` here. "
        f"Of the others {other['makes no trainer']} make none, {other['skipped']} were skipped and {other['failed']} "
        "fail with `Trainer` too.",
        "",
        "| trainer | comparable tests that pass | refused | fail with a reason | open |",
        "|---|---|---|---|---|",
    ]
    for name in ("stock", "ce", "ce_bare", "dpsm"):
        given = [row for row in comparable if getattr(row, name)]
        if not given:
            continue
        passed = sum(getattr(row, name) == "passed" for row in given)
        refused = sum(getattr(row, name) == "refused" for row in given)
        failed = [row for row in given if getattr(row, name) == "failed"]
        reasons = differences.CROSS_ENTROPY if name != "dpsm" else {**differences.CROSS_ENTROPY, **differences.DPSM}
        why = sum(row.name in reasons for row in failed)
        lines.append(f"| {COLUMNS[name].title} | {passed} of {len(given)} | {refused} | {why} | {len(failed) - why} |")
    return lines


def _by_file(comparable: Sequence[Row]) -> list[str]:
    lines = ["| file | comparable | ce | dpsm | refused by dpsm |", "|---|---|---|---|---|"]
    for file in sorted({row.file for row in comparable}):
        here = [row for row in comparable if row.file == file]
        counts = [sum(getattr(row, name) == "passed" for row in here) for name in ("ce", "dpsm")]
        refused = sum(row.dpsm == "refused" for row in here)
        lines.append(f"| {file} | {len(here)} | {counts[0]} | {counts[1]} | {refused} |")
    return lines


def _differing(comparable: Sequence[Row]) -> list[str]:
    lines = ["| test | ce | ce, without our callbacks and clock | dpsm | reason |", "|---|---|---|---|---|"]
    for row in comparable:
        if row.ce == "passed" and row.dpsm in ("passed", "refused", ""):
            continue
        reason = row.reason or differences.DPSM.get(row.name, "open")
        lines.append(f"| {row.file}, {row.name} | {row.ce} | {row.ce_bare or '–'} | {row.dpsm or '–'} | {reason} |")
    return lines if len(lines) > 2 else ["Nothing."]
