"""The table of all scoring rules, found in `dpsm_hf.rules.formulas`: to add a rule, add one file there.

``python -m dpsm_hf.rules.registry docs/losses.md`` rewrites the table of the rules in the documentation.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from . import formulas
from .rows import Parameter, Rule


def _find() -> dict[str, Rule]:
    names = [module.name for module in pkgutil.iter_modules(formulas.__path__)]
    rules: list[Rule] = [importlib.import_module(f"{formulas.__name__}.{name}").RULE for name in names]
    return {rule.name: rule for rule in sorted(rules, key=lambda rule: (rule.order, rule.name))}


RULES = _find()
SCORING_RULES = tuple(RULES)
PARAMETERS: dict[str, Parameter] = {p.name: p for rule in RULES.values() for p in rule.parameters}

_Class = TypeVar("_Class", bound=type)


def rule_parameter(name: str) -> Any:
    """Return the dataclass field for a rule's parameter, with its default and its help text."""
    parameter = PARAMETERS[name]
    return field(default=parameter.default, metadata={"help": f"dpsm_hf: {parameter.help}"})


def with_rule_parameters(cls: _Class) -> _Class:
    """Add to a class a field for every rule parameter it does not declare; a decorator, used below ``@dataclass``."""
    for name in PARAMETERS:
        if name not in cls.__annotations__:
            cls.__annotations__[name] = float
            setattr(cls, name, rule_parameter(name))
    return cls


def further_parameters(scoring_rule: str, given: Mapping[str, float] | None) -> dict[str, float]:
    """Check ``rule_parameters`` and return them: the parameters for which functions have no argument of their own.

    Raises:
        ValueError: naming a parameter that the rule does not have, or that has an argument (``focal_gamma``).
    """
    known = (
        [p.name for p in RULES[scoring_rule].parameters if p.name != "focal_gamma"] if scoring_rule in RULES else []
    )
    for name in given or {}:
        if name not in known:
            raise ValueError(
                f"rule_parameters: scoring_rule={scoring_rule!r} has no {name!r} to be given here; it has "
                f"{', '.join(known) or 'none'}."
            )
    return dict(given or {})


def documented(text: str) -> str:
    """Return the text of a documentation page with its table of the rules made anew."""
    lines = ["| `scoring_rule` | value of a token | strictly proper | range | source |", "|---|---|---|---|---|"]
    lines += [f"| `{r.name}` | {r.formula} | {r.proper} | {r.bounds} | {r.source} |" for r in RULES.values()]
    return re.sub(r"\| `scoring_rule` \|(.*\n)+?(?=\n)", lambda _: "\n".join(lines) + "\n", text, count=1)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(documented(page.read_text(encoding="utf-8")), encoding="utf-8")
