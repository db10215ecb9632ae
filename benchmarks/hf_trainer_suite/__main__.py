"""Run Transformers' own Trainer tests with `Trainer` and with `DPSMTrainer`, and write down the differences.

    python -m benchmarks.hf_trainer_suite                      # clones the tests of the installed version
    python -m benchmarks.hf_trainer_suite --source transformers # uses an existing checkout

The exit status is 1 if a test passes with Trainer, fails with DPSMTrainer, and has no reason in differences.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks.hf_trainer_suite import source, stand_ins, table
from benchmarks.hf_trainer_suite.columns import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "benchmarks.hf_trainer_suite.plugin"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpsm_hf" / "hf_trainer_suite"

HEADING = """# Transformers' own Trainer tests, with DPSMTrainer

`python -m benchmarks.hf_trainer_suite` clones `tests/trainer` of Transformers at the installed version with the user's
git (or takes a checkout, `--source FOLDER`), and runs every test three times, on the CPU and offline: with `Trainer`,
with `DPSMTrainer` at `scoring_rule="ce"` and `fused_head="off"`, and with `DPSMTrainer` as it is. The names `Trainer`
and `Seq2SeqTrainer` are replaced before the tests import them; nothing else of them is touched, and none of their
code is in this repository. Models of the hub are replaced by tiny random ones of the same kind (`stand_ins.py`).

- *ce, without our callbacks and clock* runs what fails with ce once more, without the two callbacks that `DPSMTrainer`
  adds and with its clock of training standing still: what passes then failed for nothing else.
- *refused*: the test trains something that is no language model (a regression, a classifier), and
  `scoring_rule="dpsm"` says so instead of training it.

Every test with its outcome and its error is in
`benchmarks/results/hf_trainer_suite.csv`. This page is written by the script.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", type=Path, help="a checkout of Transformers; by default one is cloned into --cache")
    p.add_argument("--cache", type=Path, default=_CACHE, help="where the clone and the stand-ins are kept")
    p.add_argument(
        "--files", nargs="+", default=["test_*.py"], help="of tests/trainer; other rows stay as --csv has them"
    )
    p.add_argument("-k", dest="expression", default="", help="only tests that match, likewise")
    columns = ["stock", "ce", "dpsm"]
    p.add_argument("--columns", nargs="+", choices=columns, default=columns, help="the others stay as --csv has them")
    p.add_argument("--seconds", type=int, default=300, help="after which a test has failed")
    p.add_argument("--slow", action="store_true", help="also those that Transformers calls slow")
    p.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "hf_trainer_suite.csv")
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "hf_trainer_suite.md")
    p.add_argument("--note", default="", help="a sentence for the page, about where the tests come from")
    return p


def main(command: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser().parse_args(command)
    folder = source.checked(arguments.source) if arguments.source else source.downloaded(arguments.cache)
    home = stand_ins.hub_cache(arguments.cache / "stand-ins")
    files = sorted({path for pattern in arguments.files for path in (folder / source.TESTS).glob(pattern)})
    if importlib.util.find_spec("parameterized") is None:
        print("some tests need the package parameterized: pip install parameterized", file=sys.stderr)
    if not files:
        print(f"{folder / source.TESTS} has no file like {', '.join(arguments.files)}", file=sys.stderr)
        return 2
    tests = [f"{source.TESTS.as_posix()}/{path.name}" for path in files]
    outcomes = table.earlier(arguments.csv) if _partial(arguments) else {}
    for column in arguments.columns:
        measured = run(folder, home, column, tests, arguments)
        outcomes[column] = outcomes.get(column, {}) | measured
        ended = [found.outcome for found in measured.values()]
        counts = [ended.count(outcome) for outcome in ("passed", "failed", "skipped")]
        print(f"{COLUMNS[column].title}: {counts[0]} passed, {counts[1]} failed, {counts[2]} skipped", flush=True)
        if column == "ce":  # earlier outcomes without our callbacks are out of date for these tests
            kept = outcomes.get("ce_bare", {})
            outcomes["ce_bare"] = {test: found for test, found in kept.items() if test not in measured}
    bare = outcomes.get("ce_bare", {})
    failing = [row.test for row in table.rows(outcomes) if row.comparable and row.ce == "failed"]
    if failing := [test for test in failing if test not in bare]:
        outcomes["ce_bare"] = bare | run(folder, home, "ce_bare", failing, arguments)
    found = table.rows(outcomes)
    table.write_csv(found, arguments.csv)
    heading = "\n".join([HEADING, _circumstances(folder, arguments.note)])
    arguments.page.write_text(table.page(found, heading), encoding="utf-8")
    unexplained = table.unexplained(found)
    for test in unexplained:
        print(f"passes with Trainer, not with DPSMTrainer: {test}")
    return int(bool(unexplained))


def _partial(arguments: argparse.Namespace) -> bool:
    """Return whether only a part is run, so that the rest of the table has to be kept."""
    default = parser().parse_args([])
    return any(getattr(arguments, name) != getattr(default, name) for name in ("columns", "files", "expression"))


def run(
    folder: Path, home: Path, column: str, tests: list[str], arguments: argparse.Namespace
) -> dict[str, table.Outcome]:
    """Run tests with one trainer, in a new process and an empty working folder."""
    with tempfile.TemporaryDirectory() as name:
        work, report = Path(name), Path(name) / "outcomes.jsonl"
        # files that the tests write go to the working folder, and Transformers' own conftest.py is not loaded
        (work / "tests").symlink_to(folder / "tests")
        (work / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        report.touch()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
        command.append("--continue-on-collection-errors")  # some tests import packages that are not installed
        command += ["-k", arguments.expression] if arguments.expression else []
        done = subprocess.run(
            command,
            cwd=work,
            env=_environment(home, column, report, arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        outcomes = table.read(report)
        # 0: all passed, 1: some failed, 2: a file could not be imported, which the plugin has reported
        if done.returncode not in (0, 1, 2) or not outcomes:
            raise RuntimeError(f"pytest ended with {done.returncode} in column {column}:\n{done.stdout[-3000:]}")
        return outcomes


def _environment(home: Path, column: str, report: Path, arguments: argparse.Namespace) -> dict[str, str]:
    # tests must not see credentials and settings of the user's own hub account
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "WANDB_", "PYTEST_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {
        "PYTHONPATH": path,
        "PYTEST_PLUGINS": PLUGIN,
        "DPSM_SUITE_COLUMN": column,
        "DPSM_SUITE_REPORT": str(report),
        "DPSM_SUITE_SECONDS": str(arguments.seconds),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RUN_SLOW": "1" if arguments.slow else "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _circumstances(folder: Path, note: str) -> str:
    sentence = (
        f"Transformers {transformers.__version__} ({source.described(folder)}), torch {torch.__version__}, "
        f"Python {sys.version_info.major}.{sys.version_info.minor}."
    )
    return f"{sentence} {note}".strip()


if __name__ == "__main__":
    sys.exit(main())
