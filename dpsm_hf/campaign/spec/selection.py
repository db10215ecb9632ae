"""A part of a campaign: the points that ``--only`` asks for, and the runs that they need."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

from .design import Campaign, Point
from .yaml_lines import Place, Problems, suggestion

KEYS = ("study", "variation", "role", "size", "data", "seed")

_PLACE = Place("--only")


def select(campaign: Campaign, only: Sequence[str]) -> Campaign:
    """Return a campaign with the points that match every one of the given patterns.

    Args:
        campaign: the whole campaign.
        only: each ``KEY=PATTERN``, several with commas between for "or": ``study=main``, ``variation=dpsm-*,focal``,
            ``seed=1``, ``role=main``. A pattern may hold ``*`` and ``?``.

    Raises:
        SpecError: an unknown key, or patterns that no point matches.
    """
    if not only:
        return campaign
    problems = Problems()
    groups = [_alternatives(text, problems) for text in only]
    problems.check()
    points = campaign.points
    for text, group in zip(only, groups, strict=True):
        kept = tuple(point for point in points if any(_matches(campaign, point, *pair) for pair in group))
        if not kept:
            key = group[0][0]
            there = sorted({_value(campaign, point, key) for point in points})
            problems.add(_PLACE, text, f"nothing in the plan matches it; {key} is one of {', '.join(there)}")
            problems.check()
        points = kept
    chosen = dataclasses.replace(campaign, points=points)
    order = chosen.order
    return dataclasses.replace(
        chosen,
        runs={run_id: campaign.runs[run_id] for run_id in order},
        preparations={run_id: title for run_id, title in campaign.preparations.items() if run_id in order},
    )


def _alternatives(text: str, problems: Problems) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part in text.split(","):
        key, equals, pattern = part.partition("=")
        if not equals:
            if not found:
                problems.add(_PLACE, text, f"write KEY=PATTERN, with a key of {', '.join(KEYS)}")
                return []
            key, pattern = found[-1][0], part
        key, pattern = key.strip(), pattern.strip()
        if key not in KEYS:
            problems.add(_PLACE, text, f"{key!r} is not a key; {suggestion(key, KEYS)}")
        elif not pattern:
            problems.add(_PLACE, text, f"there is nothing behind {key}=; give a name or a pattern")
        else:
            found.append((key, pattern))
    return found


def _value(campaign: Campaign, point: Point, key: str) -> str:
    if key == "role":
        return campaign.variation(point.variation).role
    return str(getattr(point, key))


def _matches(campaign: Campaign, point: Point, key: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(_value(campaign, point, key), pattern)
