"""The command ``dpsm campaign``: plan, run, status, report and audit of a campaign's file."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..runtime.files import check_folder, write_json
from ..runtime.mistakes import exit_status
from ..runtime.yaml_lines import SpecError
from .runner import running
from .runner.records import RETRIES
from .spec.design import SCALES, Campaign

PLAN_NAME = "plan.json"

_STEPS = {
    "plan": "print the runs, tokens, operations and estimated hours; nothing is started",
    "run": "do the runs that are missing, then the audit and the report",
    "status": "print which runs are done, under way, failed, pruned or missing",
    "report": "write the report from the records that are there",
    "audit": "measure what a step of each variation costs",
}
_EPILOG = """\
examples:
  dpsm campaign plan exp-1-language-modelling-scaling --scale paper
  dpsm campaign run exp-1-language-modelling-scaling --only role=main --only seed=1,2
  dpsm campaign run FILE --data train=mine/train.txt,validation=mine/valid.txt,test=mine/test.txt
  dpsm campaign run FILE --set base.max_steps=1000 --set seeds=[1,2,3,4,5]

A run that was stopped goes on with the same command; finished runs are kept. docs/campaigns.md describes the file."""
_SPEED_HELP = """speed of each process of the machine that is planned for, 1.2e14 for an A100, say; left out, it
is that of finished runs of the same size, or else guessed from this machine's matrix products"""
_ONLY_HELP = """only these points: KEY is study, variation, role, size, data or seed, PATTERN may hold *, and commas
mean or (variation=dpsm-*,focal). Given several times, all must match"""
_SET_HELP = """change the file: base.max_steps=100, data.mine.train_file=x.txt, seeds=[1]; null takes an argument back.
Files are looked for from the working directory"""
_DATA_HELP = """run every study on this data set: one of the file, python-docs, python-docstrings, OWNER/NAME[:CONFIG]
of the hub, a folder, or train=FILE,validation=FILE,test=FILE"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 where all is well, 1 where runs have failed, 2 for a mistake in file or command, 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(words)
    return exit_status(lambda: _do(options, words))


def _do(options: argparse.Namespace, words: list[str]) -> int:
    from .spec.loading import load_campaign  # needs torch and transformers, which take seconds

    try:
        changes = [*options.set, *([] if options.data is None else [f"data={options.data}"])]
        campaign = load_campaign(options.file, options.scale, options.only, changes)
        directory = check_folder(options.output_dir, "--output_dir") / f"{campaign.name}-{campaign.scale}"
        step: Callable[[Campaign, Path, argparse.Namespace, list[str]], int] = globals()[f"_{options.step}"]
        return step(campaign, directory, options, words)
    except SpecError as error:
        count = len(error.problems)
        print("\n".join(error.problems), file=sys.stderr)
        print(f"{count} mistake{'s' if count > 1 else ''}; nothing was started.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    form: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    aim = "From a YAML file to runs, records, statistics, a verdict and a report."
    parser = argparse.ArgumentParser(prog="dpsm campaign", description=aim, **form)
    steps = parser.add_subparsers(dest="step", required=True, metavar="{" + ",".join(_STEPS) + "}")
    common = _common_options()
    for name, what in _STEPS.items():
        step = steps.add_parser(name, help=what, description=f"{what.capitalize()}.", parents=[common], **form)
        if name == "plan":
            step.add_argument("--json", action="store_true", help="print the plan as JSON")
            step.add_argument("--runs", action="store_true", help="list every run too")
            step.add_argument("--flops_per_second", type=_positive, metavar="F", help=_SPEED_HELP)
        if name in ("plan", "run"):
            step.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
        if name == "run":
            step.add_argument(
                "--devices", metavar="LIST", help="GPUs to share out, 0,1,2,3 for instance (default: all visible)"
            )
            what = "take runs up again that are failed, oom or diverged"
            step.add_argument("--retry", action="append", default=[], choices=RETRIES, metavar="STATUS", help=what)
            what = "what is left of finished runs: all; model, no checkpoints (default); records, no weights"
            step.add_argument("--keep", default="model", choices=running.KEEP, help=what)
            step.add_argument("--no_audit", action="store_true", help="leave out the efficiency audit")
            step.add_argument("--no_report", action="store_true", help="leave out the report")
    return parser


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("file", metavar="FILE", help="the campaign: a YAML file, or the name of a shipped one")
    common.add_argument(
        "--scale", choices=SCALES, default="small", help="small: two CPU cores; paper: as published (default: small)"
    )
    common.add_argument("--only", action="append", default=[], metavar="KEY=PATTERN", help=_ONLY_HELP)
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_SET_HELP)
    common.add_argument("--data", metavar="NAME", help=_DATA_HELP)
    common.add_argument(
        "--output_dir", default="campaign-output", help="records and report go to OUTPUT_DIR/NAME-SCALE"
    )
    return common


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


# ---- steps ---------------------------------------------------------------------------------------------------------


def _plan(campaign: Campaign, directory: Path, options: argparse.Namespace, words: list[str]) -> int:
    from .plan import make_plan, render_plan

    jobs = max(1, options.jobs)
    plan = make_plan(campaign, directory, flops_per_second=options.flops_per_second, jobs=jobs)
    print(json.dumps(plan, indent=1) if options.json else render_plan(plan, every_run=options.runs))
    return 0


def _run(campaign: Campaign, directory: Path, options: argparse.Namespace, words: list[str]) -> int:
    from .plan import make_plan, render_plan

    plan = make_plan(campaign, directory, jobs=max(1, options.jobs))
    print(render_plan(plan), file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    # what brought it about, for whoever repeats it
    write_json({**plan, "command": f"dpsm campaign {shlex.join(words)}"}, directory / PLAN_NAME)
    devices = options.devices.split(",") if options.devices else None
    code = running.run_campaign(
        campaign, directory, jobs=options.jobs, devices=devices, retry=options.retry, keep=options.keep
    )
    if code not in (0, 1):
        return code
    steps = [_audit] if campaign.audit is not None and not options.no_audit else []
    for step in steps if options.no_report else [*steps, _report]:
        try:
            step(campaign, directory, options, words)
        except ValueError as error:  # an audit that cannot be made leaves the report to be written
            print(f"error: {error}", file=sys.stderr)
            code = 1
    return code


def _status(campaign: Campaign, directory: Path, options: argparse.Namespace, words: list[str]) -> int:
    from .runner.status import campaign_status

    print(campaign_status(campaign, directory))
    return 0


def _report(campaign: Campaign, directory: Path, options: argparse.Namespace, words: list[str]) -> int:
    from .report.report import write_campaign_report

    for path in write_campaign_report(campaign, directory, options.only or ()):
        print(path)
    return 0


def _audit(campaign: Campaign, directory: Path, options: argparse.Namespace, words: list[str]) -> int:
    from .audit.audit import AUDIT_NAME, run_audit

    if options.step == "run" and not any(point.variation == campaign.reference for point in campaign.points):
        print("The audit is left out: it compares with the reference, which --only leaves out.", file=sys.stderr)
        return 0
    run_audit(campaign, directory)
    print(directory / AUDIT_NAME)
    return 0
