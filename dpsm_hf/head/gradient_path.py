"""Make the backward pass reach the output of the output layer before the loss that was computed inside it.

When the loss is computed inside the output layer, nothing uses the layer's output, so no gradient would reach it. But
ZeRO-3, FSDP2 and backward hooks act when that gradient arrives: without it, ZeRO-3 would not have gathered the weight
by the time its gradient is computed. So `output_of` makes the output depend on the loss, and `loss_after` makes the
returned loss depend on the model's logits. The gradient along this path is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def output_of(loss: Tensor | None, values: Tensor) -> Tensor:
    """Return a copy of a module's output that, in the autograd graph, depends on the 0-d loss computed inside it.

    Without a loss that requires grad it is a plain copy.
    """
    return values.clone() if loss is None or not loss.requires_grad else _Output.apply(loss, values)


def loss_after(loss: Tensor | None, output: Any) -> Tensor | None:
    """Return the loss with an output as a further input, so that the backward pass reaches the output first.

    The loss is returned as it is unless both require grad.
    """
    if loss is None or not loss.requires_grad or not isinstance(output, Tensor) or not output.requires_grad:
        return loss
    return _After.apply(loss, output)


def leaves(output: Tensor, stop: Any) -> Iterator[Tensor]:
    """Yield the leaf tensors (parameters) that an output depends on, without searching beyond the node ``stop``.

    A region compiled by torch.compile is one node of the graph. Of the tensors behind it only its direct inputs are
    yielded, because the graph does not show which of its outputs uses which input.
    """
    for node in _nodes(output, stop):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf


def depends_on(output: Any, node: Any) -> bool:
    """Return whether a tensor's autograd graph contains a node."""
    if node is None or not isinstance(output, Tensor):
        return False
    return output.grad_fn is node or any(
        following is node for passed in _nodes(output, node) for following, _ in passed.next_functions
    )


def _nodes(output: Tensor, stop: Any) -> Iterator[Any]:
    """Yield the nodes of a tensor's autograd graph, without ``stop`` and what lies behind it."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node is stop or node in seen:
            continue
        seen.add(node)
        yield node
        following = [node for node, _ in node.next_functions]
        if type(node).__name__ == "CompiledFunctionBackward":  # a region of torch.compile
            following = [node for node in following if hasattr(node, "variable")]
        pending += following


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None  # the gradient of the loss comes by its own path


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor) -> Tensor:
        ctx.shape, ctx.options = output.shape, {"dtype": output.dtype, "device": output.device}
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.zeros(ctx.shape, **ctx.options)
