"""--freeze_layers: a run whose frozen layers' outputs are kept on disk gives what the same run without that gives."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.campaign.spec.script_arguments import check_name, refusals
from dpsm_hf.models.frozen_layers import FrozenLayers
from dpsm_hf.runtime.mistakes import exit_status
from dpsm_hf.tasks.language_modelling import LanguageModelling
from dpsm_hf.tasks.summarization import Summarization
from dpsm_hf.training import frozen_states
from dpsm_hf.training.frozen_states import FOLDER_NAME, FrozenStates
from tests.damage import cut, flipped
from tests.tasks.clm_run import real_texts, write
from tests.tasks.frozen_run import FROZEN, UPPER, arguments, counted, run, same, save_models, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def kept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the Llama with its cache."""
    out = tmp_path_factory.mktemp("kept") / "out"
    run(base, "llama", out)
    return out


def figures(metrics: dict[str, float]) -> dict[str, float]:
    timed = ("seconds", "per_second", "runtime", "frozen_cache")
    return {key: value for key, value in metrics.items() if not any(part in key for part in timed)}


def parts(folder: Path) -> dict[str, int]:
    """The files of a cache with the time of their last change."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")}


# ---- the same result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_two_shuffled_epochs_are_equal_bit_for_bit_and_run_the_upper_layer_alone(
    model: str, base: Path, tmp_path: Path
) -> None:
    with counted(model) as calls_without:
        without = run(base, model, tmp_path / "off", frozen_cache="off")
    with counted(model) as calls_with:
        with_cache = run(base, model, tmp_path / "on")
    assert same(weights(tmp_path / "off"), weights(tmp_path / "on"))
    assert figures(without) == figures(with_cache)
    history = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("off", "on")
    ]
    assert [figures(entry) for entry in history[0]] == [figures(entry) for entry in history[1]]
    assert len(set(calls_without())) == 1
    # The upper layer runs in 20 steps, 3 evaluations of 3 batches, and twice in the comparison at the first batch. The
    # others run for the 10 rows and 3 batches that are kept, once to see what they put out, and twice for that, too.
    lower, _, upper = calls_with()
    assert upper - lower == (20 + 9 + 2) - (10 + 3 + 1 + 2), calls_with()
    before, after = weights(base / model), weights(tmp_path / "on")
    assert before.keys() == after.keys()
    assert torch.equal(before[FROZEN[model]], after[FROZEN[model]])
    assert not torch.equal(before[UPPER[model]], after[UPPER[model]])
    assert with_cache["train_frozen_cache_mb"] > 0
    assert "train_frozen_cache_mb" not in without


def test_it_is_the_training_of_a_model_whose_lower_parameters_take_no_gradient(
    base: Path, kept: Path, tmp_path: Path
) -> None:
    # Llama has no dropout: frozen by hand in an ordinary run of the script's own rows
    task = LanguageModelling.parse(arguments(base, "llama", tmp_path, freeze_layers=None))
    task.load_data()
    tokenizer = task.load_tokenizer(task.training_texts)
    model = task.load_model(tokenizer)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not key.startswith(("model.embed", "model.layers.0.", "model.layers.1.")))
    rows, collator = task.prepare_rows(tokenizer, model)
    task.make_trainer(model, tokenizer, rows, collator).train()
    assert same(weights(kept), {key: value.detach() for key, value in model.state_dict().items()})


def test_larger_batches_accumulation_and_lora_agree(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_r": 2,
                               "lora_target_modules": "all-linear", "fit_temperature": True}  # fmt: skip
    found = [
        run(base, "llama", tmp_path / name, frozen_cache=name, **options) for name in ("off", str(tmp_path / "c"))
    ]
    one, two = weights(tmp_path / "off"), weights(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    assert one.keys() == two.keys()
    assert all("layers.2." in key for key in one), "adapters above the frozen layers alone"
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, msg=key)
    assert found[1]["eval_nll"] == pytest.approx(found[0]["eval_nll"], rel=1e-5)
    assert found[1]["eval_nll_scaled"] == pytest.approx(found[0]["eval_nll_scaled"], rel=1e-5)


def test_an_interrupted_run_goes_on_exactly(base: Path, kept: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 7}
    with pytest.raises(SystemExit):
        run(base, "llama", tmp_path, stop_at_step=13, **saving)
    assert (tmp_path / "checkpoint-7").is_dir()
    before = parts(tmp_path / FOLDER_NAME)
    run(base, "llama", tmp_path, **saving)
    assert parts(tmp_path / FOLDER_NAME) == before
    assert same(weights(tmp_path), weights(kept))


def test_going_on_with_another_number_of_frozen_layers_is_named(base: Path, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 7, "resume_strict": True}
    with pytest.raises(SystemExit):
        run(base, "llama", tmp_path, stop_at_step=8, **saving)
    with pytest.raises(ValueError, match="freeze_layers was 2 and is 1"):
        run(base, "llama", tmp_path, freeze_layers=1, **saving)


# ---- sharing, damage, removal --------------------------------------------------------------------------------------


def test_another_rule_and_seed_share_the_files_and_another_number_has_its_own(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    run(base, "llama", tmp_path / "one", frozen_cache=cache, scoring_rule="ce")
    before = parts(cache)
    assert before
    with caplog.at_level(logging.INFO, "dpsm_hf"):
        run(base, "llama", tmp_path / "two", frozen_cache=cache, scoring_rule="brier", seed=7, log_level="info")
    assert f"are in {cache} already" in caplog.text
    assert parts(cache) == before
    run(base, "llama", tmp_path / "three", frozen_cache=cache, freeze_layers=1)
    after = parts(cache)
    assert before.items() < after.items()
    assert not (tmp_path / "one" / FOLDER_NAME).exists()
    run(base, "llama", tmp_path / "four", frozen_cache=cache, freeze_layers=1, remove_frozen_cache=True)
    assert parts(cache) == before
    run(base, "llama", tmp_path / "five", frozen_cache=cache, remove_frozen_cache=True)
    assert not cache.exists()


def test_what_is_evaluated_at_the_end_is_shared_where_the_folder_is_named(base: Path, tmp_path: Path) -> None:
    test_file = write(tmp_path, "txt", real_texts()[40:43], name="test")  # other rows than those trained on
    options: dict[str, Any] = {
        "test_file": test_file, "do_predict": True, "max_predict_samples": 8, "evaluate_best": True,
        "save_strategy": "epoch", "eval_strategy": "epoch", "fit_temperature": True, "block_size": 16,
    }  # fmt: skip
    found, calls = {}, {}
    for name in ("first", "second"):
        with counted("llama") as calls_of:
            found[name] = run(base, "llama", tmp_path / name, frozen_cache=tmp_path / "cache", **options)
            calls[name] = calls_of()
    off = run(base, "llama", tmp_path / "off", frozen_cache="off", **options)
    assert figures(found["second"]) == figures(found["first"])
    for key, value in figures(off).items():
        assert found["first"][key] == pytest.approx(value, rel=1e-5), key
    # No evaluation of the second run runs the frozen layers: they run twice as they are frozen, once to see what they
    # put out, and twice in the comparison at the first batch.
    assert calls["second"][0] == 2 + 1 + 2 < calls["first"][0], calls


@pytest.mark.parametrize("damage", [flipped("states.safetensors"), cut("states.safetensors"), shutil.rmtree])
def test_a_damaged_part_is_found_by_its_hash_and_computed_again(
    damage: Any, base: Path, kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(kept / FOLDER_NAME, cache)
    before = parts(cache)
    folders = [path for path in sorted(cache.iterdir()) if path.is_dir()]
    damage(folders[0])
    with caplog.at_level(logging.WARNING, "dpsm_hf"):
        run(base, "llama", tmp_path / "out", frozen_cache=cache)
    assert ("is missing or damaged" in caplog.text) is (damage is not shutil.rmtree)
    assert same(weights(tmp_path / "out"), weights(kept))
    after = parts(cache)
    untouched = {path for path, changed in before.items() if after[path] == changed}
    assert untouched == {path for path in before if not path.startswith(f"{folders[0]}{os.sep}")}


def test_a_draft_that_a_killed_process_left_is_not_taken(base: Path, kept: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(kept / FOLDER_NAME, cache)
    folder = next(path for path in cache.iterdir() if path.is_dir())
    folder.rename(cache / f".{folder.name}.draft")
    run(base, "llama", tmp_path / "out", frozen_cache=cache)
    assert folder.is_dir()
    assert not (cache / f".{folder.name}.draft").exists()
    assert same(weights(tmp_path / "out"), weights(kept))


def test_small_parts_make_the_same_training(
    base: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_states, "_PART_BYTES", 3 * 24 * 32 * 4)
    run(base, "llama", tmp_path)
    assert len([path for path in (tmp_path / FOLDER_NAME).iterdir() if path.is_dir()]) == 4 + 3
    assert same(weights(tmp_path), weights(kept))


def test_a_disk_without_room_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(frozen_states.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match=r"2 frozen layers take 384 tokens x 32 float32 numbers, 0\.0 MB.*1\.0 MB free"):
        run(base, "llama", tmp_path)
    assert not parts(tmp_path / FOLDER_NAME)


# ---- rows that are not kept, and errors ----------------------------------------------------------------------------


def trainer_of(base: Path, out: Path, folder: Path | None, side: str, **options: Any) -> DPSMTrainer:
    """A trainer by hand, on rows of several lengths that the collator pads batch by batch."""
    tokenizer = AutoTokenizer.from_pretrained(base / "llama", padding_side=side)
    lines = [line for line in (base / "train.txt").read_text().splitlines() if len(line) > 30][:12]
    ids = tokenizer(lines, truncation=True, max_length=40)["input_ids"]
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    assert len({len(row) for row in ids}) > 4
    model = AutoModelForCausalLM.from_pretrained(base / "llama")
    args = DPSMConfig(output_dir=str(out), use_cpu=True, per_device_train_batch_size=4, num_train_epochs=2,
                      learning_rate=0.01, logging_steps=1, save_strategy="no", **options)  # fmt: skip
    layers = FrozenLayers(model, 2)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = DPSMTrainer(model=model, args=args, train_dataset=rows, data_collator=collator)
    trainer.frozen_states = FrozenStates(layers, folder)
    return trainer


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_padded_batch_by_batch(side: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = []
    for folder in (None, tmp_path / "cache"):
        trainer = trainer_of(base, tmp_path, folder, side)
        with counted("llama") as calls:
            trainer.train()
        trained.append(({k: v.detach().clone() for k, v in trainer.model.state_dict().items()}, calls()))
    (one, _), (two, with_cache) = trained
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6, msg=key)
    if side == "right":
        assert "are not kept" not in caplog.text
        assert with_cache[0] < with_cache[-1], "the frozen layers run in fewer batches than the upper one"
    else:
        # with other rows beside it a row begins at another position, so it may be another one to the lower layers
        assert "pad on the left" in caplog.text


def test_a_stream_runs_the_frozen_layers(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"streaming": True, "max_steps": 6, "num_train_epochs": None, "eval_strategy": None}
    run(base, "llama", tmp_path / "off", frozen_cache="off", **options)
    with caplog.at_level(logging.WARNING, "dpsm_hf"):
        run(base, "llama", tmp_path / "on", **options)
    assert "A stream has no rows to know again" in caplog.text
    assert same(weights(tmp_path / "off"), weights(tmp_path / "on"))


def test_outputs_that_are_not_the_model_s_stop_the_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = FrozenStates._kept
    monkeypatch.setattr(FrozenStates, "_kept", lambda self, inputs: own(self, inputs) * 1.01)
    with pytest.raises(ValueError, match=r"kept outputs .* differ .*frozen_cache off"):
        run(base, "llama", tmp_path)


def test_frozen_weights_that_were_changed_stop_the_training(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path, tmp_path / "cache", "right")
    trainer.train()
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.up_proj.weight.mul_(2)  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="are others than those whose outputs were kept"):
        trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha, which changes the embeddings"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"bf16_full_eval": True}, "bf16_full_eval or fp16_full_eval, .*keep no outputs of them"),
        ({"torch_compile": True}, r"torch_compile: leave it out, or keep no outputs of them \(frozen_cache off\)"),
    ],
)
def test_what_does_not_go_with_it_is_named(options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(base, tmp_path, tmp_path / "cache", "right", **options)


def test_gradient_checkpointing_gives_the_same(base: Path, kept: Path, tmp_path: Path) -> None:
    run(base, "llama", tmp_path, gradient_checkpointing=True)
    assert same(weights(tmp_path), weights(kept))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_layers": 4}, "--freeze_layers 4: freeze_layers=4: LlamaForCausalLM has 3 layers"),
        ({"freeze_layers": 0}, "--freeze_layers 0 must be at least 1"),
        ({"freeze_layers": None, "frozen_cache": "x"}, "--frozen_cache has no effect without --freeze_layers"),
        ({"do_train": None}, "--freeze_layers 2 concerns training and needs --do_train"),
        ({"remove_frozen_cache": True, "frozen_cache": "off"}, "--remove_frozen_cache has nothing to delete"),
        ({"model_name_or_path": None, "model_type": "gpt2", "tokenizer_name": "train-bpe"}, "of a pretrained model"),
        ({"lora_r": 2, "lora_modules_to_save": "embed_tokens"}, "the adapter trains .*embed_tokens"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(base, "llama", tmp_path, **options)


def test_summarisation_and_campaigns_say_whose_option_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--freeze_layers", "2", "--output_dir", str(tmp_path)]
    assert exit_status(lambda: Summarization.main(words)) == 2
    assert "freeze_layers is an option of dpsm clm alone" in capsys.readouterr().err
    assert "option of dpsm clm alone" in (check_name("summarization", "freeze_layers") or "")
    assert check_name("language-modelling", "freeze_layers") is None
    given = {
        "model_name_or_path": "smollm2-135m",
        "dataset_name": "python-docs",
        "do_train": True,
        "freeze_layers": 26,
    }
    assert refusals("language-modelling", given) == []
    assert refusals("language-modelling", {**given, "do_train": False}) != []
