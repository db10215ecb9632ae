"""outcome.json and the options behind it, in both scripts, with tiny models on the text that Python carries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm_dpsm
import run_summarization_dpsm
from dpsm_hf import TemperatureScaler
from dpsm_hf.data.python_text import load_python_docstrings
from dpsm_hf.tasks.language_modelling import LanguageModelling

COMMON: dict[str, Any] = {
    "tokenizer_name": "train-bpe",
    "tokenizer_vocab_size": 300,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 0.03,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "disable_tqdm": True,
    "log_level": "warning",
    "scoring_rule": "ce",
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "fit_temperature": True,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_strategy": "steps",
    "save_steps": 5,
    "save_total_limit": 2,
    "logging_steps": 3,
    "evaluate_best": True,
    "sample_outputs": 2,
}
# a few rows, learned by heart within some dozen steps
CLM: dict[str, Any] = {
    **COMMON,
    "dataset_name": "python-docs",
    "model_type": "gpt2",
    "config_overrides": "n_embd=32,n_layer=1,n_head=2,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
    "block_size": 48,
    "max_train_samples": 8,
    "max_eval_samples": 12,
    "max_predict_samples": 10,
    "max_steps": 200,
    "early_stopping_patience": 2,
    "extra_eval_datasets": ["docstrings=python-docstrings"],
}
BART = (
    "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16,"
    "encoder_attention_heads=2,decoder_attention_heads=2"
)
SUMMARIES: dict[str, Any] = {
    **COMMON,
    "dataset_name": "python-docstrings",
    "model_type": "bart",
    "config_overrides": BART,
    "max_source_length": 32,
    "max_target_length": 12,
    "max_train_samples": 48,
    "max_eval_samples": 6,
    "max_predict_samples": 5,
    "learning_rate": 0.02,
    "max_steps": 15,
    "predict_with_generate": True,
    "metric_for_best_model": "eval_nll",
    "greater_is_better": False,
}
SPLITS = ("validation", "test", "docstrings")


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    results: dict[str, float]
    outcome: dict[str, Any]


def words(folder: Path, options: dict[str, Any]) -> list[str]:
    found = []
    for name, value in {"output_dir": folder, **options}.items():
        if value is not None:
            found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def run(main: Callable[[list[str]], dict[str, float]], folder: Path, options: dict[str, Any]) -> Run:
    results = main(words(folder, options))
    return Run(folder, results, json.loads((folder / "outcome.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def clm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A language model that stopped early, with its best checkpoint behind it."""
    return run(run_clm_dpsm.main, tmp_path_factory.mktemp("clm"), CLM)


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pairs under other column names, behind a column that is neither."""
    path = tmp_path_factory.mktemp("pairs") / "articles.jsonl"
    rows = load_python_docstrings()["test"].select(range(7))
    lines = [json.dumps({"id": i, "body": row["document"], "line": row["summary"]}) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory, articles: Path) -> Run:
    """A model of summaries, evaluated on a further file too."""
    extra = [f"articles={articles},text=body,summary=line"]
    folder = tmp_path_factory.mktemp("summaries")
    options = {**SUMMARIES, "extra_eval_datasets": extra, "cache_dir": articles.parent / "cache"}
    return run(run_summarization_dpsm.main, folder, options)


# ---- what is in it -------------------------------------------------------------------------------------------------


def check_against_results(found: Run, prefixes: dict[str, str]) -> None:
    """Every figure of outcome.json is the one that was logged under its prefix."""
    metrics = found.outcome["metrics"]
    assert set(metrics) == {"last", "best"}
    for checkpoint, splits in metrics.items():
        assert set(splits) == set(prefixes)
        for split, figures in splits.items():
            prefix = prefixes[split] if checkpoint == "last" else f"best_{prefixes[split]}"
            logged = {
                key.removeprefix(f"{prefix}_"): value
                for key, value in found.results.items()
                if key.startswith(f"{prefix}_")
            }
            assert figures == logged and figures["ece_15_low"] <= figures["ece_15"] <= figures["ece_15_high"]
            assert "nll_scaled" in figures and figures["samples"] > 0
            key = split if checkpoint == "last" else f"best-{split}"
            record = found.outcome["calibration"][key]
            assert record["metrics"]["ece_15"] == figures["ece_15"] and record["split"] == prefix
            assert record["temperature"] == figures["temperature"]


def test_the_figures_of_a_language_model(clm: Run) -> None:
    check_against_results(clm, {"validation": "eval", "test": "test", "docstrings": "docstrings"})
    assert clm.results["perplexity"] == clm.results["eval_perplexity"], "not that of the best checkpoint"


def test_the_figures_of_summaries(summaries: Run) -> None:
    check_against_results(summaries, {"validation": "eval", "test": "predict", "articles": "articles"})
    figures = summaries.outcome["metrics"]
    for checkpoint in ("last", "best"):
        assert [figures[checkpoint][split]["samples"] for split in ("validation", "test", "articles")] == [6, 5, 5]
        assert all("rougeL" in split and "gen_len" in split for split in figures[checkpoint].values())


def test_the_efficiency(clm: Run, summaries: Run) -> None:
    for found, per_step in ((clm, 4), (summaries, 4)):
        efficiency = found.outcome["efficiency"]
        history = json.loads((found.folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        clocks = [v for entry in history for k, v in entry.items() if k.endswith("train_seconds")]
        assert efficiency["train_seconds"] == max(clocks) == found.results["train_seconds"]
        assert efficiency["train_seconds"] < found.results["train_runtime"] / 2, (
            "half a second of drawing an evaluation"
        )
        speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
        assert len(speeds) >= 3 and efficiency["tokens_per_second"] == pytest.approx(float(np.median(speeds)))
        assert efficiency["steps"] == max(entry["step"] for entry in history)
        assert efficiency["peak_device_memory_mb"] is None and per_step == COMMON["per_device_train_batch_size"]
    layer, head = 12 * 32**2, 300 * 32
    formula = 6 * (layer + head) * 4 * 48 + 12 * 32 * 48**2 * 4
    assert clm.outcome["efficiency"]["flops_per_step"] == formula
    # less than 6 a token and weight: the encoder's tokens do not meet the decoder's weights
    assert summaries.outcome["efficiency"]["flops_per_step"] > 6 * 300 * 16 * 4 * 4


def test_an_outcome_belongs_to_a_run_that_ended(clm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outcome.json").write_text("{}")
    monkeypatch.setattr(LanguageModelling, "model_card", lambda *arguments: 1 / 0)
    options = {**CLM, "max_steps": 1, "evaluate_best": None, "extra_eval_datasets": None, "do_predict": None}
    with pytest.raises(ZeroDivisionError):
        run_clm_dpsm.main(words(tmp_path, options))
    assert not (tmp_path / "outcome.json").exists()


# ---- early stopping, best and last ---------------------------------------------------------------------------------


def test_training_stops_early_and_keeps_the_best(clm: Run) -> None:
    history = json.loads((clm.folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    values = {entry["step"]: entry["eval_nll"] for entry in history if "eval_nll" in entry}
    best = min(values, key=values.__getitem__)
    assert clm.outcome["best_step"] == best
    assert max(values) == best + 2 * 5 < CLM["max_steps"]
    # a limit of two checkpoints, the best and the last to resume from
    assert {path.name for path in clm.folder.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (best, best + 10)
    }
    assert clm.outcome["metrics"]["best"]["validation"]["nll"] == pytest.approx(values[best], rel=1e-6)
    assert clm.outcome["metrics"]["last"]["validation"]["nll"] == pytest.approx(values[best + 10], rel=1e-6)
    files = {path.name for path in (clm.folder / "calibration").glob("*.json")}
    assert {f"best_test-step-{best:06d}.json", f"test-step-{best + 10:06d}.json"} <= files


def test_best_and_last_equal_separate_evaluations(clm: Run, tmp_path: Path) -> None:
    """Of the checkpoint and of the model that was saved: figures, temperatures and what is scaled by them."""
    best = clm.folder / f"checkpoint-{clm.outcome['best_step']}"
    names = ("nll", "brier", "ece_15", "token_accuracy", "temperature", "nll_scaled", "ece_15_scaled")
    for checkpoint, model in (("last", clm.folder), ("best", best)):
        options = {
            **{name: CLM[name] for name in ("dataset_name", "block_size", "max_eval_samples", "max_predict_samples")},
            **{name: COMMON[name] for name in ("use_cpu", "disable_tqdm", "log_level", "do_eval", "do_predict")},
            **{"model_name_or_path": model, "fit_temperature": True, "per_device_eval_batch_size": 3},
        }
        alone = run(run_clm_dpsm.main, tmp_path / checkpoint, options)
        figures = clm.outcome["metrics"][checkpoint]
        for split in ("validation", "test"):
            separate = alone.outcome["metrics"]["last"][split]
            assert {n: separate[n] for n in names} == pytest.approx({n: figures[split][n] for n in names}, rel=1e-5)
        assert alone.outcome["efficiency"] == dict.fromkeys(clm.outcome["efficiency"])
        assert TemperatureScaler.load(model).temperature == figures["test"]["temperature"]
    figures = clm.outcome["metrics"]
    assert figures["best"]["test"]["nll"] < figures["last"]["test"]["nll"]
    assert figures["best"]["test"]["temperature"] != figures["last"]["test"]["temperature"]


def test_best_by_a_score_of_texts(tmp_path: Path) -> None:
    options = {**SUMMARIES, "metric_for_best_model": "eval_rouge1", "greater_is_better": None, "save_strategy": "best"}
    found = run(run_summarization_dpsm.main, tmp_path, {**options, "save_steps": None, "fit_temperature": None})
    history = json.loads((found.folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    values = {entry["step"]: entry["eval_rouge1"] for entry in history if "eval_rouge1" in entry}
    assert found.outcome["best_step"] == max(values, key=values.__getitem__)
    assert found.outcome["metrics"]["best"]["validation"]["rouge1"] == max(values.values())
    assert "temperature" not in found.outcome["metrics"]["best"]["test"]


def test_loaded_best_weights_are_not_called_the_last(tmp_path: Path) -> None:
    options = {
        **{**CLM, "max_steps": 10, "learning_rate": 1.0, "load_best_model_at_end": True},
        **dict.fromkeys(("evaluate_best", "extra_eval_datasets", "do_predict", "early_stopping_patience")),
        **{"metric_for_best_model": "eval_nll", "greater_is_better": False},
    }
    found = run(run_clm_dpsm.main, tmp_path, options)
    assert found.outcome["best_step"] == 5 and found.outcome["efficiency"]["steps"] == 10
    assert set(found.outcome["metrics"]) == {"best"} and set(found.outcome["documents"]) == {"best-validation"}
    history = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    at_five = next(entry["eval_nll"] for entry in history if entry["step"] == 5 and "eval_nll" in entry)
    assert found.outcome["metrics"]["best"]["validation"]["nll"] == pytest.approx(at_five, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"early_stopping_patience": 1}, {"max_steps": 7, "early_stopping_patience": None}],
    ids=["stopped", "ended"],
)
def test_a_kill_between_training_and_evaluation(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again does not train on, and finds out what it would have found out."""
    wanted = {**CLM, "do_predict": None, "extra_eval_datasets": None, **options}
    whole = run(run_clm_dpsm.main, tmp_path / "whole", wanted)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LanguageModelling, "evaluate", killed)
        run_clm_dpsm.main(words(tmp_path / "killed", wanted))
    before = json.loads((tmp_path / "killed" / "all_results.json").read_text(encoding="utf-8"))
    # a folder that was moved in between: the path of the best checkpoint in the state is of no use
    (tmp_path / "killed").rename(tmp_path / "moved")
    again = run(run_clm_dpsm.main, tmp_path / "moved", wanted)
    volatile = ("runtime", "per_second", "seconds", "preparation_time")
    for checkpoint in ("last", "best"):
        one, two = (
            {k: v for k, v in found.outcome["metrics"][checkpoint]["validation"].items() if not k.endswith(volatile)}
            for found in (whole, again)
        )
        assert one == two and one["nll"] > 0
    for name in ("best_step", "samples", "documents"):
        assert again.outcome[name] == whole.outcome[name]
    efficiency, first = again.outcome["efficiency"], whole.outcome["efficiency"]
    assert (efficiency["steps"], efficiency["flops_per_step"]) == (first["steps"], first["flops_per_step"])
    assert 0.9 * before["train_seconds"] - 0.1 < efficiency["train_seconds"] <= before["train_seconds"]
    results = json.loads((tmp_path / "moved" / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] == before["train_loss"], "the mean of no step has taken its place"


# ---- further sets --------------------------------------------------------------------------------------------------


def test_a_further_set_has_the_temperature_of_the_calibration_split(clm: Run, tmp_path: Path) -> None:
    for figures in clm.outcome["metrics"].values():
        assert len({figures[split]["temperature"] for split in SPLITS}) == 1
    scaler = TemperatureScaler.load(clm.folder)
    assert scaler.split == "calibration"
    assert clm.outcome["metrics"]["last"]["docstrings"]["temperature"] == scaler.temperature
    # as if it were the test split of a run of its own
    options = {
        **{name: COMMON[name] for name in ("use_cpu", "disable_tqdm", "log_level", "do_predict")},
        **{"model_name_or_path": clm.folder, "dataset_name": "python-docstrings", "block_size": 48},
        "max_predict_samples": 10,
    }
    alone = run(run_clm_dpsm.main, tmp_path, options).outcome["metrics"]["last"]["test"]
    found = clm.outcome["metrics"]["last"]["docstrings"]
    names = ("nll", "tokens", "ece_15", "samples")
    assert {n: alone[n] for n in names} == pytest.approx({n: found[n] for n in names}, rel=1e-5)


@pytest.mark.parametrize("boundary", [None, "row"])
def test_lines_of_a_book_are_not_documents(boundary: str | None, tmp_path: Path) -> None:
    """In a text file documents end at blank lines, also beside data whose rows are documents, said so or not."""
    book = tmp_path / "book.txt"
    text = load_python_docstrings()["test"]["document"][0].splitlines()
    book.write_text("\n".join(["a line of text"] * 30 + ["", *text]), encoding="utf-8")
    options = {**CLM, "max_steps": 1, "evaluate_best": None, "early_stopping_patience": None, "do_predict": None,
               "extra_eval_datasets": [f"book={book}"], "document_boundary": boundary}  # fmt: skip
    found = run(run_clm_dpsm.main, tmp_path / "out", {**options, "cache_dir": tmp_path / "cache"})
    figures = found.outcome["metrics"]["last"]["book"]
    assert figures["eos_tokens"] <= 2 < figures["tokens"] / 15


# ---- texts and documents -------------------------------------------------------------------------------------------


def test_samples_are_greedy_continuations_of_fixed_prompts(clm: Run) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(clm.folder), AutoModelForCausalLM.from_pretrained(clm.folder)
    samples = clm.outcome["samples"]
    assert len(samples) == 2
    for sample in samples:
        prompt = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        assert prompt.shape[1] == 24 and len(tokenizer(sample["reference"])["input_ids"]) == 24
        ids = prompt
        with torch.no_grad():
            for _ in range(24):
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1)[:, None]], dim=1)
                if int(ids[0, -1]) == model.config.eos_token_id:
                    break
        assert sample["output"] == tokenizer.decode(ids[0, 24:], skip_special_tokens=True)


