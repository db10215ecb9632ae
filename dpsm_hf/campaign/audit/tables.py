"""The figures of an audit: what follows from its samples, and one row a variation for a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...measuring.processes import spread


def summarise(content: dict[str, Any]) -> None:
    """Fill in the figures of each variation that follow from what was measured, None where something is missing.

    Args:
        content: of ``audit.json``; changed in place.
    """
    entries = content["variations"]
    base = entries.get(content["reference"], {}).get("peak_memory_mb")
    for entry in entries.values():
        seconds = [sample["seconds"] for sample in entry["samples"]]
        ratios = [s["seconds"] / s["reference_seconds"] for s in entry["samples"] if s["reference_seconds"]]
        for name, values in (("seconds_per_step", seconds), ("ratio", ratios)):
            entry[name] = spread(values) if values else None
        median = entry["seconds_per_step"]["median"] if seconds else None
        entry["tokens_per_second"] = content["settings"]["tokens"] / median if median else None
        peak = entry.get("peak_memory_mb")
        known = peak is not None and base is not None
        entry["peak_memory_difference_mb"] = peak - base if known else None
        gpu = (entry.get("sustained") or {}).get("gpu") or entry.get("gpu") or {}
        steps = (entry.get("sustained") or {}).get("steps") or gpu.get("steps")
        joules = gpu.get("joules")
        entry["utilisation_percent"] = gpu.get("utilisation_percent")
        entry["joules_per_step"] = joules / steps if joules is not None and steps else None
        entry["gpu_note"] = gpu.get("note", "not measured")


def table(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each variation, for a report; what was not measured is None.

    Args:
        content: of ``audit.json``.

    Returns:
        Rows with ``variation``, ``title``, ``status``, ``message``, ``seconds_per_step`` (median; ``..._p10``,
        ``..._p90``), ``ratio`` against the reference (likewise), ``tokens_per_second``, ``peak_memory_mb``,
        ``peak_memory_difference_mb``, ``gflops_per_step``, ``head_share`` (of the time of a step, 0 to 1),
        ``utilisation_percent``, ``joules_per_step``, ``sustained_tokens_per_second`` and ``device``.
    """
    rows = []
    for name, entry in content["variations"].items():
        row = {key: entry.get(key) for key in ("title", "status", "message")}
        for key in ("seconds_per_step", "ratio"):
            figures = entry.get(key) or {}
            row |= {key: figures.get("median"), f"{key}_p10": figures.get("p10"), f"{key}_p90": figures.get("p90")}
        for key in ("tokens_per_second", "peak_memory_mb", "peak_memory_difference_mb", "utilisation_percent",
                    "joules_per_step"):  # fmt: skip
            row[key] = entry.get(key)
        flops = entry.get("flops")
        row["gflops_per_step"] = flops["total"] / 1e9 if flops else None
        row["head_share"] = _share(entry.get("profile") or {}, "head")
        row["sustained_tokens_per_second"] = (entry.get("sustained") or {}).get("tokens_per_second")
        rows.append({"variation": name, **row, "device": content["machine"]["device"]})
    return rows


def _share(profile: Mapping[str, Mapping[str, float | None]], name: str) -> float | None:
    """Return a range's share of a step: of the kernels' time where there are kernels, else of the thread's."""
    if name not in profile or "step" not in profile:
        return None
    kind = "device_ms" if profile["step"]["device_ms"] else "cpu_ms"
    whole, part = profile["step"][kind], profile[name][kind]
    return part / whole if whole and part is not None else None
