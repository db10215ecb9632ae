"""The budget at work: which runs wait, which are left out, which ablations are stopped at a rung, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...tasks.steps import stop_step
from ..spec.design import Campaign
from . import budget, halving
from .collecting import newest_state
from .launching import run_folder
from .progress import duration
from .records import SETTLED, Record


class Pruning:
    """Decide by the records what the budget has to say; nothing is written here.

    Args:
        campaign: the campaign.
        directory: of the campaign.
        names: of the runs, by id.
        records: so far, by run id; shared with who writes them.
        say: tells people something.
    """

    def __init__(
        self,
        campaign: Campaign,
        directory: Path,
        names: Mapping[str, str],
        records: MutableMapping[str, Record],
        say: Callable[[str], None],
    ) -> None:
        self._campaign, self._directory, self._names, self._records, self._say = (
            campaign,
            directory,
            names,
            records,
            say,
        )
        self._cohorts = halving.cohorts(campaign)
        self._members = {run_id for cohort in self._cohorts for run_id in cohort.members}
        self._warned = False

    # ---- before a start --------------------------------------------------------------------------------------------

    def next_rung(self, run_id: str) -> int | None:
        """Return the number of the rung that a run has to stop at next, None where it may go to the end.

        Args:
            run_id: of the run.
        """
        rung = halving.rung_done(self._records.get(run_id))
        return rung if run_id in self._members and rung < len(self._campaign.budget.halving_rungs) else None

    def waits(self, run_id: str, rung: int | None, active: Collection[str], may_start: Callable[[str], bool]) -> bool:
        """Return whether a run has to wait: at a rung for the others, or until the reference is measured.

        Args:
            run_id: of the run.
            rung: of `next_rung`.
            active: ids of the runs under way.
            may_start: whether a run is still to come.
        """
        if rung is not None and self._reached(run_id, rung, active) is not None:
            return True
        if not budget.prunable(self._campaign, run_id):
            return False
        if run_id in budget.reference_seconds(self._campaign, self._records):
            return False
        awaited = budget.awaited_references(self._campaign, run_id)
        return any(other in active or may_start(other) for other in awaited)

    def left_out(self, run_id: str, active: Collection[str]) -> Record | None:
        """Return the record of a run that does not fit into the time, None where it does or has to be made anyway.

        Args:
            run_id: of the run.
            active: ids of the runs under way.
        """
        account = budget.ledger(self._campaign, self._records, run_id, active)
        if account is None or account.fits:
            return None
        if budget.prunable(self._campaign, run_id):
            decided = budget.limit_decision(self._campaign, account)
            return self._pruned(run_id, decided, budget.explain_limit(decided))
        if not self._warned:
            self._warned = True
            more = duration(account.reserved + account.needed)
            self._say(
                f"The budget of {duration(account.allowed)} of training will be exceeded: {duration(account.spent)} "
                f"are spent, and main variations, which are never left out, need {more} more."
            )
        return None

    def _pruned(self, run_id: str, decided: dict[str, Any], message: str) -> Record:
        run = self._campaign.runs[run_id]
        record = self._records.get(run_id) or Record(run_id, self._names[run_id], run.task, dict(run.arguments))
        return replace(record, status="pruned", message=message, decision=decided)

    # ---- at a rung -------------------------------------------------------------------------------------------------

    def decide(self, active: Collection[str], may_start: Callable[[str], bool]) -> dict[str, Record]:
        """Return the new records of the runs that can be compared now: those that go on, and those that are stopped.

        Args:
            active: ids of the runs under way.
            may_start: whether a run is still to come.
        """
        decided: dict[str, Record] = {}
        for cohort in self._cohorts:
            for rung in range(len(self._campaign.budget.halving_rungs)):
                decided |= self._decide(cohort, rung, active, may_start)
        return decided

    def _decide(
        self, cohort: halving.Cohort, rung: int, active: Collection[str], may_start: Callable[[str], bool]
    ) -> dict[str, Record]:
        reached = {run_id: self._reached(run_id, rung, active) for run_id in cohort.members}
        steps = {run_id: step for run_id, step in reached.items() if step is not None}
        undecided = [
            run_id
            for run_id in steps
            if self._records[run_id].status not in SETTLED and halving.rung_done(self._records[run_id]) == rung
        ]
        behind = [run_id for run_id, step in reached.items() if step is None]
        if not undecided or any(run_id in active or may_start(run_id) for run_id in behind):
            return {}  # one may still get there
        step = max(steps[run_id] for run_id in undecided)
        metric = str(self._campaign.budget.halving_metric)
        figures = {
            run_id: halving.figure_at(self._records[run_id], metric, step)
            for run_id in steps
            # who has come there without stopping may not have been evaluated there
            if run_id in undecided or halving.has_figure(self._records[run_id], metric, step)
        }
        decided = halving.decision(self._campaign.budget, cohort, rung, step, figures, self._names)
        found = {}
        for run_id in undecided:
            name = self._names[run_id]
            if name in decided["kept"]:
                found[run_id] = replace(self._records[run_id], decision=decided)
            else:
                found[run_id] = self._pruned(run_id, decided, halving.explain(decided, name))
        return found

    def _reached(self, run_id: str, rung: int, active: Collection[str]) -> int | None:
        """Return the step of a rung where a run has come that far, whether it has stopped there or not."""
        record = self._records.get(run_id)
        if record is None or run_id in active:
            return None
        stopped = halving.reached_rung(record, rung)
        if stopped is not None or record.status == "pruned":
            return stopped
        state = newest_state(run_folder(self._directory, run_id))
        if not state.get("max_steps"):
            return None
        step = stop_step(self._campaign.budget.halving_rungs[rung], state["max_steps"], state.get("eval_steps"))
        return step if state["global_step"] >= step else None
