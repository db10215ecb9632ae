"""What /proc/cpuinfo says, and what is said where there is none."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpsm_hf.runtime.processor import processor_fact, processor_name

TEXT = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC: 9654\n\nvendor_id\t: Other\n"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    processor_fact.cache_clear()
    yield
    processor_fact.cache_clear()


def test_the_first_core_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: TEXT)
    assert processor_fact("vendor_id") == "AuthenticAMD" and processor_fact("model") is None
    assert processor_name() == "AMD EPYC: 9654"


def test_a_system_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert processor_fact("vendor_id") is None
    assert processor_name() == (platform.processor() or platform.machine())
