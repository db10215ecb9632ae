"""Scoring chunk by chunk, so that one chunk of logits lives at any moment instead of ``[N, V]``.

For some rows at a time: ``logits = hidden @ weight.T``, the row pass turns them into their gradient in place, and two
matrix products carry it on to the hidden states and the weight. All of that happens in the forward pass; the backward
pass only scales.

Sources: the chunked gradient-in-forward of Hsu et al., "Liger Kernel" (2024), and Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (ICLR 2025), each with other rules for chunks and precision; see docs/design.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rules.losses import refuse_second_derivative
from ..rules.rows import STATISTICS
from ..runtime.ranges import HEAD, ROW_PASS, named, ranged
from .matmul import WeightGradient, by_onednn, product, scaled
from .options import Head, HeadOptions, Implementation, LinearHead, ModuleHead
from .row_pass import device_scalar, row_pass

# A finished gradient, or the sum that it is still to be made of.
Source = Tensor | WeightGradient | None

# Rows of a chunk. On a GPU fewer than about 1,000 make the read-modify-write of the float32 weight gradient cost more
# than the product that it belongs to, and half a GiB is enough. On a CPU 128 are nearly as fast as 1,024; glibc keeps
# blocks of up to 32 MiB for the next chunk, which spares it the page faults.
_DEVICE_CHUNK, _DEVICE_CHUNK_BYTES = 2048, 2**29
_CPU_LEAST, _CPU_CHUNK, _CPU_CHUNK_BYTES = 128, 256, 2**25

# The rows of the logits' buffer begin at multiples of this many entries: V is often odd (50257), and products of
# matrices with unaligned rows are slow.
_ROW_ALIGNMENT = 64

# float16 holds no p**2 of a large vocabulary: its gradients are computed this much larger, and scaled at the end. Less
# where the weight is so large that their products would not fit into float16.
_HALF_SCALE = 1024.0
_HALF_WEIGHT = 4.0


class ChunkedObjective(torch.autograd.Function):
    """The loss of a batch as a function of its hidden states and its head's parameters; see `linear_scoring_loss`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, rows: Tensor | None, options: HeadOptions,
        denominator: Tensor | int | None, *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the loss (0-d), the value of each scored token ``[M]`` and the statistics ``[M, 5 or 6]``.

        ``rows`` are the indices of the M scored tokens among the hidden states, or None where all are. With a
        ``denominator`` the loss is differentiable and its gradients are computed here; without one the values are,
        and their gradients are computed in the backward pass, from the hidden states once more.
        """
        wants = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        work = _Work(hidden, head, labels, rows, options)
        eager = denominator is not None and options.objective is not None and any(wants)
        # half precision underflows on 1 / N, and on p**2: there the factors are put onto the finished gradients
        late = work.dtype == torch.float16
        wide = torch.float64 if work.dtype == torch.float64 else torch.float32
        tokens = device_scalar(1 if denominator is None else denominator, hidden.device, wide)
        scale = tokens.reciprocal()
        # by a power of two, so that putting it off rounds nothing a second time
        later = work.half_scale() * torch.exp2(tokens.log2().ceil()) if late else tokens
        values, statistics, gradients = work.run((scale * later if late else scale) if eager else None, wants)
        if values is None:
            values = statistics.new_zeros(len(labels))
        ctx.gradients = gradients
        ctx.late = later.reciprocal() if late else None
        if denominator is None and options.objective is not None and any(wants):
            ctx.save_for_backward(hidden, labels, rows, *parameters)
            ctx.work = (head, options, wants, work.autocast, work.dtype)
            ctx.mark_non_differentiable(statistics)
        else:
            ctx.mark_non_differentiable(values, statistics)
        ctx.set_materialize_grads(False)
        return values.sum() / tokens, values, statistics

    @staticmethod
    @ranged(HEAD)
    def backward(ctx: Any, grad_loss: Tensor | None, grad_values: Tensor | None, _: None) -> tuple[Any, ...]:
        """Scale the gradients that the forward pass computed."""
        refuse_second_derivative("linear_scoring_loss")
        if grad_values is not None:
            return _gradients_of_values(ctx, grad_values)
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss were freed by its first backward: call that with retain_graph=True to go "
                "through it a second time."
            )
        factor = grad_loss if ctx.late is None else grad_loss * ctx.late
        if factor.device.type == "cpu" and float(factor) == 1.0:
            factor = None
        gradients, keep = ctx.gradients, _keeps_graph()
        if not keep:  # they are scaled where they stand: a copy costs as much as the whole head
            ctx.gradients = None
        return _finished(gradients, factor, keep)


def _finished(gradients: list[tuple[Source, torch.dtype]], factor: Tensor | None, keep: bool) -> tuple[Any, ...]:
    """Return the gradient of each argument of the forward pass."""
    found: list[Tensor | None] = []
    for source, dtype in gradients:
        if isinstance(source, WeightGradient):
            found.append(source.finish(factor, keep))
        else:
            found.append(None if source is None else scaled(source, factor, keep).to(dtype))
    return (found[0], None, None, None, None, None, *found[1:])


def _gradients_of_values(ctx: Any, grad_values: Tensor) -> tuple[Any, ...]:
    hidden, labels, rows = ctx.saved_tensors[:3]
    head, options, wants, autocast, dtype = ctx.work
    # the backward pass runs outside of the autocast that the forward pass was in
    with torch.autocast(hidden.device.type, dtype=dtype) if autocast else contextlib.nullcontext():
        work = _Work(hidden, head, labels, rows, options)
    factor: Tensor | None = None
    if work.dtype == torch.float16 and len(labels):
        largest = grad_values.abs().max().clamp_min(torch.finfo(grad_values.dtype).tiny)
        factor = torch.exp2(largest.log2().ceil()) / work.half_scale()
    _, _, gradients = work.run(grad_values if factor is None else grad_values / factor, wants)
    return _finished(gradients, factor, keep=False)


def _keeps_graph() -> bool:
    """Return whether the running backward pass was called with ``retain_graph=True``."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


