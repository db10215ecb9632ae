"""Token-level, top-label calibration from sufficient statistics: fixed memory, exact counts, no stored logits.

`grid` says where confidence is cut, `accumulator` counts tokens there, `metrics` turns the counts into figures,
`intervals` says how sure they are, `curve` is the data of a reliability diagram.
"""

from .accumulator import TokenCalibration, calibration_curve
from .classwise import ClassCalibration
from .curve import CalibrationCurve
from .grid import GRID_BINS
from .intervals import Interval
from .metrics import METRICS, SCORES, lower_is_better

__all__ = [
    "GRID_BINS",
    "METRICS",
    "SCORES",
    "CalibrationCurve",
    "ClassCalibration",
    "Interval",
    "TokenCalibration",
    "calibration_curve",
    "lower_is_better",
]
