"""Measure energy and utilisation of an NVIDIA GPU through NVML (the extra ``energy``).

A value that cannot be read is None, never zero, with a note that says why. NVML measures the whole GPU, so other
programs on it are included.
"""

from __future__ import annotations

import importlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Seconds between two samples of power and utilisation; NVML updates them about ten times a second.
INTERVAL = 0.1


@dataclass(frozen=True)
class GpuReading:
    """The energy and the utilisation of a GPU during a measurement.

    Args:
        seconds: wall-clock time of the measurement.
        joules: energy; None where it was not measured.
        source: ``counter`` (the GPU's own total), ``power samples`` (their integral over time) or None.
        watts: mean power, energy over time.
        utilisation_percent: mean share of time in which a kernel ran.
        samples: how often power and utilisation were read.
        note: why a value was not measured; empty if all were.
    """

    seconds: float | None = None
    joules: float | None = None
    source: str | None = None
    watts: float | None = None
    utilisation_percent: float | None = None
    samples: int = 0
    note: str = ""


class GpuMeter:
    """Measure energy and utilisation of a GPU during a context.

    The GPU's own energy counter is used if it has one (Volta and later); without it, samples of its power are
    integrated by the trapezoidal rule. The counter is updated about ten times a second, so measure for some seconds.

    Example::

        with GpuMeter(torch.device("cuda")) as meter:
            train()
        print(meter.reading.joules)

    Args:
        device: the device that works; only CUDA is measured.
        interval: seconds between samples.
        nvml: the module ``pynvml``; None imports it.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        interval: float = INTERVAL,
        nvml: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not interval > 0:
            raise ValueError(f"interval={interval} must be a positive number of seconds.")
        self.reading = GpuReading(note="not measured: the measurement has not ended")
        self._device, self._interval, self._nvml, self._clock = device, interval, nvml, clock
        self._handle: Any = None
        self._why = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._power: list[tuple[float, float]] = []
        self._use: list[float] = []
        self._counter: float | None = None
        self._started = 0.0

    def __enter__(self) -> GpuMeter:
        self._handle, self._why = self._open()
        self._started = self._clock()
        if self._handle is not None:
            self._counter = self._read_counter()
            self._sample(use=False)  # utilisation read now would be that of the time before
            self._thread = threading.Thread(target=self._watch, name="gpu-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            self.reading = GpuReading(note=f"not measured: {self._why}")
            return
        self._stop.set()
        self._thread.join()
        self._sample()
        self.reading = self._conclude(self._read_counter(), self._clock() - self._started)
        self._nvml.nvmlShutdown()

    def _open(self) -> tuple[Any, str]:
        """Return NVML's handle of the GPU, or None and why there is none."""
        if self._device.type != "cuda":
            return None, "no NVIDIA GPU"
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError:
                return None, "nvidia-ml-py is not installed (pip install 'dpsm_hf[energy]')"
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            return None, f"NVML does not start ({error})"
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(gpu_uuid(self._device)), ""
        except self._nvml.NVMLError as error:
            self._nvml.nvmlShutdown()
            return None, f"NVML does not know the GPU ({error})"

    def _read(self, function: Callable[[Any], Any]) -> Any:
        """Return what a function of NVML returns for this GPU; None if the GPU does not support it."""
        try:
            return function(self._handle)
        except self._nvml.NVMLError as error:
            self._why = self._why or str(error)
            return None

    def _read_counter(self) -> float | None:
        millijoules = self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    def _sample(self, use: bool = True) -> None:
        milliwatts = self._read(self._nvml.nvmlDeviceGetPowerUsage)
        if milliwatts is not None:
            self._power.append((self._clock(), milliwatts / 1000))
        rates = self._read(self._nvml.nvmlDeviceGetUtilizationRates) if use else None
        if rates is not None:
            self._use.append(float(rates.gpu))

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _conclude(self, counter: float | None, seconds: float) -> GpuReading:
        joules, source = None, None
        # the counter restarts from 0 when the driver is reloaded
        if self._counter is not None and counter is not None and counter > self._counter:
            joules, source = counter - self._counter, "counter"
        elif len(self._power) > 1:
            joules, source = integrate(self._power), "power samples"
        use = sum(self._use) / len(self._use) if self._use else None
        missing = [name for name, found in (("energy", joules), ("utilisation", use)) if found is None]
        note = f"{' and '.join(missing)} not measured: {self._why or 'no sample'}" if missing else ""
        watts = joules / seconds if joules is not None and seconds > 0 else None
        return GpuReading(seconds, joules, source, watts, use, len(self._power), note)


def integrate(samples: Sequence[tuple[float, float]]) -> float:
    """Return the integral of samples ``(seconds, watts)`` over time in joules, by the trapezoidal rule."""
    return sum((later - earlier) * (low + high) / 2 for (earlier, low), (later, high) in itertools.pairwise(samples))


def gpu_uuid(device: torch.device) -> str:
    """Return a GPU's UUID in NVML's spelling; its index may differ, since NVML ignores CUDA_VISIBLE_DEVICES."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
