"""Scripts that go on from a checkpoint: damaged, of weights alone, of other data; and folders that are no folders."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import run_clm_dpsm
import run_summarization_dpsm
from dpsm_hf import DPSMTrainer
from dpsm_hf.tasks import task
from dpsm_hf.tasks.checkpoints import detect_checkpoint
from tests.damage import DAMAGES, cut, emptied, lost
from tests.tasks.clm_run import argv, real_texts, write
from tests.tasks.summarization_run import DOCSTRINGS, FRESH_BART, TRAIN_BPE, arguments

COMMON = {"do_train": True, "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the texts and a run of six steps, checkpoints at 2, 4, 6."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, "jsonl", real_texts())
    run_clm_dpsm.main(argv(folder, train_file=folder / "train.jsonl", **COMMON))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of its folder, as if killed after step 4."""
    shutil.copytree(whole / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    (tmp_path / "out" / "outcome.json").unlink()
    return tmp_path


def weights(folder):
    return load_file(folder / "model.safetensors")


def found(run, strict=False, **options):
    args = TrainingArguments(output_dir=str(run / "out"), use_cpu=True, do_train=True, **options)
    return detect_checkpoint(args, strict=strict)


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_found(kind, run, caplog):
    damage, name = DAMAGES[kind]
    damage(run / "out" / "checkpoint-4")
    assert found(run) == str(run / "out" / "checkpoint-2")
    assert "checkpoint-4 is incomplete or damaged" in caplog.text and name in caplog.text
    with pytest.raises(ValueError, match=f"--resume_strict.*checkpoint-4.*{name}.*newest sound one.*checkpoint-2"):
        found(run, strict=True)


def test_a_damaged_checkpoint_costs_steps_and_no_bit(run, whole, caplog):
    emptied("optimizer.pt")(run / "out" / "checkpoint-4")
    command = argv(run, train_file=whole / "train.jsonl", **COMMON)
    with pytest.raises(ValueError, match=r"--resume_strict: .*checkpoint-4.*optimizer\.pt is empty"):
        run_clm_dpsm.main([*command, "--resume_strict"])
    run_clm_dpsm.main(command)
    assert "checkpoint-2: training continues from there" in caplog.text
    one, other = weights(run / "out"), weights(whole / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_runner_is_told_the_step_that_was_really_gone_on_from(run, whole, monkeypatch):
    monkeypatch.setattr(task, "end_with_runner", lambda: None)  # this process is no child of a runner
    command = argv(run, train_file=whole / "train.jsonl", **{**COMMON, "max_steps": 4})
    run_clm_dpsm.main(command)
    assert not (run / "out" / "started.json").exists()  # nobody has asked
    monkeypatch.setenv("DPSM_RUNNER_PID", "1")
    emptied("optimizer.pt")(run / "out" / "checkpoint-4")
    run_clm_dpsm.main(command)
    assert json.loads((run / "out" / "started.json").read_text()) == {"from_step": 2}


def test_the_other_script_passes_a_damaged_one_over_too(tmp_path, caplog):
    more = [*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--do_train", "--save_strategy", "steps", "--save_steps", "1"]
    run_summarization_dpsm.main(arguments(tmp_path / "out", *more))
    before = weights(tmp_path / "out")
    cut("model.safetensors")(tmp_path / "out" / "checkpoint-2")
    run_summarization_dpsm.main(arguments(tmp_path / "out", *more))
    assert "model.safetensors cannot be read" in caplog.text and "checkpoint-1: training continues" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "out").items())


def test_nothing_but_damaged_ones_begins_anew_with_a_word(run, caplog):
    for step in (2, 4):
        cut("model.safetensors")(run / "out" / f"checkpoint-{step}")
    assert found(run) is None
    assert "There is no older sound one" in caplog.text
    with pytest.raises(ValueError, match="there is no complete checkpoint in .*cannot be read"):
        found(run, resume_from_checkpoint="last")


def test_weights_alone_are_gone_on_from_only_when_asked_for(run, whole, caplog):
    for step in (2, 4):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            lost(name)(run / "out" / f"checkpoint-{step}")
    command = argv(run, train_file=whole / "train.jsonl", **COMMON)
    with pytest.raises(ValueError, match=r"checkpoint-4 has weights, but .* lacks optimizer\.pt.*--save_only_model"):
        run_clm_dpsm.main(command)
    with pytest.raises(ValueError, match="not a complete checkpoint: it lacks"):
        run_clm_dpsm.main([*command, "--resume_from_checkpoint", str(run / "out" / "checkpoint-4"), "--resume_strict"])
    run_clm_dpsm.main([*command, "--resume_from_checkpoint", str(run / "out" / "checkpoint-4")])
    assert "What is missing begins anew" in caplog.text


def test_other_data_and_settings_are_said_with_both_values(whole, tmp_path, caplog):
    fixed = {**COMMON, "max_steps": 3, "tokenizer_name": whole / "out", "tokenizer_vocab_size": None}
    run_clm_dpsm.main(argv(tmp_path, train_file=whole / "train.jsonl", **fixed))
    other = write(tmp_path, "jsonl", real_texts()[3:], name="other")
    changed = argv(tmp_path, train_file=other, **{**fixed, "max_steps": 4, "learning_rate": 0.002})
    with pytest.raises(ValueError, match=r"train_file was train\.jsonl \(sha256:.* and is other\.jsonl \(sha256:"):
        run_clm_dpsm.main([*changed, "--resume_strict"])
    run_clm_dpsm.main(changed)
    assert "learning_rate was 0.01 and is 0.002" in caplog.text and "train_data was 40 rows" in caplog.text
    facts = (tmp_path / "out" / "checkpoint-2" / "run_facts.json").read_text()
    assert str(tmp_path) not in facts and str(whole) not in facts


def test_another_optimizer_is_refused_before_training(run, whole):
    with pytest.raises(ValueError, match=r"of another optimizer: it was torch\.optim\.adamw\.AdamW and is .*SGD"):
        run_clm_dpsm.main(argv(run, train_file=whole / "train.jsonl", **COMMON, optim="sgd"))


@pytest.mark.parametrize("script", [run_clm_dpsm, run_summarization_dpsm])
def test_a_file_as_output_folder_is_named(script, tmp_path, whole):
    (tmp_path / "out").write_text("a file")
    words = {
        run_clm_dpsm: argv(tmp_path, train_file=whole / "train.jsonl", **COMMON),
        run_summarization_dpsm: arguments(tmp_path / "out", *DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--do_train"),
    }
    for inside in ("", "/deeper"):
        line = [f"{word}{inside}" if word == str(tmp_path / "out") else word for word in words[script]]
        with pytest.raises(NotADirectoryError, match=r"--output_dir .*out.* is a file, not a folder"):
            script.main(line)
    assert (tmp_path / "out").read_text() == "a file"


class FillDisk(TrainerCallback):
    """A limit of the length of files stands in for a full disk: what is written stops in the middle."""

    def __init__(self, length: int) -> None:
        self.length = length

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.length, resource.RLIM_INFINITY))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(name, run, whole, monkeypatch):
    command = argv(run, train_file=whole / "train.jsonl", **COMMON, save_total_limit=1)
    length = (run / "out" / "checkpoint-4" / name).stat().st_size - 1000
    original = DPSMTrainer.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(FillDisk(length))

    with monkeypatch.context() as patch:
        patch.setattr(DPSMTrainer, "__init__", patched)
        try:
            with pytest.raises(OSError, match="checkpoint-6 could not be written: .*checkpoint-4 is whole"):
                run_clm_dpsm.main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run_clm_dpsm.main(command)
    one, other = weights(run / "out"), weights(whole / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)
