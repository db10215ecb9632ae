"""The numbers of an objective that a schedule can move, each with its range and the rules that it has an effect on.

The table follows from the fields of `Objective`: a new one, or a new parameter of a rule, is in it by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .registry import PARAMETERS, RULES, SCORING_RULES
from .scoring_rules import Objective

# not numbers that enter the loss
_NO_KNOBS = ("scoring_rule", "scheduled")
# TrainingArguments had a name for it before
_ARGUMENT_NAMES = {"label_smoothing": "label_smoothing_factor"}
# what only some rules read; of a rule's own parameters its entry says so
_READ_BY = {"alpha": ("dpsm",)}
# one of them is allowed for every number that there is, and is not its default
_TRIALS = (0.01, 0.5, 1.5, 2.5)


@dataclass(frozen=True)
class Knob:
    """A number of the objective.

    Args:
        name: as arguments and the training log have it.
        field: its name in `Objective`.
        default: its value where nothing is said.
        rules: the scoring rules that it has an effect on.
    """

    name: str
    field: str
    default: float
    rules: tuple[str, ...]

    def problem(self, value: float) -> str:
        """Return what is wrong with a value, to be put behind it (``lies outside [0, 1)``); "" if nothing is."""
        try:
            Objective(self.rules[0], **{self.field: value})  # type: ignore[arg-type]
        except ValueError as error:
            return str(error).removeprefix(f"{self.field}={value} ").rstrip(".")
        return ""


def _rules_of(name: str, default: float) -> tuple[str, ...]:
    if name in _READ_BY:
        return _READ_BY[name]
    owners = tuple(rule.name for rule in RULES.values() if name in (parameter.name for parameter in rule.parameters))
    return owners or tuple(rule for rule in SCORING_RULES if _takes(rule, name, default))


def _takes(rule: str, name: str, default: float) -> bool:
    """Return whether a rule takes any other value of a number than its default."""
    for value in _TRIALS:
        options: dict[str, Any] = {name: value}
        try:
            Objective(rule, **options)
        except ValueError:
            continue
        if value != default:
            return True
    return False


def _find() -> dict[str, Knob]:
    found = {}
    for field in dataclasses.fields(Objective):
        if field.name not in _NO_KNOBS:
            name, default = _ARGUMENT_NAMES.get(field.name, field.name), float(field.default)  # type: ignore[arg-type]
            found[name] = Knob(name, field.name, default, _rules_of(field.name, default))
    return found


#: Every number of the objective by the name that arguments and the log have for it.
KNOBS: Mapping[str, Knob] = _find()


def knobs_of(scoring_rule: str) -> list[str]:
    """Return the names of the numbers that have an effect on a rule."""
    return [knob.name for knob in KNOBS.values() if scoring_rule in knob.rules]


def objective_with(objective: Objective, values: Mapping[str, float]) -> Objective:
    """Return an objective with the values that schedules give some of its numbers at a step.

    Args:
        objective: with the numbers that stay.
        values: by the names of `KNOBS`.

    Raises:
        ValueError: for a value out of its range, or values that contradict each other.
    """
    fields: dict[str, Any] = {KNOBS[name].field: value for name, value in values.items()}
    return dataclasses.replace(objective, **fields, scheduled=frozenset(fields))


assert all(name in KNOBS for name in PARAMETERS), "a parameter of a rule is no field of Objective"
