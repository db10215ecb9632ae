"""The gradient norms that cross-entropy and the Brier score would have alone, beside the one of the mix in the log.

At initialisation the Brier gradient is about 2 / V of cross-entropy's, and later it grows with the probability of the
labels: which of the two moves the model is not told by alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy

from ..rules.scoring_rules import Objective
from ..runtime.distributed import sum_over_processes
from .training_loss import TrainingLossMixin

PARTS = {"grad_norm_ce": Objective("ce"), "grad_norm_brier": Objective("brier")}


class ComponentGradientsMixin(TrainingLossMixin):
    """Measure both gradients with ``log_component_grad_norms``; training itself does not notice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._component_norms: dict[str, float] = {}
        if self.dpsm.log_component_grad_norms:
            self._check_components()

    def _check_components(self) -> None:
        kinds = {
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "data parallelism in one process": self.args.n_gpu > 1,
            "tensor parallelism": self.get_tp_size() > 1,
        }
        if found := [kind for kind, there in kinds.items() if there]:
            raise ValueError(
                f"log_component_grad_norms needs whole weights on each process, which {found[0]} does not leave "
                "there; leave it out."
            )
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        if any((getattr(self.args, name, None) or {}).get("use_reentrant") for name in names):
            raise ValueError(
                "log_component_grad_norms does not work with re-entrant activation checkpointing, which torch cannot "
                "differentiate by parameters: set use_reentrant to false, or leave one of the two out."
            )
        if not self._owns_loss():
            raise ValueError(
                "log_component_grad_norms needs a loss that is computed here: leave compute_loss_func out, or choose "
                "another loss_type than 'ce' for a model that DPSM does not know."
            )

    def _components_due(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether the optimizer step that begins is one that is logged."""
        if not self.dpsm.log_component_grad_norms or self.args.logging_strategy != IntervalStrategy.STEPS:
            return False
        if self._alignment is None or "labels" not in inputs:  # found out by the step, or refused there
            return False
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step
        return first or bool(self.state.logging_steps and step % self.state.logging_steps == 0)

    def _measure_components(self, inputs: Mapping[str, Any]) -> None:
        """Take the norms for the log, of all processes together, as if the micro-batch were the whole step.

        Equivalent plain torch, with the loss of each part alone, without smoothing and z-loss:
        ``sum(g.square().sum() for g in torch.autograd.grad(loss, trained_parameters)).sqrt()``.

        Args:
            inputs: the micro-batch that is about to be trained on. Before, not after: no gradient is held yet, so that
                the peak of memory stays what it is.
        """
        prepared = self._prepare_inputs(dict(inputs))
        count = self._get_num_items_in_batch([prepared], self.args.device)  # as the training step counts
        # like its gradient: summed over processes where the count is everybody's, else averaged
        shares = 1 if self.args.average_tokens_across_devices else self.accelerator.num_processes
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        scaler = getattr(self.accelerator, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())  # small gradients are lost in float16
        device = prepared["labels"].device
        devices = [device] if device.type == "cuda" else []
        self.model.train()
        for name, rule in PARTS.items():
            # both draw the same dropout, and the next step draws what it would have drawn
            with torch.random.fork_rng(devices), self.compute_loss_context_manager():
                loss = self._loss_under(rule, prepared, count)
            total: Tensor = torch.zeros((), device=device)
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss * scale, parameters, allow_unused=True), strict=True
            ):
                part = torch.zeros_like(parameter) if gradient is None else gradient
                total = total + (sum_over_processes(part.float()) / shares).square().sum().to(total.device)
            self._component_norms[name] = float(total.sqrt()) / scale
