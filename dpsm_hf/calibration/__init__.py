"""Top-label calibration of tokens from exact counts on a grid of confidence, in fixed memory, without stored logits.

`accumulator` counts tokens in the cells that `grid` defines (here ECE is counted), `metrics` computes ECE and the
others from the counts, `intervals` bootstraps their confidence intervals, `classwise` measures single tokens of the
vocabulary, `frequency` buckets of them, `curve` holds the data of a reliability diagram, and `blocks` is the base of
the accumulators.
"""

from .accumulator import TokenCalibration, calibration_curve
from .classwise import ClassCalibration
from .curve import CalibrationCurve
from .frequency import FrequencyCalibration
from .grid import GRID_BINS
from .intervals import Interval
from .metrics import METRICS, SCORES, bare_name, lower_is_better

__all__ = [
    "GRID_BINS", "METRICS", "SCORES", "CalibrationCurve", "ClassCalibration", "FrequencyCalibration",
    "Interval", "TokenCalibration", "bare_name", "calibration_curve", "lower_is_better",
]  # fmt: skip
