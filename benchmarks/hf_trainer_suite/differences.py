"""The tests that are expected to fail with `DPSMTrainer`, and why."""

from __future__ import annotations

from collections.abc import Mapping

_COUNTS = "counts callbacks: `DPSMTrainer` adds AlphaScheduleCallback and CalibrationCallback"
_TIMES = (
    "compares timings: `DPSMTrainer` keeps the seconds of training (`train_seconds`) in trainer_state.json, and two "
    "runs never take equally long"
)
_ROUTER = (
    "expects the whole router loss for a batch that is a part of the step; here it is weighted by the part's share of "
    "the step's tokens, so that a split into micro-batches changes nothing"
)
_OWN_LOSS = "passes `compute_loss_func`, which `scoring_rule='dpsm'` refuses since it could have no effect beside it"

#: Reasons by the name of the test, for `scoring_rule="ce"`.
CROSS_ENTROPY: Mapping[str, str] = {
    "test_default_callbacks_are_present": _COUNTS,
    "test_custom_callback_added_at_init": _COUNTS,
    "test_printer_callback_when_tqdm_disabled": _COUNTS,
    "test_can_resume_training": _TIMES,
    "test_resume_training_with_checkpoint": _TIMES,
    "test_resume_training_with_shard_checkpoint": _TIMES,
    "test_resume_training_with_gradient_accumulation": _TIMES,
    "test_resume_training_with_frozen_params": _TIMES,
    "test_multiple_peft_adapters": _TIMES,
    "test_logging_inf_nan_filter": "trains on after a loss that is not a number; `DPSMTrainer` stops and says where",
    "test_unscaled_model_loss_0_averaging_disabled": _ROUTER,
}

#: Further reasons by the name of the test, for `scoring_rule="dpsm"`.
DPSM: Mapping[str, str] = {
    "test_custom_loss": _OWN_LOSS,
    "test_train_and_predict_loss_parity": _OWN_LOSS,
    "test_gradient_accumulation_loss_alignment_with_loss_func": _OWN_LOSS,
    "test_resume_batch_order": (
        "writes down every batch that its model is called with; of a model that is not known the first batch is "
        "scored once more, to find out which label a row of its logits predicts"
    ),
}
