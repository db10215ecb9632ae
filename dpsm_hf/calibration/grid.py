"""The grid of confidence: 3,000 fine cells, of which the bins of all common binnings are exact unions."""

from __future__ import annotations

import numpy as np

# Divisible by 10, 15, 20, 25, 30, 50, 100, ...: these numbers of equal bins are exact unions of cells.
GRID_BINS = 3000

# A trained model gives many tokens a confidence above 2999/3000. Therefore the first and the last cell are divided
# further, in steps of a sixteenth of a decade over four decades, so that equal-mass bins and AUROC can separate them.
_FINE_CELLS = 64
_FINE_DECADES = 4


def _edges() -> np.ndarray:
    uniform = np.arange(GRID_BINS + 1) / GRID_BINS
    fine = 10.0 ** (-np.arange(1, _FINE_CELLS + 1) * (_FINE_DECADES / _FINE_CELLS)) / GRID_BINS
    return np.concatenate([[0.0], fine[::-1], uniform[1:-1], 1.0 - fine, [1.0]])


#: Edges of the cells, ``[CELLS + 1]`` float64 from 0 to 1; cells are closed on the right, the first also at 0.
EDGES = _edges()
CELLS = len(EDGES) - 1

#: The index of the equal bin, of `GRID_BINS`, that each cell lies in, ``[CELLS]``.
UNIFORM_BIN = np.minimum(np.searchsorted(np.arange(1, GRID_BINS) / GRID_BINS, EDGES[1:], side="left"), GRID_BINS - 1)


def check_bins(bins: int) -> None:
    """Raise ValueError unless the grid can be divided into that many equal bins."""
    whole = isinstance(bins, (int, np.integer)) and not isinstance(bins, bool)
    if not whole or bins < 1 or GRID_BINS % bins:
        raise ValueError(f"bins={bins} does not divide the grid of {GRID_BINS}; use 10, 15, 20, 50 or 100, say.")


def first_cells(bins: int) -> np.ndarray:
    """Return the index of the first cell of each of ``bins`` equal bins, ``[bins]``."""
    check_bins(bins)
    return np.searchsorted(UNIFORM_BIN // (GRID_BINS // bins), np.arange(bins))
