"""The arguments of run_clm_dpsm.py: what they settle, which contradict each other, and what wrong data is told."""

import dataclasses

import pytest

import run_clm_dpsm
from dpsm_hf.tasks import task
from dpsm_hf.tasks.language_modelling import DataTrainingArguments, ModelArguments
from tests.tasks.clm_run import argv, real_texts, write


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def texts():
    return real_texts()


def test_defaults_of_the_document_options():
    def settled(**options):
        options = DataTrainingArguments(**options).preprocessing(8)
        return options.add_eos_between_documents, options.document_boundary

    assert settled(dataset_name="python-docs") == (True, "row")
    assert settled(dataset_name="python-docs", add_eos_between_documents=False) == (False, "row")
    assert settled(dataset_name="wikitext") == (False, "row")
    assert settled(dataset_name="wikitext", document_boundary="blank_line") == (True, "blank_line")
    assert settled(train_file="a.txt")[0] is False
    assert settled(train_file="a.txt.gz", add_eos_between_documents=True) == (True, "blank_line")
    assert settled(train_file="a.csv", add_eos_between_documents=True) == (True, "row")


WORK = {"do_train": True, "max_steps": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": None, "config_overrides": None}, "There is no model"),
        ({"tokenizer_name": None, "tokenizer_vocab_size": None}, "needs a tokenizer"),
        ({"model_name_or_path": "gpt2"}, "contradicts"),
        ({"model_name_or_path": "gpt2", "config_overrides": None}, "train-bpe makes new tokens"),
        ({"config_name": "gpt2"}, "contradicts"),
        ({"tokenizer_name": "gpt2"}, "goes with --tokenizer_name train-bpe"),
        ({"tokenizer_vocab_size": 260}, "--tokenizer_vocab_size 260: this should be at least 261"),
        ({"train_file": "a.txt"}, "contradict each other"),
        ({"dataset_name": None}, "Give a data set"),
        ({"dataset_name": None, "train_file": "a.doc"}, "must end in"),
        ({"dataset_name": None, "train_file": "a.csv", "validation_file": "b.txt"}, "one kind"),
        ({"dataset_name": None, "validation_file": "a.txt"}, "--do_train needs a --train_file"),
        ({"dataset_name": None, "train_file": "a.txt", "do_predict": True}, "--do_predict needs a --test_file"),
        ({"dataset_name": None, "test_file": "a.txt", "do_train": None, "do_eval": True}, "--do_eval needs"),
        ({"dataset_name": None, "test_file": "a.txt", "do_train": None, "do_predict": True}, "needs a --train_file"),
        ({"streaming": True, "max_steps": None}, "needs --max_steps"),
        ({"streaming": True, "preprocessing_num_workers": 2}, "no effect with --streaming"),
        ({"validation_split_percentage": 100}, "must lie between 0 and 99"),
        ({"max_eval_samples": 0}, "max_eval_samples 0 must be at least 1"),
        ({"block_size": 1}, "block_size 1 is too small"),
        ({"min_remainder": 0}, "min_remainder 0"),
        ({"add_eos_between_documents": False, "document_boundary": "row"}, "document_boundary has no effect"),
        ({"overwrite_output_dir": True}, "overwrite_output_dir is gone"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(task, "load_text_datasets", None)
    with pytest.raises(ValueError, match=message):
        run_clm_dpsm.main(argv(tmp_path, **{"dataset_name": "python-docs", **WORK, **options}))


def test_errors_of_the_data_reach_the_user(tmp_path, texts, cache):
    def run(**options):
        run_clm_dpsm.main(argv(tmp_path, **WORK, cache_dir=cache, **options))

    with pytest.raises(ConnectionError, match=r"Salesforce/wikitext.*cannot be reached.*--dataset_name python-docs"):
        run(dataset_name="Salesforce/wikitext", dataset_config_name="wikitext-2-raw-v1")
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        run(train_file=tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes("ein Wört".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt' is not UTF-8: byte 5 is 0xf6"):
        run(train_file=tmp_path / "latin.txt")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"validation split is empty \(0 rows\).*empty.jsonl"):
        run(train_file=write(tmp_path, "jsonl", texts), validation_file=tmp_path / "empty.jsonl", do_eval=True)
    with pytest.raises(ValueError, match="'body' is not a column of the train split; its columns are 'text'"):
        run(train_file=tmp_path / "train.jsonl", text_column_name="body")
    with pytest.raises(ValueError, match=r"block_size 48.*32 positions.*n_positions=48"):
        run(train_file=tmp_path / "train.jsonl", config_overrides="n_embd=16,n_layer=1,n_head=2,n_positions=32")
    (tmp_path / "short.jsonl").write_text('{"text": "Too short."}\n' * 2)
    with pytest.raises(ValueError, match="train split gives no training row"):
        run(train_file=tmp_path / "short.jsonl", tokenizer_vocab_size=270)


def test_every_upstream_argument_is_there():
    """The fields of the newest run_clm.py in the Hugging Face examples."""
    model = "model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer"
    model += " model_revision token trust_remote_code dtype"
    data = "dataset_name dataset_config_name train_file validation_file max_train_samples max_eval_samples streaming"
    data += " block_size overwrite_cache validation_split_percentage preprocessing_num_workers keep_linebreaks"
    for names, kind in ((model, ModelArguments), (data, DataTrainingArguments)):
        assert set(names.split()) <= {field.name for field in dataclasses.fields(kind)}
