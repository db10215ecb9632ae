"""dpsm_hf: Dynamic Proper-Score Mixing for the Hugging Face Trainer.

Swap ``Trainer`` for ``DPSMTrainer`` and a language model trains with ``(1 - alpha) * CE + alpha * Brier``, alpha
rising from 0 to 1 on a schedule. The names below are the public interface.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .runtime import former_names
from .version import __version__

if TYPE_CHECKING:
    from .calibration import CalibrationCurve, ClassCalibration, TokenCalibration, calibration_curve
    from .evaluation.temperature import TemperatureScaler
    from .head.scoring_loss import linear_scoring_loss
    from .plots.reliability import ReliabilityDisplay
    from .rules.losses import DPSMLoss, TokenScores, score_tokens
    from .rules.schedules import (
        AlphaSchedule,
        KnobSchedule,
        available_alpha_schedules,
        get_alpha_schedule,
        register_alpha_schedule,
    )
    from .rules.scoring_rules import Objective
    from .training.arguments import DPSMArguments, DPSMConfig, DPSMSeq2SeqConfig
    from .training.callbacks import AlphaScheduleCallback, CalibrationCallback
    from .training.trainer import DPSMMixin, DPSMSeq2SeqTrainer, DPSMTrainer

former_names.install()

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
    "KnobSchedule",
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

# Loaded at the first use of a name: commands that only start or read runs then need no torch, which takes seconds.
_MODULES = {
    "training.arguments": ("DPSMArguments", "DPSMConfig", "DPSMSeq2SeqConfig"),
    "calibration": ("CalibrationCurve", "ClassCalibration", "TokenCalibration", "calibration_curve"),
    "training.callbacks": ("AlphaScheduleCallback", "CalibrationCallback"),
    "head.scoring_loss": ("linear_scoring_loss",),
    "rules.losses": ("DPSMLoss", "TokenScores", "score_tokens"),
    "plots.reliability": ("ReliabilityDisplay",),
    "rules.schedules": (
        *("AlphaSchedule", "KnobSchedule", "available_alpha_schedules", "get_alpha_schedule"),
        "register_alpha_schedule",
    ),
    "rules.scoring_rules": ("Objective",),
    "evaluation.temperature": ("TemperatureScaler",),
    "training.trainer": ("DPSMMixin", "DPSMSeq2SeqTrainer", "DPSMTrainer"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
