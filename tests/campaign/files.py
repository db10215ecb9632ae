"""A small campaign's file, and what tests do with it: edit it, load it, find a run in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.spec.design import Campaign, Run
from dpsm_hf.campaign.spec.loading import SpecError, load_campaign

FILE = """\
name: try
title: A try
task: language-modelling
reference: ce
brier: brier
base:
  do_train: true
  do_eval: true
  do_predict: true
  fit_temperature: true
  dataset_name: python-docs
  max_steps: 10
  eval_strategy: steps
  eval_steps: 5
  alpha_warmup_steps: 0.1
variations:
  ce:
    title: Cross-entropy
    arguments: {scoring_rule: ce}
  brier:
    arguments: {scoring_rule: brier}
  dpsm:
    arguments: {scoring_rule: dpsm}
  late:
    role: ablation
    arguments: {scoring_rule: dpsm, alpha_schedule: late_linear}
  scaled:
    of: ce
sizes:
  tiny:
    arguments:
      model_type: gpt2
      config_overrides: n_embd=32,n_layer=1,n_head=2
      tokenizer_name: train-bpe
data:
  docs:
    arguments: {lowercase: false}
seeds: [1, 2]
studies:
  main:
    variations: all
  sweep:
    variations: [dpsm]
    grid:
      alpha_warmup_steps: [0.1, 0.2]
budget:
  limit: 1.2
  halving:
    metric: eval_nll
scales:
  small: {}
  paper:
    base: {max_steps: 1000}
    seeds: [1, 2, 3]
"""


def edit(old: str, new: str) -> str:
    """Return the file with one passage replaced."""
    assert FILE.count(old) == 1, old
    return FILE.replace(old, new)


def with_files(folder: Path, content: str = "one\n") -> str:
    """Write texts into a folder and return the file with them as its data."""
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text(content)
    (folder / "b.txt").write_text("two\n")
    files = "{train_file: ./a.txt, validation_file: b.txt, test_file: '${DPSM_TRY:-.}/b.txt'}"
    return edit("{lowercase: false}", files).replace("  dataset_name: python-docs\n", "")


def load(tmp_path: Path, text: str, *args: Any, **options: Any) -> Campaign:
    """Write a campaign's file and load it."""
    path = tmp_path / "try.yaml"
    path.write_text(text, encoding="utf-8")
    return load_campaign(path, *args, **options)


def wrong(tmp_path: Path, text: str, *args: Any, **options: Any) -> tuple[str, ...]:
    """Return what is said about a file with mistakes."""
    with pytest.raises(SpecError) as error:
        load(tmp_path, text, *args, **options)
    return error.value.problems


def run_at(campaign: Campaign, **place: Any) -> Run:
    """Return the one run at a place of the design."""
    found = {
        point.run_id for point in campaign.points if all(getattr(point, key) == value for key, value in place.items())
    }
    assert len(found) == 1
    return campaign.runs[found.pop()]
