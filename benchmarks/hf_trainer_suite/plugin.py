"""The pytest plugin of the suite: it replaces the trainers, and writes down the outcome of each test.

`benchmarks.hf_trainer_suite` loads it by PYTEST_PLUGINS, so that processes started by a test load it too. Environment
variables give the column and the file for the outcomes.
"""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import transformers.trainer
import transformers.trainer_seq2seq

from benchmarks.hf_trainer_suite.columns import COLUMNS, Column
from dpsm_hf import AlphaScheduleCallback, CalibrationCallback, DPSMSeq2SeqTrainer, DPSMTrainer
from dpsm_hf.training import clock
from dpsm_hf.training.arguments import DPSMArguments

COLUMN, REPORT, SECONDS = "DPSM_SUITE_COLUMN", "DPSM_SUITE_REPORT", "DPSM_SUITE_SECONDS"
_WORST = ("skipped", "passed", "failed")
_LONGEST = 400  # characters to keep of an error


class Outcomes:
    """Write one line of JSON per test: its outcome, how many trainers it made, and its error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trainers = 0
        self._reports: list[Any] = []

    def count(self, trainer: type) -> None:
        """Count from now on how many instances of a trainer class each test makes."""
        original = trainer.__init__  # type: ignore[misc]

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> None:
            self._trainers += 1
            original(*args, **kwargs)

        trainer.__init__ = counted  # type: ignore[misc]

    def pytest_runtest_logstart(self) -> None:
        """Start a test with empty counts."""
        self._trainers, self._reports = 0, []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the report of a phase or a subtest."""
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write the line of a finished test."""
        # a test can be skipped in its setup or its call, but pass only in its call
        called = [r for r in self._reports if r.when == "call" or r.outcome != "passed"]
        outcome = max((r.outcome for r in called), key=_WORST.index, default="skipped")
        failed = [r for r in self._reports if r.outcome == outcome != "passed"]
        line = {
            "test": nodeid,
            "outcome": outcome,
            "trainers": self._trainers,
            "seconds": round(sum(r.duration for r in self._reports), 2),
            "error": _message(failed[0]) if failed else "",
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        """Write a line for a file that cannot be imported; otherwise its tests would be missing silently."""
        if report.failed:
            error = _message(report)
            line = {"test": report.nodeid, "outcome": "failed", "trainers": 0, "seconds": 0.0, "error": error}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = crash.message
    elif isinstance(report.longrepr, tuple):  # for a skipped test: file, line, reason
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        text = report.longreprtext.strip().splitlines()[-1] if report.longreprtext.strip() else ""
    return " ".join(text.split())[:_LONGEST]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that takes too long."""
    seconds = int(os.environ.get(SECONDS, "300"))

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"{item.nodeid} took more than {seconds} seconds")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def pytest_configure(config: pytest.Config) -> None:
    """Count trainers and write outcomes; processes started by a test only get the replaced trainers."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"  # as in Transformers' own conftest.py
    if path := os.environ.pop(REPORT, ""):
        outcomes = Outcomes(Path(path))
        outcomes.count(transformers.trainer.Trainer if not _STOCK else _STOCK[0])
        config.pluginmanager.register(outcomes)


_STOCK: list[type] = []


def in_place_of(stock: type, ours: type, column: Column) -> type:
    """Return a subclass of our trainer with the name and module of the Transformers trainer it replaces."""

    def dpsm(self: Any) -> DPSMArguments:
        found = super(swapped, self).dpsm  # type: ignore[misc]
        if not isinstance(self.args, DPSMArguments):
            for name, value in (column.settings or {}).items():
                setattr(found, name, value)
        return found

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        super(swapped, self).__init__(*args, **kwargs)  # type: ignore[misc]
        if not column.callbacks:
            for kind in (AlphaScheduleCallback, CalibrationCallback):
                self.remove_callback(kind)

    members = {"dpsm": property(dpsm), "__init__": init, "__module__": stock.__module__}
    swapped: Any = type(stock.__name__, (ours,), members)
    return swapped


def swap(column: Column) -> None:
    """Replace the trainers in Transformers, for every later import, as the column says."""
    stock, seq2seq = transformers.Trainer, transformers.Seq2SeqTrainer
    _STOCK.append(stock)
    if not column.ours:
        return
    if not column.callbacks:  # a stopped clock, so that tests that compare states see no difference of time
        clock.time = SimpleNamespace(perf_counter=lambda: 0.0)  # type: ignore[assignment]
    for module in (transformers, transformers.trainer):
        module.Trainer = in_place_of(stock, DPSMTrainer, column)  # type: ignore[attr-defined]
    for module in (transformers, transformers.trainer_seq2seq):
        module.Seq2SeqTrainer = in_place_of(seq2seq, DPSMSeq2SeqTrainer, column)  # type: ignore[attr-defined]


# at import, which is before any test module is imported
swap(COLUMNS[os.environ.get(COLUMN, "stock")])
