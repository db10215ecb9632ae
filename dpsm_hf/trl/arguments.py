"""`DPSMSFTConfig`: TRL's SFTConfig with the fields of DPSM, and what is refused in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import SFTConfig

from ..rules.registry import SCORING_RULES
from ..runtime.options import option
from ..training.arguments import DPSMArguments, check_no_foreign_fields

#: The value of ``loss_type`` in a `DPSMSFTConfig`. `SFTTrainer`, which would ignore the scoring rule, refuses it, and
#: quotes it in its error.
LEFT_TO_THE_RULE = "scoring_rule (needs DPSMSFTTrainer)"

#: The loss that TRL takes where nothing is said.
TRLS_DEFAULT = "nll"

# TRL's names of cross-entropy beside its default; its configuration turns them into the default and warns
_SAME_AS_CE = ("chunked_nll",)


@dataclass
class DPSMSFTConfig(DPSMArguments, SFTConfig):
    """TRL's SFTConfig with the fields of `DPSMArguments`; no default of SFTConfig but ``loss_type`` is changed.

    ``scoring_rule`` chooses the loss. TRL's ``loss_type`` has nothing to say here: leave it out. Its default in TRL,
    ``"nll"``, is taken too, since scripts often spell it out, and so is the scoring rule's own name (``"dft"``).

    Raises:
        ValueError: for another ``loss_type``, and as `DPSMArguments` and SFTConfig do.
    """

    loss_type: str = option("dpsm_hf: not used; scoring_rule chooses the loss.", LEFT_TO_THE_RULE)

    def __post_init__(self) -> None:
        check_loss_type(self.loss_type, self.scoring_rule)
        super().__post_init__()


def check_loss_type(loss_type: str, scoring_rule: str) -> None:
    """Look whether TRL's ``loss_type`` asks for another loss than the scoring rule.

    Raises:
        ValueError: if so.
    """
    if loss_type in (LEFT_TO_THE_RULE, TRLS_DEFAULT, scoring_rule) or (
        loss_type in _SAME_AS_CE and scoring_rule == "ce"
    ):
        return
    if loss_type in SCORING_RULES:
        remedy = f"the argument that chooses the loss is scoring_rule here: write scoring_rule={loss_type!r}"
    elif loss_type in _SAME_AS_CE:
        remedy = "leave loss_type out, or choose scoring_rule='ce' for cross-entropy"
    else:
        remedy = (
            f"leave loss_type out and choose scoring_rule from {', '.join(SCORING_RULES)}, or train with "
            f"trl.SFTTrainer and SFTConfig(loss_type={loss_type!r})"
        )
    raise ValueError(f"loss_type={loss_type!r} has no effect on scoring_rule={scoring_rule!r}: {remedy}.")


def check_arguments(args: Any) -> None:
    """Look whether `DPSMSFTTrainer` can be given these arguments.

    Args:
        args: `DPSMSFTConfig`, SFTConfig or TrainingArguments, whose scoring rule is the default, or None.

    Raises:
        TypeError: for the DPSM configuration of another trainer.
        ValueError: for a loss of TRL's, and for DPSM fields in a class that is not ours.
    """
    if isinstance(args, DPSMArguments) and not isinstance(args, SFTConfig):
        raise TypeError(
            f"args is a {type(args).__name__}, which lacks the fields of TRL's SFTConfig; give DPSMSFTTrainer a "
            "DPSMSFTConfig (from dpsm_hf.trl import DPSMSFTConfig), which takes the same DPSM fields."
        )
    if not isinstance(args, DPSMArguments):
        check_no_foreign_fields(args, "dpsm_hf.trl.DPSMSFTConfig")
    if isinstance(args, SFTConfig):
        check_loss_type(args.loss_type, getattr(args, "scoring_rule", DPSMArguments.scoring_rule))
