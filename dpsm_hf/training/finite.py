"""Gradients and weights that are not finite: found before the optimizer uses them, or before they are saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from ..runtime.distributed import sum_over_processes


class FiniteNumbers:
    """Look at the gradients and weights of one trainer, and stop it where they are NaN or infinite."""

    def __init__(self) -> None:
        self._finite: Tensor | None = None  # whether all gradients were, where nobody waits for the device

    def forget(self) -> None:
        """Forget the gradients of an earlier training."""
        self._finite = None

    def check_gradient(self, trainer: Trainer, norm: Any, model: nn.Module) -> None:
        """Look at the norm of the gradient that the optimizer is about to use.

        Args:
            trainer: in training.
            norm: of the gradient, a number or a tensor, which may be sharded.
            model: whose gradient it is, possibly wrapped.

        Raises:
            FloatingPointError: it is not finite. With a gradient scaler (fp16) the optimizer leaves such a step out;
                with ``logging_nan_inf_filter=False`` (no waiting for the device) the next log or checkpoint raises.
        """
        scaler = getattr(trainer.accelerator, "scaler", None)
        if (scaler is not None and scaler.is_enabled()) or engine_steps(trainer):
            return
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if trainer.args.logging_nan_inf_filter or not isinstance(whole, Tensor):
            if not math.isfinite(float(whole)):
                raise FloatingPointError(_describe_gradient(float(whole), model, trainer.state.global_step + 1))
        else:
            finite = torch.isfinite(whole)
            self._finite = finite if self._finite is None else self._finite & finite

    def check_past_gradients(self, step: int) -> None:
        """Look at the gradients since the last call, where nobody waited for the device.

        Args:
            step: optimizer steps done.

        Raises:
            FloatingPointError: one of them was not finite.
        """
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            raise FloatingPointError(
                f"the norm of a gradient was nan or infinite since the last log, up to optimizer step "
                f"{step}. The weights were updated with it, but not saved: the last checkpoint is "
                "sound. Take logging_nan_inf_filter=False back to stop at the very step."
            )

    def check_before_saving(self, trainer: Trainer) -> None:
        """Look at past gradients, and at the weights that are about to be saved, on all processes.

        Args:
            trainer: whose model it is.

        Raises:
            FloatingPointError: naming the first weight that is not finite.
        """
        step = trainer.state.global_step
        self.check_past_gradients(step)
        assert trainer.model is not None
        trained = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
        # one wait for the device, not one a parameter
        flags = [_finite(weight).to(trainer.args.device) for _, weight in trained]
        finite = torch.stack(flags).tolist() if flags else []
        bad = [name for (name, _), whole in zip(trained, finite, strict=True) if not whole]
        if int(sum_over_processes(torch.tensor(len(bad), device=trainer.args.device))):
            raise FloatingPointError(
                f"{bad[0] if bad else 'a parameter of another process'} is NaN or infinite after optimizer step "
                f"{step}. Nothing was saved: the last checkpoint is sound. Usual remedies: a lower "
                "learning rate, max_grad_norm, bf16 instead of fp16."
            )


def engine_steps(trainer: Trainer) -> bool:
    """Return whether the optimizer runs within the backward pass, before anybody can look at the gradient.

    Args:
        trainer: in training.
    """
    return bool(trainer.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _describe_gradient(norm: float, model: nn.Module, step: int) -> str:
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in gradients if not bool(torch.isfinite(gradient).all())]
    # clipping by a norm that is NaN has made all of them NaN
    where = f" It is not finite in {len(bad)} parameters, first in {bad[0]}." if 0 < len(bad) < len(gradients) else ""
    return (
        f"the norm of the gradient is {norm} at optimizer step {step}, under a finite loss."
        f"{where} Nothing was updated with it: the last checkpoint is sound. Usual remedies: a lower learning "
        "rate, bf16 instead of fp16, a look at the samples of that step and at operations whose gradient is "
        "infinite at 0 (sqrt, log, norm)."
    )


def _finite(weight: Tensor) -> Tensor:
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return torch.isfinite(local.detach()).all()