def test_samples_are_the_first_predictions(summaries: Run) -> None:
    lines = (summaries.folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 5 and len(summaries.outcome["samples"]) == 2
    for sample, prediction in zip(summaries.outcome["samples"], predictions, strict=False):
        assert sample["reference"] == prediction["reference"] and sample["output"] == prediction["prediction"]
        assert sample["prompt"] == prediction["document"][:400]


def documents(found: Run, name: str) -> dict[str, np.ndarray]:
    assert found.outcome["documents"][name] == f"documents/{name}.npz"
    with np.load(found.folder / found.outcome["documents"][name]) as arrays:
        return dict(arrays)


def test_sums_by_block_make_the_figures(clm: Run, summaries: Run) -> None:
    for found in (clm, summaries):
        assert set(found.outcome["documents"]) == {
            f"{checkpoint}-{split}" for checkpoint, splits in found.outcome["metrics"].items() for split in splits
        }
        for checkpoint, splits in found.outcome["metrics"].items():
            for split, figures in splits.items():
                sums = documents(found, f"{checkpoint}-{split}")
                for suffix in ("", "_scaled"):
                    count, correct = sums[f"count{suffix}"], sums[f"correct{suffix}"]
                    assert count.shape == correct.shape == sums[f"confidence{suffix}"].shape == (128, 15)
                    assert count.sum() == figures["tokens"]
                    for name in ("nll", "brier", "spherical"):
                        assert sums[name + suffix].shape == (128,)
                        mean = sums[name + suffix].sum() / count.sum()
                        assert mean == pytest.approx(figures[name + suffix], rel=1e-12)
                    gaps = np.abs((correct - sums[f"confidence{suffix}"]).sum(0)).sum() / count.sum()
                    assert gaps == pytest.approx(figures[f"ece_15{suffix}"], rel=1e-9)
                assert (sums["count"].sum(1) > 0).sum() == figures["samples"], "a row of this few is a block"
                assert list(np.flatnonzero(sums["count"].sum(1))) == list(range(figures["samples"]))


def test_blocks_of_two_runs_belong_together(clm: Run, summaries: Run) -> None:
    for found in (clm, summaries):
        for split in found.outcome["metrics"]["last"]:
            last, best = (documents(found, f"{checkpoint}-{split}") for checkpoint in ("last", "best"))
            assert np.array_equal(last["count"].sum(1), best["count"].sum(1))
            assert last["labels"] == best["labels"] and len(str(last["labels"])) == 64
            same_weights = found.outcome["best_step"] == found.outcome["efficiency"]["steps"]
            assert np.array_equal(last["nll"], best["nll"]) == same_weights
        assert documents(found, "last-validation")["labels"] != documents(found, "last-test")["labels"]


def test_figures_that_are_not_finite_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = LanguageModelling.evaluate
    monkeypatch.setattr(LanguageModelling, "evaluate", lambda *a: evaluate(*a) | {"eval_perplexity": math.inf})
    options = {**CLM, "max_steps": 1, "evaluate_best": None, "extra_eval_datasets": None, "do_predict": None}
    found = run(run_clm_dpsm.main, tmp_path, {**options, "sample_outputs": 0})
    assert found.outcome["metrics"]["last"]["validation"]["perplexity"] is None
    assert found.outcome["samples"] == [] and "corruption" not in found.outcome


# ---- what is refused before anything is loaded ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (run_clm_dpsm.main, {**CLM, "eval_strategy": "no", "eval_steps": None}, "needs evaluations during training"),
        (run_clm_dpsm.main, {**CLM, "load_best_model_at_end": True}, "leave out --load_best_model_at_end"),
        (run_clm_dpsm.main, {**CLM, "extra_eval_datasets": ["eval=python-docs"]}, "choose a name"),
        (run_clm_dpsm.main, {**CLM, "extra_eval_datasets": ["a=python-docs,summary=b"]}, "has no summaries"),
        (run_clm_dpsm.main, {**CLM, "extra_eval_datasets": ["a=python-docs,text=b"]}, "'b' is not a column of the a"),
        (run_summarization_dpsm.main, {**SUMMARIES, "predict_with_generate": None}, "pass --predict_with_generate"),
        (
            run_summarization_dpsm.main,
            {**SUMMARIES, "extra_eval_datasets": ["a=python-docs,summary=gist"]},
            "a=python-docs: .*gist",
        ),
    ],
)
def test_what_is_refused(main: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(words(tmp_path, options))
    assert not (tmp_path / "checkpoint-5").exists()
