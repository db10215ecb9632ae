"""Energy and utilisation through NVML: from the counter, from power samples, or reported as not measured."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpsm_hf.measuring.energy import GpuMeter, integrate

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MISSING = ("counter", "power", "utilisation")


class FakeNvml:
    """A GPU at a known power, on a clock that each reading of the power moves by a tenth of a second.

    Args:
        missing: what this GPU does not answer: counter, power, utilisation, start, device.
        watts: power over time.
    """

    class NVMLError(Exception):
        pass

    def __init__(self, *missing: str, watts: Any = lambda seconds: 100.0) -> None:
        self.missing, self.watts = missing, watts
        self.now, self.starts, self.stops, self.asked = 10.0, 0, 0, ""
        self.enough = threading.Event()
        self.readings = 0

    def _refuse(self, what: str) -> None:
        if what in self.missing:
            raise self.NVMLError("Not Supported")

    def clock(self) -> float:
        return self.now

    def nvmlInit(self) -> None:
        self._refuse("start")
        self.starts += 1

    def nvmlShutdown(self) -> None:
        self.stops += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._refuse("device")
        self.asked = uuid
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        self._refuse("counter")
        return int(1000 * 123 * (self.now - 10.0)) + 5_000_000  # 123 W, not what the power says

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._refuse("power")
        milliwatts = int(1000 * self.watts(self.now - 10.0))
        self.now += 0.1
        self.readings += 1
        if self.readings >= 20:
            self.enough.set()
        return milliwatts

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._refuse("utilisation")
        if "power" in self.missing:
            self.now += 0.1
            self.enough.set()
        return SimpleNamespace(gpu=80, memory=10)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="1234-5678")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def measure(nvml: FakeNvml) -> Any:
    with GpuMeter(CUDA, interval=0.001, nvml=nvml, clock=nvml.clock) as meter:
        assert nvml.enough.wait(20)
    assert nvml.starts == nvml.stops == 1 and nvml.asked == "GPU-1234-5678"
    assert threading.active_count() < 50 and not any(t.name == "gpu-meter" for t in threading.enumerate())
    return meter.reading


def test_the_counter_is_preferred() -> None:
    found = measure(FakeNvml())
    assert found.source == "counter" and found.note == ""
    assert found.joules == pytest.approx(123 * found.seconds, rel=1e-3)
    assert found.watts == pytest.approx(123, rel=1e-3)
    assert found.utilisation_percent == 80 and found.samples >= 20 and found.seconds >= 1.9


def test_without_a_counter_power_is_integrated() -> None:
    nvml = FakeNvml("counter", watts=lambda seconds: 50 + 20 * seconds)
    found = measure(nvml)
    assert found.source == "power samples"
    end = (found.samples - 1) * 0.1  # the samples are a tenth of a second apart
    assert found.joules == pytest.approx(50 * end + 10 * end**2, rel=1e-4)
    assert found.utilisation_percent == 80


def test_what_is_missing_is_none_and_said() -> None:
    found = measure(FakeNvml("counter", "power"))
    assert (found.joules, found.watts, found.source) == (None, None, None)
    assert found.utilisation_percent == 80 and found.note == "energy not measured: Not Supported"
    nvml = FakeNvml("utilisation")
    found = measure(nvml)
    assert found.utilisation_percent is None and found.joules > 0
    assert found.note == "utilisation not measured: Not Supported"


def test_a_counter_that_begins_anew_is_not_believed() -> None:
    nvml = FakeNvml()
    values = iter([9_000_000, 4_000_000])
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(values)  # type: ignore[method-assign]
    found = measure(nvml)
    assert found.source == "power samples" and found.joules == pytest.approx(100 * (found.samples - 1) * 0.1)


@pytest.mark.parametrize(
    ("device", "nvml", "note"),
    [
        (CPU, FakeNvml(), "not measured: no NVIDIA GPU"),
        (CUDA, FakeNvml("start"), "not measured: NVML does not start (Not Supported)"),
        (CUDA, FakeNvml("device"), "not measured: NVML does not know the GPU (Not Supported)"),
    ],
)
def test_where_nothing_can_be_measured_nothing_is_zero(device: torch.device, nvml: FakeNvml, note: str) -> None:
    with GpuMeter(device, nvml=nvml) as meter:
        pass
    found = meter.reading
    assert found.note == note and found.samples == 0 and nvml.starts == nvml.stops
    assert (found.joules, found.watts, found.utilisation_percent, found.seconds) == (None,) * 4


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuMeter(CUDA) as meter:
        pass
    assert meter.reading.joules is None and "pip install 'dpsm_hf[energy]'" in meter.reading.note


def test_an_error_in_the_work_ends_the_measurement() -> None:
    nvml = FakeNvml()
    with pytest.raises(KeyError), GpuMeter(CUDA, interval=0.001, nvml=nvml, clock=nvml.clock):
        raise KeyError
    assert nvml.stops == 1 and not any(t.name == "gpu-meter" for t in threading.enumerate())


def test_the_integral_is_that_of_the_trapezoids() -> None:
    assert integrate([(0.0, 10.0), (2.0, 30.0), (2.5, 30.0)]) == 40.0 + 15.0
    assert integrate([(0.0, 10.0)]) == integrate([]) == 0.0
    with pytest.raises(ValueError, match="interval=0 must be a positive"):
        GpuMeter(CUDA, interval=0)
