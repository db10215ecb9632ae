"""The claims of a campaign as a matrix: a row for each claim, a column for each variation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..spec.design import Campaign
from ..verdict.claims import Finding
from .words import HOLDS, Shown, figure_of, over_settings, short


@dataclass(frozen=True)
class Mark:
    """What is said of a claim about a variation: sign and word, the chief figure, and the finding that it is of."""

    shown: Shown
    figure: str
    finding: int  # its place among the findings

    @property
    def target(self) -> str:
        """Return the name of the finding's place in the page."""
        return f"finding-{self.finding}"


@dataclass(frozen=True)
class Row:
    """A claim, and the mark of each column; None where the claim is not made of that variation."""

    claim: str
    words: str
    family: str
    marks: tuple[Mark | None, ...]


@dataclass(frozen=True)
class Matrix:
    """Claims by variations of a role; ``held`` counts the claims of each variation that hold, and all of them."""

    titles: tuple[str, ...]
    rows: tuple[Row, ...]
    held: tuple[tuple[int, int], ...]


def claim_matrix(campaign: Campaign, findings: Sequence[Finding], role: str) -> Matrix | None:
    """Return the matrix of the variations of a role, the method's own first; None where none has been judged.

    Over several settings a mark is the worst that was found, and leads to it.
    """
    place = {id(finding): number for number, finding in enumerate(findings)}
    judged = {f.variation for f in findings}
    names = [v.name for v in campaign.variations if v.role == role and v.name in judged]
    names.sort(key=lambda name: not name.startswith("dpsm"))
    said = {name: over_settings(findings, name) for name in names}
    if not names:
        return None
    claims = {f.key: f for f in reversed(findings) if f.variation in said}  # the first of each key
    rows = []
    for key in dict.fromkeys(f.key for f in findings if f.key in claims):
        marks = []
        for name in names:
            found = said[name].get(key)
            marks.append(None if found is None else Mark(found[0], figure_of(found[1]), place[id(found[1])]))
        rows.append(Row(short(key), claims[key].words, claims[key].family, tuple(marks)))
    families = list(dict.fromkeys(row.family for row in rows))
    rows.sort(key=lambda row: families.index(row.family))
    held = [(sum(shown is HOLDS for shown, _ in said[name].values()), len(said[name])) for name in names]
    titles = {v.name: v.title for v in campaign.variations}
    return Matrix(tuple(titles[name] for name in names), tuple(rows), tuple(held))
