"""Two and four real processes (gloo) count what one process counts, on streams and uneven sets too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import cases
from tests.distributed.calibration_worker import CASES
from tests.distributed.processes import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The results of every case in two and in four processes."""
    results: dict[Any, Any] = results_of(
        "calibration_worker", tmp_path_factory.mktemp("calibration"), processes=request.param
    )
    assert results["processes"] == request.param
    return results


@pytest.fixture(scope="module")
def single() -> dict[Any, Any]:
    """The same on one process."""
    return {case: cases.evaluate_panel(*case[:3], streaming=case[3]) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_view_equals_one_process(case: Any, several: Any, single: Any) -> None:
    one, many = single[case], several[case]
    for view, tensors in one["views"].items():
        for name, tensor in tensors.items():
            found = many["views"][view][name]
            if tensor.dtype == torch.int64:
                # also by block: a sample is the same document wherever it is evaluated
                assert torch.equal(found, tensor), (view, name)
            else:
                torch.testing.assert_close(found, tensor, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert one["views"]["eos"]["count"].sum() > 0 and one["views"]["frequency"]["labels"].sum() > 0
    assert {"scaled by brier", "scaled by gap"} <= set(one["views"])
    assert ("generated" in one["views"]) == (case[0] == "bart")
    assert set(many["metrics"]) == set(one["metrics"])
    # Trainer's own loss is a mean of the means of batches
    exact = {key: value for key, value in one["metrics"].items() if key != "eval_loss"}
    assert {key: many["metrics"][key] for key in exact} == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_temperature_is_that_of_one_process(case: Any, several: Any, single: Any) -> None:
    one, many = single[case]["scaler"], several[case]["scaler"]
    assert many.tokens == one.tokens and many.passes == one.passes
    assert many.temperature == pytest.approx(one.temperature, rel=1e-9)
    assert set(many.others) == set(one.others) == {"brier", "gap"}
    assert many.others == pytest.approx(one.others, rel=1e-9)
    assert many.nll_before == pytest.approx(one.nll_before, rel=1e-12)
