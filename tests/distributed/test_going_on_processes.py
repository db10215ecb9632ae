"""Two processes go on from the same sound checkpoint, and stop together where one of them has a NaN gradient."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.distributed.processes import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the worker has found."""
    return results_of("resuming_worker", tmp_path_factory.mktemp("resuming"))


def test_a_damaged_random_state_of_one_process_costs_steps_and_no_bit(results: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results["whole"], results["resumed"], strict=True))
    assert json.loads(results["facts"])["facts"]["processes"] == 2


def test_all_processes_stop_before_the_optimizer(results: Any) -> None:
    for said in results["said"]:
        assert "gradient is nan at optimizer step 3" in said and "weights finite: True" in said


def test_a_stream_goes_on_in_its_second_pass(results: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results["straight"], results["again"], strict=True))
