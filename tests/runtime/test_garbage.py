"""The garbage collector is paused for a block alone, however that ends, and stays off where it was off."""

from __future__ import annotations

import gc

import pytest

from dpsm_hf.runtime.garbage import collector_paused


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_is_as_it_was_after_a_pause(before: bool) -> None:
    enabled = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled() == before
        with pytest.raises(ValueError, match="within"), collector_paused():
            raise ValueError("within")
        assert gc.isenabled() == before
    finally:
        (gc.enable if enabled else gc.disable)()
