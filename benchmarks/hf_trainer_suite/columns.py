"""The columns of the table: the trainers that the tests are run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A trainer that all tests are run with.

    Args:
        title: heading of the column.
        ours: whether `DPSMTrainer` replaces `Trainer`.
        settings: DPSM fields for tests that pass plain TrainingArguments.
        callbacks: whether `DPSMTrainer` keeps its two callbacks and its training clock.
    """

    title: str
    ours: bool = True
    settings: Mapping[str, Any] | None = None
    callbacks: bool = True


CROSS_ENTROPY: Mapping[str, Any] = {"scoring_rule": "ce", "fused_head": "off"}

#: The columns by their name on the command line and in the CSV.
COLUMNS: Mapping[str, Column] = {
    "stock": Column("Trainer", ours=False),
    "ce": Column("DPSMTrainer, ce", settings=CROSS_ENTROPY),
    "ce_bare": Column("ce, without our callbacks and clock", settings=CROSS_ENTROPY, callbacks=False),
    "dpsm": Column("DPSMTrainer, dpsm", settings={}),
}
