"""Floating-point operations of a training step, counted on a copy of the model that has shapes but no numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from ..models.language_model import core_model, inputs_without_labels

logger = logging.get_logger(__name__)


def model_flops(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean floating-point operations of forward and backward over batches with labels, on one process.

    Matrix products and convolutions count, two operations for each multiplication and addition, as
    ``torch.utils.flop_counter`` counts them: attention in full (without the half that a causal kernel may skip), the
    output layer with the whole vocabulary, padding as the model computes it, no activation twice, and no gradient that
    frozen weights do without. The loss itself is none of these; all losses of a model have the same count.

    Nothing is computed: the copy's tensors are PyTorch's fake ones, so that weights, gradients and random numbers of
    the model stay as they are. That gives None for a model whose operations depend on its numbers (some mixtures of
    experts), and for no batch.
    """
    counts: list[int] = []
    known: dict[Any, int] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            shapes = _without_numbers(model, fake)
            for batch in batches:
                key = tuple((name, tuple(getattr(value, "shape", ()))) for name, value in batch.items())
                if key not in known:
                    known[key] = _count(shapes, batch, fake)
                counts.append(known[key])
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        name = type(core_model(model)).__name__
        logger.warning(f"the floating-point operations of {name} cannot be counted: {error}")
        return None
    return sum(counts) / len(counts) if counts else None


def _count(model: nn.Module, batch: Mapping[str, Any], fake: FakeTensorMode) -> int:
    device: Any = next(model.parameters()).device
    inputs = {k: fake.from_tensor(v).to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with FlopCounterMode(display=False) as counter:
        output = model(**inputs_without_labels(model, inputs), use_cache=False)
        logits = output["logits"] if isinstance(output, Mapping) else output[0]
        logits.sum().backward()
    return int(counter.get_total_flops())


def _without_numbers(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Return a copy of a model without numbers, in training mode, with eager attention, whose products can be seen."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(fake.from_tensor(p.detach()), requires_grad=p.requires_grad) for p in model.parameters()
    }
    memo |= {id(buffer): fake.from_tensor(buffer) for buffer in model.buffers()}
    shapes = copy.deepcopy(model, memo).train()
    core: Any = core_model(shapes)
    if hasattr(core, "set_attn_implementation"):
        core.set_attn_implementation("eager")
    for module in shapes.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    return shapes
