"""TRL: `DPSMSFTTrainer` is TRL's `SFTTrainer` with a scoring rule as its loss; `DPSMSFTConfig` are its arguments.

Needs the package ``trl``, which nothing else in dpsm_hf does.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

#: The oldest version that was tested.
OLDEST = "1.16"

_PIP = f"pip install 'trl>={OLDEST},<2'"

try:
    _found = importlib.metadata.version("trl")
except importlib.metadata.PackageNotFoundError:
    raise ImportError(f"dpsm_hf.trl needs TRL, which is not installed: {_PIP}") from None
if Version(_found) < Version(OLDEST):
    raise ImportError(f"dpsm_hf.trl needs TRL {OLDEST} or newer, but {_found} is installed: {_PIP}")

from .arguments import DPSMSFTConfig  # noqa: E402  (a missing TRL is to be named first)
from .trainer import DPSMSFTTrainer  # noqa: E402

__all__ = ["DPSMSFTConfig", "DPSMSFTTrainer"]
