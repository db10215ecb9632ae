"""Styles and files that all pictures share."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dpsm_hf.plots.figures import OKABE_ITO, empty_figure, run_style, run_styles, save_figure


def test_drawing_never_imports_pyplot() -> None:
    code = (
        "import sys; from dpsm_hf.plots.reliability import ReliabilityDisplay as R;"
        "R.from_curve({'edges': [0, 1], 'confidence': [.5], 'accuracy': [.5], 'count': [3]}).plot();"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    # only the package's own files: libraries may import pyplot for themselves
    prelude = "import sys, types, pathlib; p = types.ModuleType('dpsm_hf'); p.__path__ = ['dpsm_hf']; "
    subprocess.run([sys.executable, "-c", prelude + "sys.modules['dpsm_hf'] = p; " + code], check=True)


def test_no_two_runs_of_a_picture_look_alike() -> None:
    def look(style: dict[str, Any]) -> tuple[str, str]:
        return style["color"], style["marker"]

    for names in (["ce", "x", "y"], ["x", "ce", "dpsm"], [f"run {i}" for i in range(14)]):
        assert len({look(style) for style in run_styles(names)}) == len(names)
        assert len({(style["color"], str(style["linestyle"])) for style in run_styles(names)}) == len(names)
    named = dict(zip(["x", "ce", "dpsm"], run_styles(["x", "ce", "dpsm"]), strict=True))
    assert named["ce"] == run_style("ce", 0) and named["dpsm"] == run_style("dpsm", 5)
    assert run_styles(["cross-entropy", "DPSM"]) == run_styles(["ce", "dpsm"])
    assert [style["color"] for style in run_styles(["x", "y", "z"])] == [OKABE_ITO[5], OKABE_ITO[6], OKABE_ITO[0]]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_numbers_give_the_same_file(tmp_path: Any, ending: str) -> None:
    pictures = []
    for name in ("one", "two"):
        figure = empty_figure()
        ax = figure.add_subplot()
        ax.bar([0, 1], [1, 2], hatch="//")
        ax.plot([0, 1], [1, 2], "o")
        pictures.append(save_figure(figure, tmp_path / f"{name}.{ending}").read_bytes())
    assert pictures[0] == pictures[1]
