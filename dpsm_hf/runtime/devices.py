"""What a device can compute with: everywhere but on MPS there is float64."""

from __future__ import annotations

import torch


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 tensors of a device live: there, or on the host where it has none (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest float of a device, for sums that must not wait for the host."""
    return torch.float32 if device.type == "mps" else torch.float64
