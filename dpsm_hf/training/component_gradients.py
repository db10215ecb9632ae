"""The gradient norms that cross-entropy and the Brier score would have alone, beside the one of the mix in the log.

At initialisation the Brier gradient is about 2 / V of cross-entropy's, and later it grows with the probability of the
labels: which of the two moves the model cannot be read from alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..rules.scoring_rules import Objective
from ..runtime.distributed import sum_over_processes

_PARTS = {"grad_norm_ce": Objective("ce"), "grad_norm_brier": Objective("brier")}


def check_component_norms(trainer: Trainer, *, owns_loss: bool) -> None:
    """Check whether the norms can be measured in a training.

    Raises:
        ValueError: if weights are sharded, activation checkpointing is re-entrant, or the loss is not computed by a
            scoring rule of this package.
    """
    kinds = {
        "FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled,
        "data parallelism in one process": trainer.args.n_gpu > 1, "tensor parallelism": trainer.get_tp_size() > 1,
    }  # fmt: skip
    if found := [kind for kind, there in kinds.items() if there]:
        raise ValueError(
            f"log_component_grad_norms needs whole weights on each process, which {found[0]} does not leave "
            "there; leave it out."
        )
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    if any((getattr(trainer.args, name, None) or {}).get("use_reentrant") for name in names):
        raise ValueError(
            "log_component_grad_norms does not work with re-entrant activation checkpointing, which torch cannot "
            "differentiate by parameters: set use_reentrant to false, or leave one of the two out."
        )
    if not owns_loss:
        raise ValueError(
            "log_component_grad_norms needs a loss that is computed here: leave compute_loss_func out, or choose "
            "another scoring_rule than 'ce' for a model that DPSM does not know."
        )


def next_step_is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether the optimizer step that begins is one that is logged."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return False
    step = state.global_step + 1
    first = step == 1 and args.logging_first_step
    return first or bool(state.logging_steps and step % state.logging_steps == 0)


def component_norms(
    loss_under: Callable[[Objective], Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    device: torch.device,
    shares: int,
    scale: float,
) -> dict[str, float]:
    """Return the gradient norm of each component over all processes, as if the micro-batch were the whole step.

    Call it before the training step: no gradient is held yet, so the peak of memory stays what it is. No random number
    is drawn that training would have drawn. Equivalent plain torch, for the loss of each component alone, without
    smoothing and z-loss: ``sum(g.square().sum() for g in torch.autograd.grad(loss, parameters)).sqrt()``.

    Args:
        loss_under: gives the loss of the micro-batch under a rule, 0-d with a graph.
        parameters: the trained ones.
        device: of the micro-batch.
        shares: a gradient is the sum over processes divided by this.
        scale: multiplies the loss meanwhile: small gradients are lost in float16.
    """
    norms: dict[str, float] = {}
    devices = [device] if device.type == "cuda" else []
    for name, rule in _PARTS.items():
        # both draw the same dropout, and the next step draws what it would have drawn
        with torch.random.fork_rng(devices):
            loss = loss_under(rule)
        total: Tensor = torch.zeros((), device=device)
        gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            part = torch.zeros_like(parameter) if gradient is None else gradient
            total = total + (sum_over_processes(part.float()) / shares).square().sum().to(total.device)
        norms[name] = float(total.sqrt()) / scale
    return norms
