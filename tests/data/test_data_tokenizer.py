"""The trained tokenizer: lossless, stable through saving, and trained once per run."""

import json
import multiprocessing
from contextlib import contextmanager

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BartConfig, GPT2Config, LlamaConfig

from dpsm_hf.data.python_text import load_python_docs
from dpsm_hf.data.tokenizer import column_texts, fingerprint, resolve_tokenizer, train_bpe_tokenizer


@pytest.fixture(scope="module")
def texts():
    return load_python_docs()["train"]["text"][:400]


@pytest.fixture(scope="module")
def plain(texts):
    return train_bpe_tokenizer(texts, 1000)


@pytest.fixture(scope="module")
def framed(texts):
    return train_bpe_tokenizer(texts, 600, sequence_template=True)


def test_sizes_and_special_tokens(plain):
    assert len(plain) == plain.vocab_size == 1000
    assert [plain.bos_token_id, plain.pad_token_id, plain.eos_token_id, plain.unk_token_id] == [0, 1, 2, 3]
    assert plain.model_max_length == 1024


def test_it_learned_words(plain, texts):
    """On text from the same source it needs far fewer tokens than bytes."""
    text = texts[5]
    assert len(plain(text)["input_ids"]) < 0.6 * len(text.encode())


def test_training_is_deterministic(texts, plain):
    again = train_bpe_tokenizer(texts, 1000)
    assert again.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_any_text_comes_back(plain, text):
    ids = plain(text, verbose=False)["input_ids"]
    assert plain.decode(ids) == text
    assert plain.unk_token_id not in ids or "<unk>" in text


@pytest.mark.parametrize(
    "text",
    ["a  b\n\tc .  d , 's n't", "\u65e5\u672c \U0001f600 \xe9 \x00 \r\n", " don 't", "\u200b\ufeff", "e\u0301 \xe9"],
)
def test_awkward_texts_come_back(plain, framed, text):
    assert plain.decode(plain(text)["input_ids"]) == text
    assert framed.decode(framed(text)["input_ids"], skip_special_tokens=True) == text


def test_templates(plain, framed):
    bare = framed("Return it.", add_special_tokens=False)["input_ids"]
    assert framed("Return it.")["input_ids"] == [0, *bare, 2]
    assert framed("a", "b")["input_ids"] == [
        0,
        *framed("a")["input_ids"][1:-1],
        2,
        2,
        *framed("b")["input_ids"][1:-1],
        2,
    ]
    assert not {0, 2} & set(plain("Return it.")["input_ids"])
    batch = framed(["a", "Return the sum of it."], padding=True)
    assert batch["input_ids"][0][-1] == 1 and batch["attention_mask"][0][-1] == 0


@pytest.mark.parametrize("config", [None, GPT2Config(), BartConfig(), LlamaConfig()])
def test_saving_keeps_it_also_beside_a_model(tmp_path, framed, config):
    """A model's config.json in the folder must not make AutoTokenizer pick that model's own class."""
    framed.save_pretrained(tmp_path)
    if config is not None:
        config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Return  the sum . \xe9"
    assert loaded(text)["input_ids"] == framed(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert loaded.special_tokens_map == framed.special_tokens_map
    assert loaded.model_max_length == 1024


@pytest.mark.parametrize("size", [0, 256, 260])
def test_vocabulary_too_small(texts, size):
    with pytest.raises(ValueError, match=rf"vocab_size {size} is too small.*at least 261"):
        train_bpe_tokenizer(texts, size)


@pytest.mark.parametrize("nothing", [[], [""], [" \n", "\t"]])
def test_no_text(nothing):
    with pytest.raises(ValueError, match="no text to train"):
        train_bpe_tokenizer(nothing, 300)


def test_a_vocabulary_the_text_cannot_fill_is_reported(caplog):
    tokenizer = train_bpe_tokenizer(["Return the sum."], 5000)
    assert 260 < len(tokenizer) < 5000
    assert "rather than 5000" in caplog.text


def test_column_texts_from_rows_and_streams():
    rows = Dataset.from_dict({"a": ["x", "", None, "y"], "b": ["1", "2", "3", "4"], "n": [1, 2, 3, 4]})
    for dataset in (rows, rows.to_iterable_dataset()):
        assert list(column_texts(dataset, ["a"])) == ["x", "y"]
        assert list(column_texts(dataset, ["a", "b"], limit=2)) == ["x", "1", "2"]


def test_fingerprint_sees_divisions_and_order():
    prints = {fingerprint(texts) for texts in (["ab"], ["a", "b"], ["b", "a"], [], [""])}
    assert len(prints) == 5


def resolve(folder, texts, size=300, **options):
    return resolve_tokenizer("train-bpe", output_dir=folder, training_texts=lambda: texts, vocab_size=size, **options)


def test_resolve_trains_once_and_then_loads(tmp_path, texts, monkeypatch):
    first = resolve(tmp_path, texts)
    record = json.loads((tmp_path / "tokenizer" / "train-bpe.json").read_text())
    assert record["vocab_size"] == 300 and record["texts"] == fingerprint(texts)
    monkeypatch.setattr("dpsm_hf.data.tokenizer.train_bpe_tokenizer", None)
    again = resolve(tmp_path, texts, resuming=True, model_max_length=77)
    assert again.get_vocab() == first.get_vocab() and again.model_max_length == 77


def test_resolve_trains_anew_for_another_size_or_text(tmp_path, texts):
    resolve(tmp_path, texts)
    assert len(resolve(tmp_path, texts, 310)) == 310
    other = resolve(tmp_path, texts[:50], 310)
    assert len(other) == 310 and other.get_vocab() != train_bpe_tokenizer(texts, 310).get_vocab()
    (tmp_path / "tokenizer" / "train-bpe.json").write_text("{broken")
    assert len(resolve(tmp_path, texts, 305)) == 305
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 310}, "vocab_size 300 instead of 310"), ({"texts": ["a b c"]}, "other training texts")],
)
def test_a_resumed_run_keeps_its_tokenizer(tmp_path, texts, change, message):
    resolve(tmp_path, texts)
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path, **{"texts": texts, **change}, resuming=True)


def test_resolve_loads_other_names(tmp_path, plain):
    plain.save_pretrained(tmp_path / "saved")
    loaded = resolve_tokenizer(str(tmp_path / "saved"), output_dir=tmp_path, training_texts=list, use_fast=True)
    assert loaded.get_vocab() == plain.get_vocab()


def _worker(rank, turn, folder, texts, queue):
    """One rank: rank 0 goes first, as training_args.main_process_first arranges it."""
    import dpsm_hf.data.tokenizer as module

    trained = []
    original = module.train_bpe_tokenizer
    module.train_bpe_tokenizer = lambda *args, **kwargs: trained.append(1) or original(*args, **kwargs)

    @contextmanager
    def main_process_first():
        if rank:
            turn.wait(60)
        try:
            yield
        finally:
            turn.set()

    tokenizer = resolve(folder, texts, main_process_first=main_process_first)
    queue.put((rank, len(trained), tokenizer.get_vocab()))


def test_only_the_first_process_trains(tmp_path, texts):
    context = multiprocessing.get_context("fork")
    turn, queue = context.Event(), context.Queue()
    workers = [context.Process(target=_worker, args=(rank, turn, tmp_path, texts, queue)) for rank in (1, 0)]
    for worker in workers:
        worker.start()
    results = {rank: rest for rank, *rest in (queue.get(timeout=60) for _ in workers)}
    for worker in workers:
        worker.join()
    assert [results[0][0], results[1][0]] == [1, 0]
    assert results[0][1] == results[1][1]
