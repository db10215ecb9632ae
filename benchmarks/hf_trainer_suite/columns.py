"""The columns of the table: which trainer the tests are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A trainer that all tests are run with.

    Args:
        title: in the table.
        ours: whether `DPSMTrainer` takes the place of `Trainer`.
        settings: DPSM fields where a test passes plain TrainingArguments.
        callbacks: whether the two callbacks of `DPSMTrainer` stay, and its clock of training runs.
    """

    title: str
    ours: bool = True
    settings: Mapping[str, Any] | None = None
    callbacks: bool = True


CROSS_ENTROPY: Mapping[str, Any] = {"scoring_rule": "ce", "fused_head": "off"}

#: By the name that the command line and the CSV have for them.
COLUMNS: Mapping[str, Column] = {
    "stock": Column("Trainer", ours=False),
    "ce": Column("DPSMTrainer, ce", settings=CROSS_ENTROPY),
    "ce_bare": Column("ce, without our callbacks and clock", settings=CROSS_ENTROPY, callbacks=False),
    "dpsm": Column("DPSMTrainer, dpsm", settings={}),
}
