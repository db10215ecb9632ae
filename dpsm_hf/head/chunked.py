"""The loss and its gradients, chunk by chunk, so that memory holds one chunk of logits and never all ``[N, V]``.

For each chunk of rows: compute ``logits = hidden @ weight.T``, let the row pass overwrite them with their gradient,
and multiply that by the weight and by the hidden states to get the gradients of both. All of this happens in the
forward pass; the backward pass only multiplies by the incoming gradient.

Sources: the gradient in the forward pass is from Hsu et al., "Liger Kernel" (2024), and Wijmans et al., "Cut Your
Losses in Large-Vocabulary Language Models" (ICLR 2025). Chunk sizes and precision differ from both: docs/design.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rules.losses import refuse_second_derivative
from ..rules.rows import statistics_names
from ..runtime.ranges import HEAD, ROW_PASS, named, ranged
from .matmul import WeightGradient, by_onednn, product, scaled
from .options import Head, HeadOptions, Implementation, LinearHead, ModuleHead
from .row_pass import device_scalar, row_pass

# The gradient of one input: a finished tensor, a sum over chunks that `finish` turns into one, or None.
Source = Tensor | WeightGradient | None

# Rows of a chunk. On a GPU, with fewer than about 1,000 rows, reading and writing the float32 weight gradient costs
# more than the product that is added to it; 512 MiB are enough for that. On a CPU, 128 rows are nearly as fast as
# 1,024, and glibc reuses blocks of up to 32 MiB for the next chunk, which avoids page faults.
_DEVICE_CHUNK, _DEVICE_CHUNK_BYTES = 2048, 2**29
_CPU_LEAST, _CPU_CHUNK, _CPU_CHUNK_BYTES = 128, 256, 2**25

# Each row of the logits buffer starts at a multiple of this many entries: V is often odd (50257), and matrix products
# with unaligned rows are slow.
_ROW_ALIGNMENT = 64

# p**2 of a large vocabulary underflows in float16, so float16 gradients are computed larger by this factor and divided
# by it at the end. Above this largest weight the factor is smaller, or products with the weight would overflow.
_HALF_SCALE = 1024.0
_HALF_WEIGHT = 4.0


class ChunkedObjective(torch.autograd.Function):
    """The autograd function behind `linear_scoring_loss`: loss and gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, rows: Tensor | None, options: HeadOptions,
        denominator: Tensor | int | None, *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the loss (0-d), the value of each scored token ``[M]`` and the statistics ``[M, 5 to 7]``.

        ``rows`` are the indices of the M scored tokens among the hidden states; None if all are scored. With a
        ``denominator`` the loss is differentiable, and its gradients are computed here. Without one the values are
        differentiable, and the backward pass computes the logits again for their gradients.
        """
        wants = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        work = _ChunkedPass(hidden, head, labels, rows, options)
        eager = denominator is not None and options.objective is not None and any(wants)
        # 1 / N and p**2 underflow in float16, so there the division by N is deferred to the finished gradients
        defers = work.dtype == torch.float16
        wide = torch.float64 if work.dtype == torch.float64 else torch.float32
        tokens = device_scalar(1 if denominator is None else denominator, hidden.device, wide)
        scale = tokens.reciprocal()
        # the deferred factor is a power of two, so that applying it later adds no rounding error
        deferred = work.half_scale() * torch.exp2(tokens.log2().ceil()) if defers else tokens
        values, statistics, gradients = work.run((scale * deferred if defers else scale) if eager else None, wants)
        if values is None:
            values = statistics.new_zeros(len(labels))
        ctx.gradients = gradients
        ctx.deferred = deferred.reciprocal() if defers else None
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
        """Multiply the gradients of the forward pass by the gradient of the loss."""
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
        factor = grad_loss if ctx.deferred is None else grad_loss * ctx.deferred
        if factor.device.type == "cpu" and float(factor) == 1.0:
            factor = None
        gradients, keep = ctx.gradients, _keeps_graph()
        if not keep:  # scaled in place: a copy takes as much memory as the gradients themselves
            ctx.gradients = None
        return _finished(gradients, factor, keep)


def _finished(gradients: list[tuple[Source, torch.dtype]], factor: Tensor | None, keep: bool) -> tuple[Any, ...]:
    """Return ``factor`` times the gradient of each argument of the forward pass, in the order of the arguments."""
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
    # autograd runs the backward pass outside the autocast context of the forward pass
    with torch.autocast(hidden.device.type, dtype=dtype) if autocast else contextlib.nullcontext():
        work = _ChunkedPass(hidden, head, labels, rows, options)
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


class _ChunkedPass:
    """One pass over the chunks of a batch."""

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
        """Return the power of two by which float16 gradients are scaled up against underflow."""
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
            weight: what each token's gradient is multiplied by: one for each scored token, ``[M]``, or one for all;
                None computes no gradient.
            wants: whether the hidden states and each parameter of the head need a gradient.

        Returns:
            Values ``[M]`` (None without an objective), statistics ``[M, 5 to 7]``, and for the hidden states and each
            parameter its gradient (or None) with the dtype to return it in.
        """
        hidden, head, options = self.hidden, self.head, self.options
        # In bfloat16 with N <= D, all logits [N, V] take at most half the memory of the float32 sum [V, D] of the
        # weight's gradient. A single chunk needs no such sum: it takes less memory and saves a pass over it per chunk.
        low = isinstance(head, LinearHead) and hidden.dtype == head.weight.dtype == torch.bfloat16
        self.whole = low and weight is not None and wants[1] and len(self.labels) <= hidden.shape[-1]
        chunk = _LinearChunks(self, head, wants) if isinstance(head, LinearHead) else _ModuleChunks(self, head, wants)
        grad_hidden: Tensor | None = None
        if weight is not None and wants[0]:
            # unscored rows are never written, so they have to be zero from the start
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
                        weight=1.0 if factor is None else factor, entropy=options.entropy,
                        varentropy=options.varentropy, gradient=weight is not None,
                    )  # fmt: skip
                if options.extra is not None:  # the logits are still intact: without weight no gradient was written
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
            names = statistics_names(options.entropy, options.varentropy)
            width = len(names) + (0 if options.extra is None else options.extra.width)
            columns = [hidden.new_zeros(0, width).float()]
        sources = [grad_hidden, *chunk.totals()]
        dtypes = [hidden.dtype if tensor is None else tensor.dtype for tensor in (hidden, *head.parameters)]
        return torch.cat(values) if values else None, torch.cat(columns), list(zip(sources, dtypes, strict=True))

    def chunk_size(self) -> int:
        """Return the number of rows in a chunk; chunks are of equal size: 260 rows make 130 + 130, not 256 + 4."""
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
    """The chunks of a linear head: logits in one reused buffer, gradients by matrix products."""

    def __init__(self, work: _ChunkedPass, head: LinearHead, wants: list[bool]) -> None:
        self.wants, self.dtype = wants, work.dtype
        self.weight = head.weight.detach().to(work.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(work.dtype)
        self.hidden = work.hidden.detach()[:0]
        self.buffer: Tensor | None = None
        if not by_onednn(self.weight, work.chunk_size()):  # oneDNN allocates its own output
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
    """The chunks of any other head: logits by calling it, gradients by autograd over one chunk."""

    def __init__(self, work: _ChunkedPass, head: ModuleHead, wants: list[bool]) -> None:
        self.head, self.work, self.wants = head, work, wants
        self.sums: list[Tensor | None] = [None] * len(head.parameters)
        self.graph: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor, gradient: bool) -> Tensor:
        """Return a copy of the head's output for some rows; autograd may need the output itself unchanged."""
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
        from . import kernels  # needs Triton, which exists on Linux only

        reason = kernels.why_not(device)
        if not reason:
            return kernels.triton_row_pass
        if impl == "triton":
            raise ValueError(reason)
    return row_pass