class _Work:
    """One walk over the chunks of a batch."""

    def __init__(self, hidden: Tensor, head: Head, labels: Tensor, rows: Tensor | None, options: HeadOptions) -> None:
        self.hidden, self.head, self.labels, self.rows, self.options = hidden, head, labels, rows, options
        kind = hidden.device.type
        self.autocast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(kind) if self.autocast else hidden.dtype
        self.whole = False
        if isinstance(head, LinearHead) and not self.autocast and head.weight.dtype != hidden.dtype:
            raise ValueError(
                f"the hidden states are {hidden.dtype} but the head's weight is {head.weight.dtype}: convert one of "
                "them, or call the model under torch.autocast."
            )

    def half_scale(self) -> Tensor:
        """Return the power of two by which float16 gradients are computed too large."""
        largest = torch.full((), _HALF_WEIGHT, device=self.hidden.device)
        if isinstance(self.head, LinearHead):
            largest = torch.maximum(largest, self.head.weight.detach().abs().max().float())
        largest = largest * max(1.0, abs(self.options.post.scale))
        return torch.exp2((_HALF_SCALE * _HALF_WEIGHT / largest).log2().floor())

    def run(
        self, weight: Tensor | float | None, wants: list[bool]
    ) -> tuple[Tensor | None, Tensor, list[tuple[Source, torch.dtype]]]:
        """Score every chunk.

        Args:
            weight: factor of the gradient, of each scored token ``[M]`` or of all; None computes no gradient.
            wants: whether the hidden states and each parameter of the head need one.

        Returns:
            Values ``[M]``, statistics ``[M, 5 or 6]``, and for the hidden states and each parameter the gradient (or
            None) with the dtype it is to have.
        """
        hidden, head, options = self.hidden, self.head, self.options
        # One chunk where the logits [N, V] are smaller than half of the float32 sum [V, D] of the weight's gradient,
        # which one chunk does without: less memory, and no pass over that sum for each chunk.
        low = isinstance(head, LinearHead) and hidden.dtype == head.weight.dtype == torch.bfloat16
        self.whole = low and weight is not None and wants[1] and len(self.labels) <= hidden.shape[-1]
        chunk = _LinearChunks(self, head, wants) if isinstance(head, LinearHead) else _ModuleChunks(self, head, wants)
        grad_hidden: Tensor | None = None
        if weight is not None and wants[0]:
            # rows that are not scored are never visited: they stay zero
            grad_hidden = torch.empty_like(hidden) if self.rows is None else torch.zeros_like(hidden)
        score = _row_pass_of(options.impl, hidden.device)
        values, columns = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            size = self.chunk_size()
            for part in [slice(start, start + size) for start in range(0, len(self.labels), size)]:
                index = part if self.rows is None else self.rows[part]
                logits = chunk.logits(hidden[index], weight is not None)
                factor = weight[part] if isinstance(weight, Tensor) and weight.dim() else weight
                with named(ROW_PASS):
                    value, statistics = score(
                        logits, self.labels[part], options.objective, options.post,
                        weight=1.0 if factor is None else factor, entropy=options.entropy, gradient=weight is not None,
                    )  # fmt: skip
                if options.extra is not None:  # the row pass leaves the logits alone where it writes no gradient
                    assert weight is None, "extra statistics are for evaluation"
                    extra = options.extra(options.post(logits), self.labels[part])
                    statistics = torch.cat([statistics, extra.to(statistics.dtype)], -1)
                columns.append(statistics)
                if value is not None:
                    values.append(value)
                if weight is not None:
                    part_gradient = chunk.backward(logits)
                    if grad_hidden is not None:
                        grad_hidden[index] = part_gradient.to(grad_hidden.dtype)
                    del part_gradient
                del logits  # before the next chunk is allocated
        if not columns:  # nothing is scored
            width = len(STATISTICS) - (not options.entropy) + (0 if options.extra is None else options.extra.width)
            columns = [hidden.new_zeros(0, width).float()]
        sources = [grad_hidden, *chunk.totals()]
        dtypes = [hidden.dtype if tensor is None else tensor.dtype for tensor in (hidden, *head.parameters)]
        return torch.cat(values) if values else None, torch.cat(columns), list(zip(sources, dtypes, strict=True))

    def chunk_size(self) -> int:
        """Return the rows of a chunk: 260 rows are cut into 130 + 130, not into 256 + 4."""
        tokens, row_bytes = max(1, len(self.labels)), self.head.vocab_size * self.dtype.itemsize
        if self.options.chunk_tokens is not None:
            most = self.options.chunk_tokens
        elif self.whole:
            most = tokens
        elif self.hidden.device.type == "cpu":
            most = min(_CPU_CHUNK, max(_CPU_LEAST, _CPU_CHUNK_BYTES // row_bytes))
        else:
            most = max(1, min(_DEVICE_CHUNK, _DEVICE_CHUNK_BYTES // row_bytes))
        number = -(-tokens // most)
        return -(-tokens // number)


class _LinearChunks:
    """Logits of a linear head in one buffer, and its gradients by matrix products."""

    def __init__(self, work: _Work, head: LinearHead, wants: list[bool]) -> None:
        self.wants, self.dtype = wants, work.dtype
        self.weight = head.weight.detach().to(work.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(work.dtype)
        self.hidden = work.hidden.detach()[:0]
        self.buffer: Tensor | None = None
        if not by_onednn(self.weight, work.chunk_size()):  # that returns memory of its own
            columns = -(-head.vocab_size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
            self.buffer = torch.empty(work.chunk_size(), columns, dtype=work.dtype, device=work.hidden.device)
        self.grad_weight = WeightGradient(head.weight, whole=work.chunk_size() >= len(work.labels))
        self.grad_bias: Tensor | None = None

    def logits(self, hidden: Tensor, gradient: bool) -> Tensor:
        """Return the head's output for some rows."""
        self.hidden = hidden.to(self.dtype)
        out = None if self.buffer is None else self.buffer[: len(hidden), : len(self.weight)]
        return product(self.hidden, self.weight, self.bias, out)

    def backward(self, gradient: Tensor) -> Tensor:
        """Add up the parameters' gradients and return that of the rows' hidden states."""
        if self.wants[1]:
            self.grad_weight.add(gradient, self.hidden)
        if self.wants[2]:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            part = gradient.sum(0, dtype=wide)
            self.grad_bias = part if self.grad_bias is None else self.grad_bias.add_(part)
        return product(gradient, self.weight.t()) if self.wants[0] else gradient

    def totals(self) -> list[Source]:
        """Return the gradients of weight and bias."""
        bias = self.grad_bias
        if bias is None and self.wants[2] and self.bias is not None:
            bias = torch.zeros_like(self.bias)
        return [self.grad_weight if self.wants[1] else None, bias]


class _ModuleChunks:
    """Logits of any other head, and its gradients by autograd over one chunk."""

    def __init__(self, work: _Work, head: ModuleHead, wants: list[bool]) -> None:
        self.head, self.work, self.wants = head, work, wants
        self.sums: list[Tensor | None] = [None] * len(head.parameters)
        self.graph: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor, gradient: bool) -> Tensor:
        """Return a copy of the head's output for some rows: the module may need its own in the backward pass."""
        kind = hidden.device.type
        with torch.set_grad_enabled(gradient), torch.autocast(kind, dtype=self.work.dtype, enabled=self.work.autocast):
            rows = hidden.detach().requires_grad_(gradient and self.wants[0])
            output = self.head.forward(rows)
        self.graph = (rows, output)
        return output.detach().clone()

    def backward(self, gradient: Tensor) -> Tensor:
        """Add up the parameters' gradients and return that of the rows' hidden states."""
        assert self.graph is not None
        rows, output = self.graph
        needed = [i for i, want in enumerate(self.wants[1:]) if want]
        inputs = [parameter for i in needed if (parameter := self.head.parameters[i]) is not None]
        wanted = ([rows] if self.wants[0] else []) + inputs
        found = list(torch.autograd.grad(output, wanted, gradient.to(output.dtype), allow_unused=True))
        grad_rows = found.pop(0) if self.wants[0] else None
        for i, part in zip(needed, found, strict=True):
            if part is not None:
                wide = part if part.dtype == torch.float64 else part.float()
                total = self.sums[i]
                self.sums[i] = wide if total is None else total.add_(wide)
        self.graph = None
        return torch.zeros_like(rows) if grad_rows is None else grad_rows

    def totals(self) -> list[Source]:
        """Return the gradient of each parameter that needs one."""
        return [
            torch.zeros_like(parameter) if total is None and want and parameter is not None else total
            for total, want, parameter in zip(self.sums, self.wants[1:], self.head.parameters, strict=True)
        ]


def _row_pass_of(impl: Implementation, device: torch.device) -> Callable[..., tuple[Tensor | None, Tensor]]:
    if impl == "triton" or (impl == "auto" and device.type == "cuda"):
        from . import kernels  # Triton is there on Linux alone

        reason = kernels.why_not(device)
        if not reason:
            return kernels.triton_row_pass
        if impl == "triton":
            raise ValueError(reason)
    return row_pass
