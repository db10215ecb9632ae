"""The gradient norms that the parts of an objective would have alone, beside the one of the whole in the log.

At initialisation the Brier gradient is about 2 / V of cross-entropy's, and later it grows with the probability of the
labels: which of the two moves the model cannot be read from alpha, nor from its weight how hard a z-loss pulls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..rules.scoring_rules import Objective
from ..runtime.distributed import sum_over_processes

# Both are measured whatever is trained: the one says what the other would do.
_RULES = {"grad_norm_ce": Objective("ce"), "grad_norm_brier": Objective("brier")}
# What an objective adds to its rule, by the field with its weight; measured where that is not 0.
_TERMS = {"z_loss": "grad_norm_z_loss", "entropy_weight": "grad_norm_entropy"}


def active_terms(objective: Objective) -> dict[str, float]:
    """Return the weights of what an objective adds to its rule, by field, without those of 0."""
    fields = {field.name for field in dataclasses.fields(objective)}
    return {name: weight for name in _TERMS if name in fields and (weight := float(getattr(objective, name)))}


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
    terms: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the gradient norm of each component over all processes, as if the micro-batch were the whole step.

    Call it before the training step: no gradient is held yet, so the peak of memory stays what it is; with terms the
    gradient of cross-entropy is held beside that of a term. No random number is drawn that training would have drawn.
    Equivalent plain torch, for the loss of each component alone, without smoothing:
    ``sum(g.square().sum() for g in torch.autograd.grad(loss, parameters)).sqrt()``.

    Args:
        loss_under: gives the loss of the micro-batch under a rule, 0-d with a graph.
        parameters: the trained ones.
        device: of the micro-batch.
        shares: a gradient is the sum over processes divided by this.
        scale: multiplies the loss meanwhile: small gradients are lost in float16.
        terms: of `active_terms`: what the objective adds to its rule, with its weight.
    """
    devices = [device] if device.type == "cuda" else []

    def gradients(objective: Objective) -> list[Tensor | None]:
        # all draw the same dropout, and the next step draws what it would have drawn
        with torch.random.fork_rng(devices):
            loss = loss_under(objective)
        return list(torch.autograd.grad(loss * scale, parameters, allow_unused=True))

    def norm(found: list[Tensor | None], less: list[Tensor | None] | None = None) -> float:
        total: Tensor = torch.zeros((), device=device)
        for i, parameter in enumerate(parameters):
            whole, base = found[i], None if less is None else less[i]
            part = torch.zeros_like(parameter, dtype=torch.float32) if whole is None else whole.float()
            if base is not None:
                part = part - base.float()
            total = total + (sum_over_processes(part) / shares).square().sum().to(total.device)
        return float(total.sqrt()) / scale

    norms: dict[str, float] = {}
    alone: list[Tensor | None] = []
    for name, rule in _RULES.items():
        found = gradients(rule)
        norms[name] = norm(found)
        alone = found if terms and rule.scoring_rule == "ce" else alone
        del found
    for name, weight in (terms or {}).items():
        # linear in its weight: at a weight of 1 least of it is lost in the difference
        added: dict[str, Any] = {name: 1.0}
        with_term = gradients(dataclasses.replace(_RULES["grad_norm_ce"], **added))
        norms[_TERMS[name]] = weight * norm(with_term, alone)
    return norms
