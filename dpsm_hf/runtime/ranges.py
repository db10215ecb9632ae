"""Named ranges of a training step: what `torch.profiler` shows as annotations and Nsight Systems as NVTX ranges.

``forward`` goes from a batch to its loss, ``head`` from the hidden states to the loss (output layer and scoring; where
autograd differentiates it, that part of the backward pass too), ``row pass`` from logits to scores, ``backward`` is
the call of backward, ``optimizer`` the optimizer's step. Where nobody profiles, a range is a call and two questions.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import _profiler_enabled
from torch.autograd.profiler import record_function

FORWARD, HEAD, ROW_PASS, BACKWARD, OPTIMIZER = "forward", "head", "row pass", "backward", "optimizer"
RANGES = (FORWARD, HEAD, ROW_PASS, BACKWARD, OPTIMIZER)

_Function = TypeVar("_Function", bound=Callable[..., Any])

# One for all: it holds nothing.
_NOTHING = contextlib.nullcontext()

# Optimizers whose steps are named; their hooks stay, since taking them off would cost as much as leaving them.
_NAMED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def active() -> bool:
    """Return whether ranges may be seen: a profiler of torch's is running, or CUDA is in use.

    On CUDA they are always given to NVTX, which does nothing with them unless a tool is attached: whether one is, it
    does not tell reliably (a tool that keeps no depth answers as none does).
    """
    # a compiled program has no ranges of ours in it, whether or not a profiler happened to run when it was compiled
    return not torch.compiler.is_compiling() and (_profiler_enabled() or torch.cuda.is_initialized())


def named(name: str) -> AbstractContextManager[object]:
    """Return a context that is a range of this name, of `RANGES` or any other, for whoever listens now."""
    if not active():
        return _NOTHING
    # under emit_nvtx the profiler passes the range on to NVTX
    return record_function(name) if _profiler_enabled() else torch.cuda.nvtx.range(name)


def ranged(name: str) -> Callable[[_Function], _Function]:
    """Return a decorator that makes every call of a function a range of this name."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            if not active():
                return function(*args, **kwargs)
            with named(name):
                return function(*args, **kwargs)

        return cast(_Function, inside)

    return decorate


@contextlib.contextmanager
def calls_named(owner: Any, method: str, name: str) -> Iterator[None]:
    """Make the calls of one object's method ranges, for the length of a context.

    Args:
        owner: the object; its class stays as it is.
        method: name of the method.
        name: of the ranges.
    """
    before = vars(owner).get(method)
    setattr(owner, method, ranged(name)(getattr(owner, method)))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)


def name_steps(optimizer: Any) -> None:
    """Make the steps of an optimizer ranges, from now on.

    Args:
        optimizer: possibly wrapped by accelerate; one that has no step hooks is left alone.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer) or optimizer in _NAMED:
        return
    step = _HookedRange(OPTIMIZER)
    optimizer.register_step_pre_hook(step.begin)
    optimizer.register_step_post_hook(step.end)
    _NAMED.add(optimizer)


class _HookedRange:
    """A range that one hook begins and another ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: AbstractContextManager[object] | None = None

    def begin(self, *_: Any) -> None:
        self._open = named(self._name)  # one that a failed step left open is forgotten
        self._open.__enter__()

    def end(self, *_: Any) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


class HeadRanges:
    """The range ``head`` around an output layer that the model calls and autograd differentiates.

    As a context it names the calls of the layer. `until_hidden` then names the part of the backward pass that goes
    from the loss to the hidden states: that of the loss and of the layer.

    Args:
        layer: the output layer; None names nothing.
    """

    def __init__(self, layer: nn.Module | None) -> None:
        self._layer = layer
        self._handles: list[Any] = []
        self._hidden: Tensor | None = None
        self._call = _HookedRange(HEAD)

    def __enter__(self) -> HeadRanges:
        if self._layer is not None:
            self._handles = [
                self._layer.register_forward_pre_hook(self._before, prepend=True),
                self._layer.register_forward_hook(self._call.end, always_call=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._hidden = args[0] if args and isinstance(args[0], Tensor) else None
        self._call.begin()

    def until_hidden(self, loss: Tensor) -> None:
        """Name the way back from the loss to the hidden states that the layer was given."""
        hidden, self._hidden = self._hidden, None
        # on two devices the way back runs in two threads, and a range belongs to one
        if hidden is None or not hidden.requires_grad or not loss.requires_grad or hidden.device != loss.device:
            return
        backward = _HookedRange(HEAD)
        loss.register_hook(backward.begin)
        hidden.register_hook(backward.end)
