"""The measuring process of an audit: ``python -m dpsm_hf.campaign.audit.worker KIND SPEC NAME...``.

``memory`` measures the peak memory of one variation and counts its operations; ``time`` times all variations, round
by round, and profiles each; ``sustain`` runs many large steps of each. Each finding is written at once, as one line of
JSON on standard output; all other output goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from ...measuring.energy import GpuMeter
from ...measuring.processes import peak_above, spread
from ...measuring.profiling import count_flops, profile_by_range
from ...runtime.child_process import end_with_parent
from .step import Shape, Steps, make_batches

# A time sample has as many steps as fit into this many seconds, so that clock and disturbances matter less.
_SAMPLE_SECONDS = 0.2
_MOST_STEPS = 50
# Seconds over which a GPU's energy is measured: its counter is updated ten times a second.
_GPU_SECONDS = 5.0
_PROGRESS_SECONDS = 20.0

Report = Callable[[Mapping[str, Any]], None]


class Measurement:
    """The measurements of one process.

    Args:
        spec: content of the file that `run_audit` has written (``_Audit._spec``).
        names: variations.
        report: gets each finding.
    """

    def __init__(self, spec: Mapping[str, Any], names: Sequence[str], report: Report) -> None:
        self.settings, self.reference, self.report = spec["settings"], spec["reference"], report
        self.steps = Steps(spec["task"], {name: spec["runs"][name] for name in names}, spec["tokenizer"])
        self.names = list(names)
        self.ids = torch.from_numpy(np.load(spec["ids"])).long()
        first = self.steps.runs[self.names[0]]
        longest = first.longest_row(self.steps.tokenizer, self.steps.model.config)
        self.shape = Shape.of(first, longest, self.settings["tokens"])

    def fixed_batch(self) -> list[dict[str, Tensor]]:
        """Return the batch that every variation is measured on."""
        return make_batches(self.ids, self.shape, None, self.steps.device)

    def memory(self) -> None:
        """Report the peak memory of a variation's step beyond model and optimizer state, and its operations."""
        (name,) = self.names
        batches = self.fixed_batch()
        step = functools.partial(self.steps.step, name, batches)
        self._warm_up(name, batches)
        peak = peak_above(step, self.steps.device)
        flops = count_flops(step, compiled=self.steps.runs[name].training_args.torch_compile)
        labels = int((batches[0]["labels"] != -100).sum())
        self.report({
            "variation": name, "peak_memory_mb": peak, "flops": asdict(flops), "alpha": self.steps.alpha(name),
            "parameters": sum(parameter.numel() for parameter in self.steps.model.parameters()),
            "batch": {**asdict(self.shape), "labels": labels},
        })  # fmt: skip

    def time(self, rounds: int) -> None:
        """Report the time of a step of every variation, round by round, then the profile and the energy of each."""
        batches = self.fixed_batch()
        alive = [name for name in self.names if self._works(self._warm_up, name, batches)]
        if not alive:
            return
        reference = self.reference if self.reference in alive else alive[0]
        # the same number of steps for all variations, from the reference's time
        count = max(1, min(_MOST_STEPS, math.ceil(_SAMPLE_SECONDS / self._seconds(reference, batches, 1))))
        for number in range(rounds):
            turn = number % len(alive)
            # rotated, since the first variation after a pause is at a disadvantage
            seconds = {name: self._seconds(name, batches, count) for name in [*alive[turn:], *alive[:turn]]}
            self.report({"round": seconds, "steps_per_sample": count})
        for name in alive:
            found = profile_by_range(functools.partial(self.steps.step, name, batches), self.steps.device)
            self.report({"variation": name, "profile": {key: asdict(value) for key, value in found.items()}})
            self.report({"variation": name, "gpu": self._gpu(name, batches)})

    def _works(self, measure: Callable[..., None], name: str, *arguments: Any) -> bool:
        try:
            measure(name, *arguments)
        except Exception as error:  # one variation failed; the others are still measured
            self.report({"variation": name, "failed": describe(error)})
            return False
        return True

    def _warm_up(self, name: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
        for _ in range(2):  # the first creates the optimizer's state
            self.steps.step(name, batches)

    def _seconds(self, name: str, batches: Sequence[Mapping[str, Tensor]], count: int) -> float:
        self.steps.wait()
        started = time.perf_counter()
        for _ in range(count):
            self.steps.step(name, batches)
        self.steps.wait()
        return (time.perf_counter() - started) / count

    def _gpu(self, name: str, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return utilisation and energy over some seconds of steps; without a GPU, the note that says so."""
        steps = 0
        with GpuMeter(self.steps.device) as meter:
            if self.steps.device.type == "cuda":
                started = time.perf_counter()
                while time.perf_counter() - started < _GPU_SECONDS:
                    self._seconds(name, batches, 1)
                    steps += 1
        return {**asdict(meter.reading), "steps": steps or None}

    def sustain(self) -> None:
        """Report the speed over many large steps of each variation, each step on the next part of the text."""
        for name in self.names:
            self._works(self._sustain, name)  # the large shape may not fit

    def _sustain(self, name: str) -> None:
        settings, run = self.settings, self.steps.runs[name]
        longest = run.longest_row(self.steps.tokenizer, self.steps.model.config)
        shape = Shape.rows(run, settings["sequences"], min(settings["length"], longest))
        size = shape.sequences * shape.length
        text = self.ids if len(self.ids) >= size else self.ids.repeat(-(-size // len(self.ids)))
        places = max(1, len(text) // size)
        seconds: list[float] = []
        said = time.perf_counter()

        def step(number: int) -> None:
            start = (number % places) * size
            rows = run.training_args.per_device_train_batch_size
            self.steps.step(name, make_batches(text[start : start + size], shape, rows, self.steps.device))
            self.steps.wait()

        step(0)
        with GpuMeter(self.steps.device) as meter:
            for number in range(settings["steps"]):
                started = time.perf_counter()
                step(number)
                seconds.append(time.perf_counter() - started)
                if time.perf_counter() - said > _PROGRESS_SECONDS:
                    said = time.perf_counter()
                    self.report({"progress": f"{name}: step {number + 1} of {settings['steps']}"})
        speed = shape.tokens * len(seconds) / sum(seconds)
        times = {"steps": len(seconds), **asdict(shape), "seconds_per_step": spread(seconds)}
        sustained = {**times, "tokens_per_second": speed, "gpu": asdict(meter.reading)}
        self.report({"variation": name, "sustained": sustained})


def describe(error: BaseException) -> str:
    """Return the kind of an error and its first line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _print_line(stream: TextIO, finding: Mapping[str, Any]) -> None:
    print(json.dumps(finding), file=stream, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the findings; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dpsm_hf.campaign.audit.worker", description=__doc__)
    parser.add_argument("kind", choices=["memory", "time", "sustain"])
    parser.add_argument("spec", type=Path, help="JSON file that `dpsm campaign audit` wrote")
    parser.add_argument("names", nargs="+", help="variations")
    parser.add_argument("--rounds", type=int, default=5, help="of kind time: samples of each variation")
    arguments = parser.parse_args(argv)
    end_with_parent()  # an orphaned process would disturb the next measurement
    report: Report = functools.partial(_print_line, sys.stdout)
    spec = json.loads(arguments.spec.read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(sys.stderr):
        try:
            measurement = Measurement(spec, arguments.names, report)
            if arguments.kind == "time":
                measurement.time(arguments.rounds)
            else:
                getattr(measurement, arguments.kind)()
        except Exception as error:
            for name in arguments.names:
                report({"variation": name, "failed": describe(error)})
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
