"""The notebooks run from top to bottom, and lie there with the outputs that a run gives."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks are run where the extra docs is installed")
nbclient = pytest.importorskip("nbclient", reason="notebooks are run where the extra docs is installed")

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: The one that reads a pretrained model.
WITH_SMOLLM2 = "read_a_reliability_diagram"


def numbers(cell: Any) -> list[float]:
    """Return the numbers that a cell shows as text, in their order; the sizes of pictures are none."""
    texts = [
        output.get("text", "") if "text" in output else output.get("data", {}).get("text/plain", "")
        for output in cell.get("outputs", ())
        if output.get("name") != "stderr"
    ]
    shown = "\n".join(text for text in texts if not text.startswith("<Figure"))
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", shown)]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_it_says(path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if path.stem == WITH_SMOLLM2:
        request.getfixturevalue("smollm2")
    notebook = nbformat.read(path, as_version=4)
    made_by = notebook.metadata["language_info"]["version"]
    kept = [{output["output_type"] for output in cell.get("outputs", ())} for cell in notebook.cells]
    kept_numbers = [numbers(cell) for cell in notebook.cells]
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises at the first cell that fails
    # what is on standard error differs from machine to machine
    made = [
        {output["output_type"] for output in cell.get("outputs", ()) if output.get("name") != "stderr"}
        for cell in notebook.cells
    ]
    assert kept == made and any(made)
    assert sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))
    if made_by == platform.python_version():  # another version brings other docstrings
        # A training carries the order of sums, another on each processor, into the second digit: an ECE or a gap
        # differed by up to 0.014 between four instruction sets, everything else by less than 2 %.
        for cell, before in zip(notebook.cells, kept_numbers, strict=True):
            assert numbers(cell) == pytest.approx(before, rel=0.05, abs=0.015), cell.source
