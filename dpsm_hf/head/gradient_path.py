"""Make the backward pass visit the output of the output layer before the loss that was computed inside it.

Where the loss is computed inside the output layer, nobody uses the layer's output. But ZeRO-3, FSDP2 and backward
hooks act when the gradient of that output arrives; without it ZeRO-3 would not have gathered the weight when its
gradient is computed. So the output is made to depend on the loss, and the loss on what the model made of the output.
The gradient along that path is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def output_of(loss: Tensor | None, values: Tensor) -> Tensor:
    """Return a copy of a module's output that depends on the 0-d loss made inside of it, if that has a graph."""
    return values.clone() if loss is None or not loss.requires_grad else _Output.apply(loss, values)


def loss_after(loss: Tensor | None, output: Any) -> Tensor | None:
    """Return the same loss, tied to an output if both have a graph: the backward pass then visits the output first."""
    if loss is None or not loss.requires_grad or not isinstance(output, Tensor) or not output.requires_grad:
        return loss
    return _After.apply(loss, output)


def leaves(output: Tensor, stop: Any) -> Iterator[Tensor]:
    """Yield the tensors that an output's graph begins with, searched up to the node ``stop``.

    A region compiled by torch.compile is one node of the graph. Only its direct inputs are yielded: which of its
    outputs uses which of them cannot be seen.
    """
    for node in _nodes(output, stop):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf


def depends_on(output: Any, node: Any) -> bool:
    """Return whether a tensor's graph leads through a node."""
    if node is None or not isinstance(output, Tensor):
        return False
    return output.grad_fn is node or any(
        following is node for passed in _nodes(output, node) for following, _ in passed.next_functions
    )


def _nodes(output: Tensor, stop: Any) -> Iterator[Any]:
    """Yield the nodes of a tensor's graph, up to one that is not gone beyond."""
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
        return None, None  # the loss has a gradient of its own


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor) -> Tensor:
        ctx.shape, ctx.options = output.shape, {"dtype": output.dtype, "device": output.device}
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.zeros(ctx.shape, **ctx.options)
