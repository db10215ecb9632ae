"""Make the backward pass visit the output of the output layer before the loss that was computed inside it.

A head that scores tokens returns its loss aside, and its module an output that nobody needs. But ZeRO-3, FSDP2 and
backward hooks act when the gradient of that output arrives; without it ZeRO-3 would not have gathered the weight when
its gradient is computed. So the output is made to depend on the loss, and the loss to depend on what the model made of
the output. The gradient along that path is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Name of the node that a region of torch.compile is in a graph.
_COMPILED = "CompiledFunctionBackward"


def output_of(loss: Tensor | None, values: Tensor) -> Tensor:
    """Return a copy of a module's output that depends on its loss.

    Args:
        loss: 0-d, made inside of the module; None or without a graph leaves the copy without one.
        values: of the output, without a graph.
    """
    if loss is None or not loss.requires_grad:
        return values.clone()
    return _Output.apply(loss, values)


def loss_after(loss: Tensor | None, output: Any) -> Tensor | None:
    """Return the same loss, tied to an output, so that the backward pass visits the output first.

    Args:
        loss: 0-d.
        output: made of `output_of`; anything that has no graph leaves the loss as it is.
    """
    if loss is None or not loss.requires_grad or not isinstance(output, Tensor) or not output.requires_grad:
        return loss
    return _After.apply(loss, output)


def leaves(output: Tensor, stop: Any) -> Iterator[Tensor]:
    """Yield the tensors that an output's graph begins with.

    A region compiled by torch.compile is one node of the graph. Only its direct inputs are yielded: which of its
    outputs uses which of them cannot be seen.

    Args:
        output: a tensor.
        stop: the node of the graph that is not gone beyond.
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
        if type(node).__name__ == _COMPILED:
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
        ctx.like = (output.shape, output.dtype, output.device)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)
