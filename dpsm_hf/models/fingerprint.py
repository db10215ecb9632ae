"""What tells whether a model computes the same as before, at next to no cost."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .language_model import core_model


def fingerprint(model: nn.Module) -> Any:
    """Return what differs, by ``==``, once the weights of a model were written to or its adapters switched.

    A write in place raises a tensor's version, unless it goes through ``.data`` or an optimizer kernel: so three
    numbers of every tensor are read too. Whoever writes to a single weight that way is not seen.

    Args:
        model: wrapped or not.
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
    """Return the first, the middle and the last number of every tensor that this process has as a whole."""
    # Of a shard, processes would see different things, and one of them might begin to fit alone.
    whole = [p.detach() for p in parameters if p.numel() and not p.is_meta and not isinstance(p, DTensor)]
    whole = [values for values in whole if values.is_floating_point() and values.element_size() > 1]
    by_device: dict[torch.device, list[Tensor]] = {}
    for values in whole:
        places = torch.tensor([0, values.numel() // 2, values.numel() - 1], device=values.device)
        by_device.setdefault(values.device, []).append(values.take(places).float())
    # as bytes, for NaN is not equal to itself
    return [torch.cat(parts).cpu().numpy().tobytes() for parts in by_device.values()]
