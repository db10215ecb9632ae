"""The share of settings and seeds in which a difference has the expected sign."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from ..calibration.intervals import Interval


@dataclass(frozen=True)
class SignAgreement:
    """In how many cells (a setting with a seed) a difference has the expected sign.

    Attributes:
        expected: 1 or -1.
        same, opposite, zero, missing: numbers of cells; a difference of 0 does not count as agreement.
        share: ``same / (same + opposite + zero)``; NaN if all cells are missing.
        bounds: the share if no missing cell had the expected sign, and if all had it. Pass it to `decide` for a claim
            about these settings and seeds.
        interval: exact binomial interval of the share, for a claim about all settings and seeds. It assumes
            independent cells; those of one seed or one setting are correlated, so it is somewhat too narrow.
        by_setting: the share in each setting; NaN if all its cells are missing.
    """

    expected: int
    same: int
    opposite: int
    zero: int
    missing: int
    share: float
    bounds: Interval
    interval: Interval
    level: float
    by_setting: Mapping[Hashable, float]


def sign_agreement(
    differences: Mapping[Hashable, Mapping[Hashable, float | None]], expected: int, *, level: float = 0.95
) -> SignAgreement:
    """Count in how many settings and seeds a difference has the expected sign.

    Args:
        differences: by setting, then by seed (system minus baseline); None or NaN is a missing run, infinity counts
            by its sign.
        expected: 1 or -1, the sign that is claimed; to be fixed before looking at the data.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: without cells, or for `expected` or level out of range.

    Source: the sign test, Arbuthnott (1710); interval of Clopper & Pearson (Biometrika 1934).
    """
    from scipy import stats

    if expected not in (1, -1):
        raise ValueError(f"expected={expected!r} must be 1 or -1, the sign of the claim.")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, 0.95 say.")
    signs = {setting: [_sign(d) for d in cells.values()] for setting, cells in differences.items()}
    every = [sign for cells in signs.values() for sign in cells]
    if not every:
        raise ValueError("There is no setting with a seed: nothing to count signs of.")
    same, opposite, zero, missing = (every.count(sign) for sign in (expected, -expected, 0, None))
    there = len(every) - missing
    interval = Interval(math.nan, math.nan)
    if there:
        found = stats.binomtest(same, there).proportion_ci(level, method="exact")
        interval = Interval(float(found.low), float(found.high))
    return SignAgreement(
        expected=expected, same=same, opposite=opposite, zero=zero, missing=missing, share=_share(every, expected),
        bounds=Interval(same / len(every), (same + missing) / len(every)), interval=interval, level=level,
        by_setting={setting: _share(cells, expected) for setting, cells in signs.items()},
    )  # fmt: skip


def _sign(difference: float | None) -> int | None:
    if difference is None or math.isnan(difference):
        return None
    return (difference > 0) - (difference < 0)


def _share(signs: list[int | None], expected: int) -> float:
    there = len(signs) - signs.count(None)
    return signs.count(expected) / there if there else math.nan
