"""run_clm_dpsm.py from command line to results, on real text with a tiny GPT-2."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import run_clm_dpsm
from dpsm_hf import DPSMTrainer
from dpsm_hf.tasks import language_modelling
from tests.tasks.clm_run import TINY, argv, real_texts, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def texts():
    return real_texts()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, texts):
    """A finished tiny run on a local file: (its folder, the file)."""
    folder = tmp_path_factory.mktemp("saved")
    path = write(folder, "jsonl", texts)
    run_clm_dpsm.main(argv(folder, train_file=path, do_train=True, max_steps=1))
    return folder / "out", path


def test_python_docs_train_evaluate_and_test(tmp_path):
    results = run_clm_dpsm.main(
        argv(
            tmp_path,
            dataset_name="python-docs",
            do_train=True,
            do_eval=True,
            do_predict=True,
            max_predict_samples=6,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=2,
        )
    )
    out = tmp_path / "out"
    assert math.isclose(results["perplexity"], math.exp(results["eval_nll"]), rel_tol=1e-9)
    assert results["eval_perplexity"] == results["perplexity"] != math.exp(results["eval_loss"])
    assert 0 <= results["eval_ece_15"] <= 1 and 0 <= results["test_brier"] <= 2
    assert (results["train_samples"], results["eval_samples"], results["test_samples"]) == (40, 12, 6)
    assert results["eval_tokens"] == 12 * 47  # each row of 48 tokens scores 47
    for name in (
        "train_results.json",
        "eval_results.json",
        "test_results.json",
        "all_results.json",
        "trainer_state.json",
    ):
        assert (out / name).is_file()
    assert json.loads((out / "all_results.json").read_text())["perplexity"] == results["perplexity"]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["alpha"] for entry in losses] == [0, 1, 1]  # the ramp is 10 % of 3 steps, at least one
    assert {"nll", "brier", "token_accuracy", "confidence"} <= set(losses[0])
    card = (out / "README.md").read_text()
    assert "python-docs" in card
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2 and model.config.pad_token_id == 1
    assert tokenizer.decode(tokenizer("Return  the sum .")["input_ids"]) == "Return  the sum ."


@pytest.mark.parametrize("extension", ["txt", "csv", "json", "jsonl", "parquet", "txt.gz"])
def test_local_files(tmp_path, cache, texts, extension):
    """Training and validation from a file; the validation split is cut from train where it has no file."""
    train = write(tmp_path, extension, texts)
    own = {"validation_file": write(tmp_path, extension, texts[:20], "valid")} if extension == "csv" else {}
    results = run_clm_dpsm.main(
        argv(tmp_path, train_file=train, do_train=True, do_eval=True, max_steps=1, cache_dir=cache, **own)
    )
    assert results["eval_tokens"] > 0 and math.isfinite(results["train_loss"])


@pytest.mark.parametrize("source", ["python-docs", "file"])
def test_streaming(tmp_path, cache, texts, source):
    data = (
        {"dataset_name": "python-docs"}
        if source == "python-docs"
        else {"train_file": write(tmp_path, "jsonl", texts), "validation_split_percentage": 20}
    )
    results = run_clm_dpsm.main(
        argv(
            tmp_path,
            **data,
            streaming=True,
            do_train=True,
            do_eval=True,
            max_steps=2,
            cache_dir=cache,
            max_train_samples=None,
        )
    )
    assert results["eval_samples"] == 12 and "train_samples" not in results


def test_streamed_and_loaded_data_give_the_same_evaluation(tmp_path, saved, cache):
    """The same model on the same rows, so the same sums."""
    model, path = saved
    options = {
        "model_type": None,
        "config_overrides": None,
        "tokenizer_name": None,
        "tokenizer_vocab_size": None,
        "model_name_or_path": model,
        "validation_file": path,
        "do_eval": True,
        "cache_dir": cache,
    }
    loaded = run_clm_dpsm.main(argv(tmp_path / "a", **options))
    streamed = run_clm_dpsm.main(argv(tmp_path / "b", **options, streaming=True))
    assert loaded["eval_tokens"] == streamed["eval_tokens"]
    assert loaded["eval_nll"] == pytest.approx(streamed["eval_nll"], rel=1e-9)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_settings_from_a_file(tmp_path, cache, texts, suffix):
    settings = {
        **TINY,
        "train_file": str(write(tmp_path, "jsonl", texts)),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(cache),
        "do_train": True,
        "max_steps": 1,
        "scoring_rule": "brier",
        "learning_rate": "1e-3",
    }
    path = tmp_path / f"settings.{suffix}"
    path.write_text(json.dumps(settings) if suffix == "json" else yaml.safe_dump(settings))
    results = run_clm_dpsm.main([str(path)])
    assert 0 < results["train_loss"] < 2  # a Brier score, not a cross-entropy of about log(300)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_resume_is_automatic_and_exact(tmp_path, texts, caplog):
    """Two steps, then the same command to four: parameters bit-equal to four at once, dropout included."""
    path = write(tmp_path, "jsonl", texts)
    # A constant learning rate and alpha in steps, because both runs have to agree on them.
    common = {
        "train_file": path,
        "do_train": True,
        "save_steps": 2,
        "lr_scheduler_type": "constant",
        "alpha_warmup_steps": 3,
    }
    run_clm_dpsm.main(argv(tmp_path / "whole", **common, max_steps=4))
    run_clm_dpsm.main(argv(tmp_path / "parts", **common, max_steps=2))
    assert "training continues from there" not in caplog.text
    run_clm_dpsm.main(argv(tmp_path / "parts", **common, max_steps=4))
    assert "checkpoint-2: training continues from there" in caplog.text
    whole, parts = weights(tmp_path / "whole" / "out"), weights(tmp_path / "parts" / "out")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    run_clm_dpsm.main(argv(tmp_path / "parts", **common, max_steps=1, resume_from_checkpoint="none"))
    first = weights(tmp_path / "parts" / "out")
    assert not all(torch.equal(whole[name], first[name]) for name in whole)


def test_a_resumed_run_refuses_another_tokenizer(tmp_path, texts):
    path = write(tmp_path, "jsonl", texts)
    common = {"train_file": path, "do_train": True, "save_steps": 1}
    run_clm_dpsm.main(argv(tmp_path, **common, max_steps=1))
    with pytest.raises(ValueError, match="vocab_size 300 instead of 310"):
        run_clm_dpsm.main(argv(tmp_path, **common, max_steps=2, tokenizer_vocab_size=310))


class PressCtrlC(TrainerCallback):
    """Sends this process the signal that Ctrl-C sends, or others."""

    def __init__(self, step, times=1, signals=(signal.SIGINT,)):
        self.step, self.signals = step, signals * times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


def press(monkeypatch, *arguments):
    original = DPSMTrainer.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(PressCtrlC(*arguments))

    monkeypatch.setattr(DPSMTrainer, "__init__", patched)


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, texts, monkeypatch, caplog):
    path = write(tmp_path, "jsonl", texts)
    common = {"train_file": path, "do_train": True, "max_steps": 4, "save_strategy": "no"}
    run_clm_dpsm.main(argv(tmp_path / "whole", **common))
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press(patch, 1)
        with pytest.raises(SystemExit) as stop:
            run_clm_dpsm.main(argv(tmp_path / "parts", **common))
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    out = tmp_path / "parts" / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert "interrupted at step 2 of 4" in caplog.text and "run the same command again" in caplog.text
    run_clm_dpsm.main(argv(tmp_path / "parts", **common))
    whole, parts = weights(tmp_path / "whole" / "out"), weights(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path, texts, monkeypatch, caplog):
    press(monkeypatch, 1, 2)
    with pytest.raises(SystemExit) as stop:
        run_clm_dpsm.main(
            argv(tmp_path, train_file=write(tmp_path, "jsonl", texts), do_train=True, max_steps=4, save_strategy="no")
        )
    assert stop.value.code == 130 and "no checkpoint was saved" in caplog.text


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)])
def test_sigterm_saves_a_checkpoint_however_often_it_comes(signals, tmp_path, texts, monkeypatch, caplog):
    """Slurm sends it to all processes, and a launcher, or the runner of a campaign as Ctrl-C, passes it on."""
    before = signal.getsignal(signal.SIGTERM)
    press(monkeypatch, 1, 1, signals)
    path = write(tmp_path, "jsonl", texts)
    with pytest.raises(SystemExit) as stop:
        run_clm_dpsm.main(argv(tmp_path, train_file=path, do_train=True, max_steps=4, save_strategy="no"))
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert caplog.text.count("SIGTERM: finishing this step and saving a checkpoint") == 1
    assert "interrupted at step 2 of 4" in caplog.text and "run the same command again" in caplog.text


def test_options_reach_the_rows(tmp_path, texts, monkeypatch, cache):
    seen = {}
    original = language_modelling.prepare_clm_datasets

    def spy(raw, tokenizer, options, **kwargs):
        seen.update(dataclasses.asdict(options))
        return original(raw, tokenizer, options, **kwargs)

    monkeypatch.setattr(language_modelling, "prepare_clm_datasets", spy)
    common = {"train_file": write(tmp_path, "txt", texts), "do_train": True, "max_steps": 1, "cache_dir": cache}
    run_clm_dpsm.main(
        argv(
            tmp_path,
            **common,
            packing="batch",
            min_remainder=5,
            drop_empty_lines=True,
            unicode_nfkc=True,
            lowercase=True,
            add_eos_between_documents=True,
            preprocessing_num_workers=2,
            overwrite_cache=True,
        )
    )
    assert seen == {
        "block_size": 48,
        "packing": "batch",
        "min_remainder": 5,
        "drop_empty_lines": True,
        "unicode_nfkc": True,
        "lowercase": True,
        "add_eos_between_documents": True,
        "document_boundary": "blank_line",
    }


def test_fine_tuning_with_a_dtype(tmp_path, saved, cache):
    model, path = saved
    from_model = {"model_type": None, "config_overrides": None, "tokenizer_name": None, "tokenizer_vocab_size": None}
    run_clm_dpsm.main(
        argv(
            tmp_path,
            **from_model,
            model_name_or_path=model,
            dtype="bfloat16",
            block_size=None,
            train_file=path,
            do_train=True,
            max_steps=1,
            cache_dir=cache,
        )
    )
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_saved_configuration_with_a_new_tokenizer(tmp_path, saved, cache):
    model, path = saved
    run_clm_dpsm.main(
        argv(
            tmp_path,
            model_type=None,
            config_overrides=None,
            config_name=model,
            tokenizer_vocab_size=320,
            dtype="float32",
            train_file=path,
            do_train=True,
            max_steps=1,
            cache_dir=cache,
        )
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 320


def test_nothing_to_do_is_said(tmp_path, caplog):
    assert run_clm_dpsm.main(argv(tmp_path, dataset_name="python-docs")) == {}
    assert "nothing to do" in caplog.text


def test_the_script_runs_as_a_program(tmp_path, texts):
    path = write(tmp_path, "jsonl", texts)
    words = argv(tmp_path, train_file=path, do_train=True, do_eval=True, max_steps=2)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_clm_dpsm.py"), *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "eval_perplexity" in done.stdout
