"""`run_campaign`: launch the runs of a campaign that are not done yet, several at a time, each in its own process.

All state is in the records: `run_campaign` may be killed at any moment, and the next call continues from there.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from ...runtime.child_process import Child
from ...runtime.files import write_json
from ..spec.design import Campaign, Run
from .attempts import Attempt, Ending, recover
from .budget import Pruning, check_halving
from .collecting import clean_folder
from .launching import LOG_NAME, Workplace, check_campaign, cores, launch_environment, run_folder, visible_devices
from .lock import RunnerError, campaign_lock, kill_run
from .progress import Progress, run_names
from .records import RETRIES, SETTLED, Record, read_records, write_record
from .tokenizer import MODULE as TOKENIZER_MODULE
from .tokenizer import shared_tokenizer, tokenizer_settings

#: A run with so many failed attempts, over all calls, is started again only with ``retry``.
MAX_FAILURES = 3
#: What is kept of finished runs: ``all``; ``model``, without checkpoints; ``records``, also without weights.
KEEP = ("all", "model", "records")

_POLL_SECONDS = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_campaign(
    campaign: Campaign,
    directory: str | Path,
    *,
    jobs: int = 1,
    devices: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    retry: Collection[str] = (),
    keep: str = "model",
    stream: TextIO | None = None,
    progress: Callable[..., Progress] = Progress,
) -> int:
    """Run what is missing of a campaign, and write a record of each run.

    Args:
        campaign: the campaign.
        directory: its folder.
        jobs: number of runs at a time.
        devices: GPUs to distribute, named as in CUDA_VISIBLE_DEVICES; None takes all visible ones.
        only: names of runs, with wildcards, or run ids; the runs that they start from are included. None runs all.
        retry: statuses, of `RETRIES`, whose runs to start again, even after `MAX_FAILURES` failed attempts.
        keep: what to keep of finished runs, of `KEEP`.
        stream: where to write progress; standard error by default.
        progress: makes the `Progress` from campaign, order, names and stream.

    Returns:
        An exit code: 0 if all runs are ok or were left out by the budget, 1 if some are not, 2 if nothing could be
        started, 3 if the disk is full, 130 after an interrupt.
    """
    directory = Path(directory).resolve()
    try:
        if jobs < 1:
            raise RunnerError(f"jobs={jobs}: at least one run at a time.")
        if keep not in KEEP:
            raise RunnerError(f"keep={keep!r} is unknown; choose one of {', '.join(KEEP)}.")
        if unknown := sorted(set(retry) - set(RETRIES)):
            raise RunnerError(f"retry={unknown[0]!r} is unknown; choose one of {', '.join(RETRIES)}.")
        check_campaign(campaign, directory)
        check_halving(campaign)
        directory.mkdir(parents=True, exist_ok=True)
        with campaign_lock(directory):
            if campaign.source:
                (directory / "campaign.yaml").write_text(campaign.source, encoding="utf-8")
            names, order = run_names(campaign), campaign.order
            chosen = order if only is None else _chosen(campaign, order, names, only)
            threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // jobs))
            place = Workplace(campaign, directory, names, read_records(directory, order), threads)
            pool = _device_pool([campaign.runs[run_id] for run_id in chosen], devices)
            return _Runner(place, chosen, progress(campaign, order, names, stream), jobs, pool, retry, keep).run()
    except (RunnerError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=stream or sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"error: {_full(directory, str(error))}", file=stream or sys.stderr)
        return 3


def _full(directory: Path, what: str) -> str:
    return (
        f"{what}. Every other run would fail in the same way, so the campaign stops here. Make room on the disk of "
        f"{directory} and give the same command again: finished runs are kept."
    )


class _Runner:
    def __init__(
        self, place: Workplace, order: list[str], progress: Progress, jobs: int, devices: Sequence[str],
        retry: Collection[str], keep: str,
    ) -> None:  # fmt: skip
        self.place, self.order, self.progress = place, order, progress
        self.campaign, self.directory, self.records = place.campaign, place.directory, place.records
        self.jobs, self.devices, self.keep = jobs, devices, keep
        self.budget = Pruning(self.place, self.progress.say)
        self.active: dict[str, Attempt] = {}
        self.tokenizers: dict[Path, Child] = {}
        self.broken: set[Path] = set()
        self.tried: set[str] = set()
        self.again = {i for i, r in self.records.items() if r.status in retry}
        self.needed = {needed for run in place.campaign.runs.values() for needed in run.needs}
        self.signals = 0
        self.stopping = False
        self.fatal: str | None = None

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        try:
            with self._listen():
                for run_id, record in list(self.records.items()):
                    if record.status == "running":
                        self.records[run_id] = recover(record, self.directory)
                    self._clean(run_id)
                while True:
                    self._collect()
                    self._write_down(self.budget.decide(self.active, self._may_come))
                    if self.signals or self.fatal:
                        self._stop()
                    else:
                        self._start()
                    if not self.active and not self.tokenizers:
                        break
                    now = time.perf_counter()
                    self.progress.tick({i: now - a.child.started for i, a in self.active.items()}, self._left)
                    time.sleep(_POLL_SECONDS)
        finally:
            # there is something left to kill only after an error in the runner itself
            left: list[Attempt | Child] = [*self.active.values(), *self.tokenizers.values()]
            for process in left:
                process.kill()
        return self._sum_up()

    @contextmanager
    def _listen(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self.signals += 1

        numbers = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
        before = [signal.signal(number, handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _stop(self) -> None:
        at_once = self.signals > 1
        for attempt in self.active.values():
            if at_once:
                attempt.kill()
            elif not attempt.asked:
                attempt.interrupt()
        saving = sum(attempt.saving for attempt in self.active.values())
        if saving and not at_once and not self.stopping:
            how_many = f"{saving} runs save checkpoints" if saving > 1 else "saving a checkpoint"
            self.progress.say(f"Interrupted: {how_many}. Press Ctrl-C again to stop at once.")
        self.stopping = True
        for child in self.tokenizers.values():
            child.kill()

    def _collect(self) -> None:
        for run_id, attempt in list(self.active.items()):
            if (ended := attempt.poll()) is not None:
                del self.active[run_id]
                self._take(run_id, *ended)
        for folder, child in list(self.tokenizers.items()):
            if (result := child.poll()) is not None:
                del self.tokenizers[folder]
                if result.exit_code != 0 and not self.signals:
                    self.broken.add(folder)
                    last = result.tail[-1] if result.tail else f"exit code {result.exit_code}"
                    self.progress.say(f"The tokenizer could not be trained: {last} (all of it: {child.log})")

    def _take(self, run_id: str, record: Record, ending: Ending) -> None:
        self.records[run_id] = record
        self.again.discard(run_id)
        if ending.status not in ("ok", "paused"):
            self.tried.add(run_id)
        if ending.disk_full:
            self.fatal = ending.message
        self._clean(run_id)
        log = f" (log: {run_folder(self.directory, run_id) / LOG_NAME})" if ending.status in RETRIES else ""
        seconds = record.attempts[-1].get("seconds") or 0.0
        self.progress.ended(run_id, ending.status, seconds, ending.message + log, self._left())

    def _clean(self, run_id: str) -> None:
        status = self.records[run_id].status
        # a run that ran out of memory may be resumed from its checkpoint, with --retry
        if status in SETTLED and status != "oom" and run_id not in self.again:
            keep_model = self.keep != "records" or run_id in self.needed
            clean_folder(run_folder(self.directory, run_id), self.keep == "all", keep_model)

    def _left(self) -> float | None:
        waiting = [run_id for run_id in self.order if run_id in self.active or self._may_start(run_id)]
        estimate = self.progress.left(self.records, waiting, self.jobs)
        return 0.0 if not waiting else estimate if estimate is None else max(1.0, estimate)

    # ---- what may start --------------------------------------------------------------------------------------------

    def _may_start(self, run_id: str) -> bool:
        """Return whether a run may still be started in this call, now or later."""
        record = self.records.get(run_id)
        if run_id in self.tried or run_id in self.active or run_id not in self.order:
            return False
        if record is not None and run_id not in self.again:
            failures = sum(attempt.get("status") == "failed" for attempt in record.attempts)
            if record.status in SETTLED or failures >= MAX_FAILURES:
                return False
        if shared_tokenizer(self.campaign.runs[run_id], self.directory) in self.broken:
            return False
        needs = self.campaign.runs[run_id].needs
        return all(self._is_ok(other) or other in self.active or self._may_start(other) for other in needs)

    def _may_come(self, run_id: str) -> bool:
        """Return whether a run may still be started, in this call or in a later one.

        Halving waits for interrupted runs too: which ablations it stops must not depend on which runs were killed.
        """
        stopped = run_id in self.tried and self.records[run_id].status == "interrupted"
        return stopped or self._may_start(run_id)

    def _is_ok(self, run_id: str) -> bool:
        return run_id in self.records and self.records[run_id].status == "ok"

    def _start(self) -> None:
        for run_id in self.order:
            if len(self.active) + len(self.tokenizers) >= self.jobs:
                return
            run = self.campaign.runs[run_id]
            if not self._may_start(run_id) or not all(map(self._is_ok, run.needs)):
                continue
            rung = self.budget.next_rung(run_id)
            if self.budget.waits(run_id, rung, self.active, self._may_start):
                continue
            if (left_out := self.budget.left_out(run_id, self.active)) is not None:
                self._write_down({run_id: left_out})
                continue
            tokenizer = shared_tokenizer(run, self.directory)
            if tokenizer is not None and not tokenizer.exists():
                if tokenizer not in self.tokenizers:
                    self._train_tokenizer(run_id, tokenizer)
                continue
            if (devices := self._devices_for(run_id)) is not None:
                attempt = Attempt(self.place, run_id, devices, tokenizer, rung)
                self.active[run_id], self.records[run_id] = attempt, attempt.record

    def _write_down(self, decided: Mapping[str, Record]) -> None:
        for run_id, record in decided.items():
            folder = run_folder(self.directory, run_id)
            folder.mkdir(parents=True, exist_ok=True)
            write_record(record, folder)
            self.records[run_id] = record
            if record.status == "pruned":
                self._clean(run_id)
                self.progress.ended(run_id, "pruned", 0.0, record.message, None)

    def _devices_for(self, run_id: str) -> list[str] | None:
        """Return the devices for a run: an empty list on a CPU, None as long as too few are free."""
        run = self.campaign.runs[run_id]
        if not self.devices or run.arguments.get("use_cpu"):
            return []
        taken = {device for attempt in self.active.values() for device in attempt.devices}
        free = [device for device in self.devices if device not in taken]
        return free[: run.processes] if len(free) >= run.processes else None

    def _train_tokenizer(self, run_id: str, folder: Path) -> None:
        run = self.campaign.runs[run_id]
        folder.parent.mkdir(parents=True, exist_ok=True)
        settings = folder.with_suffix(".json")
        write_json(tokenizer_settings(run, self.directory), settings)
        command = [sys.executable, "-m", TOKENIZER_MODULE, run.task, str(settings), str(folder)]
        kill_run(settings)  # a process that a killed runner left would write into the same folder
        environment = launch_environment(self.campaign, run, "tokenizer", self.directory, threads=self.place.threads)
        self.tokenizers[folder] = Child(command, folder.with_suffix(".log"), environment)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _sum_up(self) -> int:
        counts = Counter(self.records[i].status if i in self.records else "missing" for i in self.order)
        self.progress.say(", ".join(f"{count} {status}" for status, count in sorted(counts.items())) + ".")
        if self.fatal is not None:
            self.progress.say(f"error: {_full(self.directory, self.fatal)}")
            return 3
        if self.signals:
            left = "the same command goes on from there" if set(counts) - {"ok", "pruned"} else "all runs are done"
            self.progress.say(f"Interrupted. What is done is kept; {left}.")
            return 130
        return 0 if set(counts) <= {"ok", "pruned"} else 1


def _device_pool(runs: Sequence[Run], devices: Sequence[str] | None) -> Sequence[str]:
    wanted = [run.processes for run in runs if not run.arguments.get("use_cpu")]
    pool = (visible_devices() if devices is None else devices) if wanted else ()
    if pool and max(wanted) > len(pool):
        raise RunnerError(f"A run wants {max(wanted)} devices, but there are {len(pool)}: {', '.join(pool)}.")
    return pool


def _chosen(campaign: Campaign, order: list[str], names: dict[str, str], only: Sequence[str]) -> list[str]:
    wanted: set[str] = set()
    for pattern in only:
        found = {i for i in order if i == pattern or fnmatch.fnmatchcase(names[i], pattern)}
        if not found:
            known = ", ".join(names.values())
            raise RunnerError(f"only={pattern!r} is no run of this campaign; its runs are {known}.")
        wanted |= found
    while more := {needed for i in wanted for needed in campaign.runs[i].needs} - wanted:
        wanted |= more
    return [run_id for run_id in order if run_id in wanted]
