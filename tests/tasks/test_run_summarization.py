"""run_summarization_dpsm.py through its `main`: tiny models trained for a few steps on real docstrings."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from dpsm_hf import DPSMSeq2SeqTrainer
from dpsm_hf.data.python_text import load_python_docstrings
from dpsm_hf.tasks import task
from dpsm_hf.tasks.summarization import DataTrainingArguments, ModelArguments
from run_summarization_dpsm import main
from tests.tasks.summarization_run import DOCSTRINGS, FRESH_BART, TRAIN_BPE, arguments


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """One full run, kept with its checkpoints: 4 steps from scratch, evaluation and prediction with generation."""
    folder = tmp_path_factory.mktemp("trained")
    results = main(
        arguments(
            folder,
            *DOCSTRINGS,
            *FRESH_BART,
            *TRAIN_BPE,
            *("--do_train", "--do_eval", "--do_predict", "--predict_with_generate", "--num_beams", "2"),
            *("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--min_source_words", "50"),
        )
    )
    return folder, results


@pytest.fixture(scope="module")
def docstrings() -> list[dict[str, str]]:
    rows = load_python_docstrings()["validation"].select(range(4))
    return [{"body": row["document"], "line": row["summary"]} for row in rows]


# ---- the whole run


def test_a_full_run_reports_text_and_calibration_metrics(trained: tuple[Path, dict[str, float]]) -> None:
    folder, results = trained
    for prefix, samples in (("eval", 5), ("predict", 3)):
        names = "rouge1 rouge2 rougeL rougeLsum gen_len loss nll perplexity brier ece_10 ece_15 ece_100 token_accuracy"
        assert {f"{prefix}_{name}" for name in names.split()} <= results.keys()
        assert results[f"{prefix}_samples"] == samples
        assert results[f"{prefix}_nll"] == pytest.approx(results[f"{prefix}_loss"], rel=1e-5)
        assert 1 <= results[f"{prefix}_gen_len"] <= 12
        saved = json.loads((folder / f"{prefix}_results.json").read_text(encoding="utf-8"))
        assert saved[f"{prefix}_brier"] == results[f"{prefix}_brier"]
    assert results["train_samples"] == 16
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert next(entry["alpha"] for entry in history if "loss" in entry) == 0.0
    assert list((folder / "calibration").glob("eval-step-*.json"))


def test_a_full_run_leaves_predictions_a_card_and_a_loadable_model(trained: tuple[Path, dict[str, float]]) -> None:
    folder, _ = trained
    records = [json.loads(line) for line in (folder / "generated_predictions.jsonl").open(encoding="utf-8")]
    lines = (folder / "generated_predictions.txt").read_text(encoding="utf-8").split("\n")
    assert len(records) == len(lines) - 1 == 3
    test = load_python_docstrings()["test"]
    expected = [row for row in test if len(row["document"].split()) >= 50][:3]
    assert [(r["document"], r["reference"]) for r in records] == [(r["document"], r["summary"]) for r in expected]
    assert [" ".join(record["prediction"].split()) for record in records] == lines[:-1]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "python-docstrings" in card and "trained from scratch" in card and "Brier" in card
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert model.generation_config.decoder_start_token_id == tokenizer.eos_token_id
    assert model.generation_config.forced_bos_token_id is None
    encoded = tokenizer("Return the name", text_target="x")
    assert encoded["labels"][0] == tokenizer.bos_token_id and encoded["labels"][-1] == tokenizer.eos_token_id


def test_resuming_gives_the_same_weights(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder, _ = trained
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    more = ("--do_train", "--max_steps", "4", "--min_source_words", "50")
    main(arguments(tmp_path, *DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, *more))
    assert equal(weights(tmp_path), weights(folder))
    assert not equal(weights(tmp_path), weights(tmp_path / "checkpoint-2"))


def test_json_and_yaml_files_are_command_lines(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder, results = trained
    settings: dict[str, Any] = {
        "model_name_or_path": str(folder),
        "dataset_name": "python-docstrings",
        "do_eval": True,
        "predict_with_generate": True,
        "max_source_length": 48,
        "max_target_length": 12,
        "max_eval_samples": 5,
        "min_source_words": 50,
        "num_beams": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "warning",
    }
    for name, dump in (("a.json", json.dumps), ("a.yaml", yaml.safe_dump)):
        settings["output_dir"] = str(tmp_path / name.replace(".", "-"))
        (tmp_path / name).write_text(dump(settings), encoding="utf-8")
        again = main([str(tmp_path / name)])
        for metric in ("eval_nll", "eval_brier", "eval_rouge1", "eval_gen_len"):
            assert again[metric] == pytest.approx(results[metric], rel=1e-6)


def test_interrupting_ends_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DPSMSeq2SeqTrainer, "training_step", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, *DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--do_train"))
    assert stopped.value.code == 130
    assert not (tmp_path / "model.safetensors").exists()


def test_push_to_hub_sends_the_card_and_nothing_to_do_says_so(
    trained: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, _ = trained
    common = arguments(tmp_path, *DOCSTRINGS, "--dataset_config_name", "site-packages")
    sent: dict[str, Any] = {}
    monkeypatch.setattr(DPSMSeq2SeqTrainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(DPSMSeq2SeqTrainer, "push_to_hub", lambda self, **card: sent.update(card))
    with caplog.at_level(logging.WARNING):
        assert main([*common, "--model_name_or_path", str(folder)]) == {}
    assert "nothing to do" in caplog.text
    monkeypatch.setattr(task, "load_text_datasets", lambda *_, **__: load_python_docstrings())
    main([*common, "--model_name_or_path", str(folder), "--do_eval", "--push_to_hub", "--lang", "en"])
    assert sent == {
        "tasks": "summarization",
        "finetuned_from": str(folder),
        "dataset": "python-docstrings site-packages",
        "dataset_tags": "python-docstrings",
        "dataset_args": "site-packages",
        "language": "en",
    }


# ---- data


def write_pairs(rows: Sequence[dict[str, str]], path: Path) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
    else:
        getattr(Dataset.from_list(list(rows)), "to_csv" if path.suffix == ".csv" else "to_parquet")(str(path))
    return str(path)


def test_local_files_of_every_kind_give_the_same_numbers(
    trained: tuple[Path, dict[str, float]], docstrings: list[dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = trained
    found = []
    for kind in ("csv", "json", "jsonl", "parquet"):
        file = write_pairs(docstrings, tmp_path / f"pairs.{kind}")
        results = main(
            arguments(
                tmp_path / kind,
                *("--model_name_or_path", str(folder), "--validation_file", file, "--do_eval"),
                *("--cache_dir", str(tmp_path / "cache")),
            )
        )
        found.append((results["eval_nll"], results["eval_brier"], results["eval_samples"]))
    assert found[0][2] == 4
    assert all(numbers == found[0] for numbers in found)


def test_training_on_local_files_with_named_columns(docstrings: list[dict[str, str]], tmp_path: Path) -> None:
    rows = [{"line": row["line"], "id": str(index), "body": row["body"]} for index, row in enumerate(docstrings)]
    files = [write_pairs(rows, tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")]
    results = main(
        arguments(
            tmp_path / "out",
            *FRESH_BART,
            *TRAIN_BPE,
            *("--train_file", files[0], "--validation_file", files[1], "--test_file", files[2]),
            *("--text_column", "body", "--summary_column", "line", "--cache_dir", str(tmp_path / "cache")),
            *("--do_train", "--do_eval", "--do_predict", "--pad_to_max_length", "true", "--scoring_rule", "ce"),
        )
    )
    assert results["train_samples"] == 4 and results["predict_samples"] == 3
    assert not (tmp_path / "out" / "generated_predictions.txt").exists()  # no generation was asked for
    assert results["predict_nll"] > 0 and "predict_rouge1" not in results


def test_a_real_set_of_dialogues(
    trained: tuple[Path, dict[str, float]], real_data: Callable[..., Path], tmp_path: Path
) -> None:
    folder, _ = trained
    file = str(real_data("dialogsum", "dev.jsonl.gz"))
    results = main(
        arguments(
            tmp_path / "out",
            *("--model_name_or_path", str(folder), "--validation_file", file, "--do_eval", "--predict_with_generate"),
            *("--text_column", "document", "--summary_column", "summary", "--min_source_words", "50"),
            *("--cache_dir", str(tmp_path / "cache")),
        )
    )
    assert results["eval_samples"] == 5 and 0 <= results["eval_rougeLsum"] <= 100


# ---- models


def test_positions_grow_or_are_refused(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder, _ = trained
    common = ("--model_name_or_path", str(folder), "--do_train", "--max_source_length", "100")
    main(arguments(tmp_path, *DOCSTRINGS, *common, "--resize_position_embeddings", "true"))
    grown = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert grown.config.max_position_embeddings == 100
    assert grown.model.encoder.embed_positions.weight.shape[0] == 102
    with pytest.raises(ValueError, match="100 tokens .* the model has 64 positions"):
        main(arguments(tmp_path, *DOCSTRINGS, *common, "--resize_position_embeddings", "false"))


def test_bertscore_on_request(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder, _ = trained
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "return", "a", "of"]
    scorer = tmp_path / "scorer"
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(scorer)
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64
    )
    BertModel(config).save_pretrained(scorer)
    common = arguments(tmp_path / "out", *DOCSTRINGS, "--model_name_or_path", str(folder), "--do_eval", "--bertscore")
    chosen = ("--bertscore_model", str(scorer), "--bertscore_num_layers", "1")
    results = main([*common, "--predict_with_generate", "--generation_max_length", "6", *chosen])
    assert {"eval_bertscore_precision", "eval_bertscore_recall", "eval_bertscore_f1"} <= results.keys()
    assert results["eval_gen_len"] <= 6  # the trainer's own generation argument wins over val_max_target_length
    with pytest.raises(ValueError, match="'roberta-large' cannot be loaded"):
        main([*common, "--predict_with_generate"])
    with pytest.raises(ValueError, match="--bertscore scores generated summaries: pass --predict_with_generate"):
        main(common)


# ---- arguments and errors


def test_every_upstream_argument_is_there_with_its_default() -> None:
    model = {
        **dict.fromkeys(("model_name_or_path", "config_name", "tokenizer_name", "cache_dir", "token")),
        **{"use_fast_tokenizer": True, "model_revision": "main", "trust_remote_code": False},
        "resize_position_embeddings": None,
    }
    data = {
        **dict.fromkeys("lang dataset_name dataset_config_name text_column summary_column train_file".split()),
        **dict.fromkeys("validation_file test_file preprocessing_num_workers val_max_target_length".split()),
        **dict.fromkeys("max_train_samples max_eval_samples max_predict_samples source_prefix".split()),
        **{"forced_bos_token": None, "overwrite_cache": False, "max_source_length": 1024, "max_target_length": 128},
        **{"pad_to_max_length": False, "num_beams": 1, "ignore_pad_token_for_loss": True},
    }
    for kind, expected in ((ModelArguments, model), (DataTrainingArguments, data)):
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        assert expected.items() <= defaults.items()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([*DOCSTRINGS], "Give --model_name_or_path .* or --model_type"),
        ([*DOCSTRINGS, *FRESH_BART], "Training from scratch needs --tokenizer_name"),
        ([*DOCSTRINGS, *FRESH_BART, "--model_name_or_path", "x"], "--model_type is for training from scratch"),
        ([*DOCSTRINGS, *TRAIN_BPE, "--model_name_or_path", "x"], "train-bpe makes a new vocabulary"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--config_name", "x"], "--config_name contradicts --model_type"),
        ([*DOCSTRINGS, *FRESH_BART, "--tokenizer_name", "x", "--tokenizer_vocab_size", "400"], "has an effect with"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--bertscore_model", "x"], "no effect without --bertscore"),
        (
            [*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--num_beams", "3", "--generation_num_beams", "4"],
            "--num_beams 3 contradicts --generation_num_beams 4",
        ),
        ([*FRESH_BART, *TRAIN_BPE], "Give a data set with --dataset_name"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--train_file", "x.csv"], "contradict each other"),
        ([*FRESH_BART, *TRAIN_BPE, "--train_file", "x.doc"], r"must end in \.csv"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--max_train_samples", "0"], "--max_train_samples is 0"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--text_column", "body"], "'document', 'summary', 'module'"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--min_source_words", "99999"], "train set has no pair left"),
        ([*DOCSTRINGS, "--model_type", "gpt2", *TRAIN_BPE], "gpt2 has no encoder and decoder.*run_clm_dpsm.py"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--forced_bos_token", "zz"], "--forced_bos_token 'zz'"),
        ([*DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--alpha_schedule", "wild"], "wild"),
    ],
)
def test_mistakes_are_explained_before_training(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path, "--do_train", *more))


def test_mistakes_in_the_data_are_explained(
    trained: tuple[Path, dict[str, float]], docstrings: list[dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = trained
    common = ("--model_name_or_path", str(folder), "--do_eval", "--cache_dir", str(tmp_path / "cache"))
    with pytest.raises((ConnectionError, FileNotFoundError), match="EdinburghNLP/xsum.*--train_file"):
        main(arguments(tmp_path, "--dataset_name", "EdinburghNLP/xsum", *common))
    (tmp_path / "latin.csv").write_bytes("body,line\nd\xe9j\xe0,vu\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        main(arguments(tmp_path, "--validation_file", str(tmp_path / "latin.csv"), *common))
    with pytest.raises(ValueError, match="no 'validation' split"):
        main(arguments(tmp_path, "--train_file", write_pairs(docstrings, tmp_path / "a.jsonl"), *common))
    other = write_pairs([{"line": row["line"], "body": row["body"]} for row in docstrings], tmp_path / "b.jsonl")
    both = ("--test_file", other, "--validation_file", str(tmp_path / "a.jsonl"), "--do_predict")
    with pytest.raises(ValueError, match="name columns that all have"):
        main(arguments(tmp_path, *both, *common))
    with pytest.raises(ValueError, match="train-bpe is trained on the training pairs and needs --do_train"):
        main(arguments(tmp_path, *DOCSTRINGS, *FRESH_BART, *TRAIN_BPE, "--do_eval"))


def test_help_lists_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--min_source_words" in capsys.readouterr().out
