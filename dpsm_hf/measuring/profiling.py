"""Profile a step: its time by named range, and the floating-point operations of its matrix products."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop

from ..runtime.ranges import RANGES

#: The outermost range: one whole optimizer step.
STEP = "step"


@dataclass
class RangeTime:
    """The time of a named range, summed over its calls.

    Args:
        calls: how often it was entered.
        cpu_ms: wall-clock time on the host, in milliseconds.
        own_cpu_ms: the same without the named ranges inside it.
        device_ms: time of the kernels launched in it, in milliseconds; None without an accelerator.
        own_device_ms: the same without the kernels launched in the named ranges inside it.
    """

    calls: int = 0
    cpu_ms: float = 0.0
    own_cpu_ms: float = 0.0
    device_ms: float | None = None
    own_device_ms: float | None = None


@dataclass
class _Interval:
    """One call of a named range in a profile: times in microseconds, ``around`` from the outermost range inwards."""

    name: str
    start: float
    end: float
    around: tuple[_Interval, ...] = ()
    inside: float = 0.0
    kernels: float = 0.0


def profile_by_range(step: Callable[[], object], device: torch.device) -> dict[str, RangeTime]:
    """Return the time of one step by named range, with `STEP` for the whole.

    Args:
        step: does one optimizer step. It is called twice, and only the second call counts: the first one under a
            profiler is slow.
        device: the device it computes on.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(2):
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            with torch.autograd.profiler.record_function(STEP):
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
    return times_by_range(profiler.events() or [], device.type == "cuda")


def times_by_range(events: Iterable[Any], kernels: bool) -> dict[str, RangeTime]:
    """Return the time of each named range of a profile.

    A range counts as inside another if its time lies within the other's, also in another thread: on an accelerator
    autograd runs the backward pass in a thread of its own while the range ``backward`` waits for it. A kernel belongs
    to the innermost range in which it was launched.

    Args:
        events: what `torch.profiler.profile.events` returns.
        kernels: whether the profile has kernels of an accelerator.
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    names = {STEP, *RANGES}
    found = [_Interval(e.name, e.time_range.start, e.time_range.end) for e in on_host if e.name in names]
    found.sort(key=lambda interval: (interval.start, -interval.end))
    around: tuple[_Interval, ...] = ()
    for interval in found:
        while around and around[-1].end < interval.end:
            around = around[:-1]
        interval.around = around
        if around:
            around[-1].inside += interval.end - interval.start
        around = (*around, interval)
    if kernels:
        _add_kernels(on_host, found)
    result: dict[str, RangeTime] = {}
    device, own_device = defaultdict[str, float](float), defaultdict[str, float](float)
    for interval in found:
        time = result.setdefault(interval.name, RangeTime())
        length = (interval.end - interval.start) / 1000
        time.own_cpu_ms += length - interval.inside / 1000
        own_device[interval.name] += interval.kernels / 1000
        names_around = {outer.name for outer in interval.around}
        # a range inside another call of the same range is counted once
        if interval.name not in names_around:
            time.calls += 1
            time.cpu_ms += length
        for name in {interval.name, *names_around}:
            device[name] += interval.kernels / 1000
    for name, time in result.items():
        if kernels:
            time.device_ms, time.own_device_ms = device[name], own_device[name]
    return result


def _add_kernels(events: Iterable[Any], intervals: list[_Interval]) -> None:
    for event in events:
        launched, start = sum(kernel.duration for kernel in event.kernels), event.time_range.start
        around = [interval for interval in intervals if launched and interval.start <= start <= interval.end]
        if around:
            max(around, key=lambda interval: (interval.start, -interval.end)).kernels += launched


@dataclass(frozen=True)
class Flops:
    """The floating-point operations of the matrix products of a call; a multiply-add counts as two.

    Args:
        total: their number.
        by_operator: the number by PyTorch operator.
        not_counted: what the numbers leave out, in words.
    """

    total: int
    by_operator: dict[str, int]
    not_counted: str


#: What `count_flops` never counts: it counts matrix products and attention only.
ELEMENTWISE = "element-wise work (softmax, row pass, layer norms, the optimizer)"


def count_flops(run: Callable[[], object], *, compiled: bool = False) -> Flops:
    """Count the floating-point operations of a call with `torch.utils.flop_counter`.

    The fused head computes its gradients in the forward pass, and their matrix products are counted there. In addition
    to the operators that torch knows, oneDNN's linear layer, attention on a CPU, and products with a wider result
    dtype are counted.

    Args:
        run: the call.
        compiled: whether the model is compiled; the counter cannot see its products, and ``not_counted`` says so.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with counter:
        run()
    counts = {str(operator): int(number) for operator, number in counter.get_flop_counts().get("Global", {}).items()}
    missing = f"{ELEMENTWISE}; the compiled part of the model" if compiled else ELEMENTWISE
    return Flops(sum(counts.values()), dict(sorted(counts.items())), missing)


def _formulas() -> dict[Any, Any]:
    aten = torch.ops.aten
    found: dict[Any, Any] = {
        # torch's own formulas fail on the argument out_dtype, which the fused head passes on CUDA
        aten.mm: lambda a, b, *_, **__: mm_flop(a, b),
        aten.addmm: lambda bias, a, b, *_, **__: mm_flop(a, b),
    }
    for operators, name, formula in (
        (aten, "_scaled_dot_product_flash_attention_for_cpu", _attention),
        (aten, "_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
        (torch.ops.mkldnn, "_linear_pointwise", _linear),
    ):
        if hasattr(operators, name):
            found[getattr(operators, name)] = formula
    return found


def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return mm_flop((math.prod(x[:-1]), x[-1]), (weight[1], weight[0]))


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    products = ((length, width), (width, key[2])), ((length, key[2]), (key[2], value[3]))
    return sum(bmm_flop((batch * heads, *a), (batch * heads, *b)) for a, b in products)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # the attention scores once more, and two products for each of the two of the forward pass
    batch, heads, length, width = query
    scores = bmm_flop((batch * heads, length, width), (batch * heads, width, key[2]))
    return scores + 2 * _attention(query, key, value)
