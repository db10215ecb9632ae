"""A run with tokens: neither its files nor its log lines hold one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.clm_run import TINY, argv, real_texts, write

ROOT = Path(__file__).resolve().parents[2]
TOKENS = {"token": "hf_" + "aBcDeFgHiJ" * 3, "hub_token": "plain-hub-token", "HF_TOKEN": "hf_" + "kLmNoPqRsT" * 3}


@pytest.mark.parametrize("way", ["command line", "settings file"])
def test_tokens_are_in_no_file_and_no_log(way: str, tmp_path: Path) -> None:
    options = {"train_file": write(tmp_path, "jsonl", real_texts()), "do_train": True, "max_steps": 2, "save_steps": 1,
               "token": TOKENS["token"], "hub_token": TOKENS["hub_token"], "log_level": "info"}  # fmt: skip
    words = argv(tmp_path, **options)
    if way == "settings file":
        settings = {**TINY, **options, "output_dir": tmp_path / "out"}
        (tmp_path / "settings.json").write_text(json.dumps(settings, default=str))
        words = [str(tmp_path / "settings.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_clm_dpsm.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": TOKENS["HF_TOKEN"]},
        capture_output=True,
        check=True,
    )
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "outcome.json", "run_facts.json"} <= {path.name for path in files}
    for secret in TOKENS.values():
        assert secret.encode() not in done.stdout + done.stderr
        assert not [path for path in files if secret.encode() in path.read_bytes()]
