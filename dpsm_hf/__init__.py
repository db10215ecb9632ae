"""dpsm_hf: Dynamic Proper-Score Mixing for the Hugging Face Trainer.

Swap ``Trainer`` for ``DPSMTrainer`` and a language model trains with ``(1 - alpha) * CE + alpha * Brier``, alpha
rising from 0 to 1 on a schedule. The names below are the public interface.
"""

from .arguments import DPSMArguments, DPSMConfig, DPSMSeq2SeqConfig
from .calibration import CalibrationCurve, ClassCalibration, TokenCalibration, calibration_curve
from .callbacks import AlphaScheduleCallback, CalibrationCallback
from .head import linear_scoring_loss
from .losses import DPSMLoss, TokenScores, score_tokens
from .plots import ReliabilityDisplay
from .schedules import AlphaSchedule, available_alpha_schedules, get_alpha_schedule, register_alpha_schedule
from .scoring_rules import Objective
from .temperature import TemperatureScaler
from .trainer import DPSMMixin, DPSMSeq2SeqTrainer, DPSMTrainer
from .version import __version__

__all__ = [
    "AlphaSchedule",
    "AlphaScheduleCallback",
    "CalibrationCallback",
    "CalibrationCurve",
    "ClassCalibration",
    "DPSMArguments",
    "DPSMConfig",
    "DPSMLoss",
    "DPSMMixin",
    "DPSMSeq2SeqConfig",
    "DPSMSeq2SeqTrainer",
    "DPSMTrainer",
    "Objective",
    "ReliabilityDisplay",
    "TemperatureScaler",
    "TokenCalibration",
    "TokenScores",
    "__version__",
    "available_alpha_schedules",
    "calibration_curve",
    "get_alpha_schedule",
    "register_alpha_schedule",
    "linear_scoring_loss",
    "score_tokens",
]
