"""Run all benchmarks of time and memory into one CSV, and draw it: ``python -m benchmarks`` (an hour on two cores).

Rows are written as they are measured, so an interrupt loses none; measuring a case again replaces its row.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import evaluation, growth, head, plot, training_step
from benchmarks.common import add_target, open_table

# the variants to measure for large heads on a CPU, where each sample takes seconds
_FEW = ["compiled", "three products", "ours", "linear CE, auto"]


def main() -> None:
    """Run from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target(p)
    parts = ["head", "step", "evaluation", "growth", "large", "plot"]
    p.add_argument("--parts", nargs="+", choices=parts, default=parts, help="large: the wide and the tall heads")
    arguments = p.parse_args()
    device = torch.device(arguments.device)
    table = open_table(arguments, device)
    common = ["--device", arguments.device]
    few = [] if device.type == "cuda" else ["--only", *_FEW]
    if "head" in arguments.parts:
        extra = ["--dims", "256", "768", "--vocab", "50257", "--budget", "420"]
        head.run(head.parser().parse_args([*common, *extra]), table, device)
    if "step" in arguments.parts:
        training_step.run(training_step.parser().parse_args(common), table, device)
    if "evaluation" in arguments.parts:
        evaluation.run(evaluation.parser().parse_args(common), table, device)
    if "growth" in arguments.parts:
        growth.run(growth.parser().parse_args(common), table, device)
    if "large" in arguments.parts:
        for extra in (["--dims", "256", "768", "--vocab", "128256"], ["--dims", "4096", "--budget", "60"]):
            head.run(head.parser().parse_args([*common, *extra, *few]), table, device)
    if "plot" in arguments.parts:
        plot.draw(table.path)


if __name__ == "__main__":
    main()
