"""Token-level, top-label calibration from counts on a grid of confidence: fixed memory, exact, no stored logits.

`grid` defines the cells of confidence, `accumulator` counts tokens in them, `metrics` computes figures from counts,
`intervals` bootstraps their confidence intervals, `classwise` is calibration of single tokens of the vocabulary, and
`curve` holds the data of a reliability diagram.
"""

from .accumulator import TokenCalibration, calibration_curve
from .classwise import ClassCalibration
from .curve import CalibrationCurve
from .grid import GRID_BINS
from .intervals import Interval
from .metrics import METRICS, SCORES, lower_is_better

__all__ = [
    "GRID_BINS", "METRICS", "SCORES", "CalibrationCurve", "ClassCalibration", "Interval", "TokenCalibration",
    "calibration_curve", "lower_is_better",
]  # fmt: skip
