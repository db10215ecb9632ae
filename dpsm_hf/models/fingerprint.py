"""A cheap fingerprint of a model's weights, to see whether they have changed."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .language_model import core_model


def fingerprint(model: nn.Module) -> Any:
    """Return a value that differs once weights were written to or adapters were switched.

    An in-place write raises a tensor's version counter, except through ``.data`` and in fused optimizer kernels;
    therefore three numbers of every tensor are compared as well. A write through ``.data`` that leaves these three
    numbers as they are is not noticed.

    Args:
        model: the language model, possibly wrapped.
    """
    core = core_model(model)
    parameters = list(core.parameters())
    versions = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
    adapters = [
        (tuple(module.active_adapters), bool(module.disable_adapters))
        for module in core.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    return versions, adapters, _probes(parameters)


def _probes(parameters: list[nn.Parameter]) -> list[bytes]:
    """Return the first, middle and last number of every tensor that is not sharded, one byte string per device."""
    # Shards are left out: processes would see different numbers, and only some might decide to refit a temperature.
    whole = [p.detach() for p in parameters if p.numel() and not p.is_meta and not isinstance(p, DTensor)]
    whole = [values for values in whole if values.is_floating_point() and values.element_size() > 1]
    by_device: dict[torch.device, list[Tensor]] = {}
    for values in whole:
        places = torch.tensor([0, values.numel() // 2, values.numel() - 1], device=values.device)
        by_device.setdefault(values.device, []).append(values.take(places).float())
    # as bytes, because NaN does not equal itself
    return [torch.cat(parts).cpu().numpy().tobytes() for parts in by_device.values()]
