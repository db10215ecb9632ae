"""Free-running calibration: how far the probabilities that a model gives to its own output can be believed.

`batch` makes of generated tokens what can be scored, `accumulator` counts them against the references, `forecasts`
judges whole texts, `scoring` does all that in an evaluation.
"""

from .accumulator import GENERATED_METRICS, GeneratedCalibration
from .batch import generated_batch

__all__ = ["GENERATED_METRICS", "GeneratedCalibration", "generated_batch"]
