"""A campaign's file with a credential is refused with its line, and no message, record or file repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.cli import main
from dpsm_hf.campaign.runner.records import Record, read_record, write_record
from dpsm_hf.campaign.spec.loading import SpecError
from tests.campaign.files import FILE, edit, load

SECRET = "hf_" + "aBcDeFgHiJ" * 3
STEPS = "  max_steps: 10\n"


def said(folder: Path, text: str, **options: Any) -> str:
    with pytest.raises(SpecError) as error:
        load(folder, text, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("place", "written", "key"),
    [
        (STEPS, "token: plain-word", "base.token"),
        (STEPS, "hub_token: plain-word", "base.hub_token"),
        (STEPS, "token: ${HF_TOKEN}", "base.token"),
        (STEPS, "token: '${HF_TOKEN:-none}'", "base.token"),
        (STEPS, "cache_dir: /data/${MY_PASSWORD}", "base.cache_dir"),
        (STEPS, "model_revision: ${INNOCENT}", "base.model_revision"),
        (STEPS, f"model_revision: {SECRET}", "base.model_revision"),
        (STEPS, "train_file: https://me:plain-word@example.org/a.json", "base.train_file"),
        (STEPS, "lr_scheduler_kwargs: {deep: [{api_key: plain-word}]}", "base.lr_scheduler_kwargs.deep.api_key"),
        (STEPS, "accelerator_config: {credentials: {user: plain-word}}", "base.accelerator_config.credentials.user"),
        (STEPS, "no_argument: {password: plain-word}", "base.no_argument.password"),
    ],
)
def test_a_credential_is_refused_with_its_line(
    place: str, written: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("INNOCENT", SECRET)
    monkeypatch.setenv("MY_PASSWORD", "plain-word")
    text = edit(place, f"{place}  {written}\n")
    message = said(tmp_path, text)
    line = text.splitlines().index(f"  {written}") + 1
    assert f":{line}: {key}: looks like a credential" in message and "hf auth login" in message
    assert SECRET not in message and "plain-word" not in message


def test_all_places_of_a_file_are_looked_at(tmp_path: Path) -> None:
    text = edit("    base: {max_steps: 1000}\n", "    base: {hub_token: plain-word}\n")  # of the other scale
    text = text.replace("    arguments: {lowercase: false}\n", "    arguments: {token: plain-word}\n")
    text += f"# {SECRET}\n"
    message = said(tmp_path, text)
    assert "scales.paper.base.hub_token: looks like" in message and "data.docs.arguments.token: looks like" in message
    assert f":{len(text.splitlines())}: this line holds what looks like a credential" in message
    assert SECRET not in message and "plain-word" not in message


@pytest.mark.parametrize("change", ["base.token=plain-word", "base.hub_token=[plain-word", f"base.optim={SECRET}"])
def test_a_change_of_the_command_line_is_looked_at(change: str, tmp_path: Path) -> None:
    message = said(tmp_path, FILE, overrides=[change])
    assert SECRET not in message and "plain-word" not in message


@pytest.mark.parametrize(
    "written", ["use_fast_tokenizer: true", "tokenizer_vocab_size: 300", "chunk_tokens: 64", "token: null"]
)
def test_what_only_sounds_like_one_is_taken(written: str, tmp_path: Path) -> None:
    assert load(tmp_path, edit(STEPS, f"{STEPS}  {written}\n")).runs


def test_entries_may_have_such_names(tmp_path: Path) -> None:
    text = FILE.replace("  docs:\n", "  secret:\n")
    assert {point.data for point in load(tmp_path, text).points} == {"secret"}


def test_the_command_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "try.yaml"
    file.write_text(edit(STEPS, f"{STEPS}  hub_token: {SECRET}\n"))
    for step in ("plan", "run", "status", "report"):
        assert main([step, str(file), "--output_dir", str(tmp_path / "out")]) == 2
    out = capsys.readouterr()
    assert SECRET not in out.out + out.err and "looks like a credential" in out.err
    assert not (tmp_path / "out").exists()


def test_a_record_keeps_no_credential(tmp_path: Path) -> None:
    record = Record("a", "b", "language-modelling", {"hub_token": "plain-word", "optim": "sgd"},
                    message=f"401 for https://me:plain-word@example.org with {SECRET}")  # fmt: skip
    path = write_record(record, tmp_path)
    assert SECRET not in path.read_text() and "plain-word" not in path.read_text()
    assert read_record(path).arguments == {"hub_token": "***", "optim": "sgd"}
