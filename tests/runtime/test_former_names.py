"""Modules that moved are the same objects under their former names."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import dpsm_hf
from dpsm_hf.runtime.former_names import MOVED


@pytest.mark.parametrize("former", sorted(MOVED))
def test_a_former_name_gives_the_module_of_today(former: str) -> None:
    today = importlib.import_module(f"dpsm_hf.{MOVED[former]}")
    assert importlib.import_module(f"dpsm_hf.{former}") is today
    assert today.__name__ == f"dpsm_hf.{MOVED[former]}"
    assert today.__spec__ is not None and today.__spec__.name == today.__name__


def test_former_names_work_in_every_form_of_an_import_and_before_the_new_ones() -> None:
    code = (
        "from dpsm_hf.files import json_number; import dpsm_hf.profiling; from dpsm_hf import depth;"
        "from dpsm_hf.runtime import files; import dpsm_hf, sys;"
        "assert files.json_number is json_number and dpsm_hf.files is files;"
        "assert dpsm_hf.profiling.__name__ == 'dpsm_hf.measuring.profiling';"
        "assert depth.__name__ == 'dpsm_hf.evaluation.depth'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_stood_in_a_module_that_is_a_room_today_is_found_there() -> None:
    code = (
        "from dpsm_hf.campaign.audit import run_audit, table; from dpsm_hf.head import linear_scoring_loss;"
        "from dpsm_hf.plots import ReliabilityDisplay; import dpsm_hf, dpsm_hf.depth.reader;"
        "import dpsm_hf.evaluation.depth.reader as reader;"
        "assert callable(run_audit) and callable(table);"
        "assert linear_scoring_loss is dpsm_hf.linear_scoring_loss;"
        "assert ReliabilityDisplay is dpsm_hf.ReliabilityDisplay;"
        "assert dpsm_hf.depth.reader is reader and reader.__name__ == 'dpsm_hf.evaluation.depth.reader'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_stays_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"dpsm_hf\.nowhere"):
        importlib.import_module("dpsm_hf.nowhere")
    with pytest.raises(AttributeError, match="nowhere"):
        _ = dpsm_hf.nowhere
