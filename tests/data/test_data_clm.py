"""Language-model preprocessing on real text with a real tokenizer, every option, map-style and streaming."""

from itertools import chain

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from dpsm_hf.data.clm import ClmCollator, ClmPreprocessing, choose_text_column, normalize_text, prepare_clm_datasets
from dpsm_hf.data.python_text import load_python_docs
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

BLOCK = 64


@pytest.fixture(scope="module")
def texts():
    return [text for text in load_python_docs()["validation"]["text"] if len(text) < 3000][:150]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_bpe_tokenizer(load_python_docs()["train"]["text"][:300], 800)


def prepare(texts, tokenizer, streaming=False, num_proc=None, **options):
    rows = Dataset.from_dict({"text": texts})
    rows = rows.to_iterable_dataset(num_shards=1) if streaming else rows
    options = ClmPreprocessing(**{"block_size": BLOCK, **options})
    return prepare_clm_datasets({"train": rows}, tokenizer, options, num_proc=num_proc)["train"]


def tokens_of(rows):
    return list(chain.from_iterable(row["input_ids"] for row in rows))


def encode(tokenizer, texts):
    return [tokenizer(text, verbose=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_the_split_loses_nothing_but_a_short_end(texts, tokenizer, streaming):
    rows = list(prepare(texts, tokenizer, streaming))
    expected = list(chain.from_iterable(encode(tokenizer, texts)))
    rest = len(expected) % BLOCK
    assert [len(row["input_ids"]) for row in rows[:-1]] == [BLOCK] * (len(rows) - 1)
    assert tokens_of(rows) == (expected if rest >= 32 or rest == 0 else expected[:-rest])
    for row in rows:
        assert row["labels"] == row["input_ids"] and row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("rest", "kept"), [(0, 0), (1, 0), (31, 0), (32, 32), (63, 63)])
def test_the_end_is_kept_from_32_tokens_on(texts, tokenizer, streaming, rest, kept):
    text = tokenizer.decode(list(chain.from_iterable(encode(tokenizer, texts)))[: 2 * BLOCK + 40])
    ids = encode(tokenizer, [text])[0]
    # A text with exactly as many tokens as wanted: drop letters until it fits.
    while len(ids) != 2 * BLOCK + rest:
        text = text[:-1] if len(ids) > 2 * BLOCK + rest else text + "!?"[len(text) % 2] + " x"
        ids = encode(tokenizer, [text])[0]
    rows = list(prepare([text], tokenizer, streaming))
    assert [len(row["input_ids"]) for row in rows] == [BLOCK, BLOCK] + [kept] * (kept > 0)


def test_min_remainder_can_be_set(texts, tokenizer):
    total = len(list(chain.from_iterable(encode(tokenizer, texts))))
    assert len(tokens_of(prepare(texts, tokenizer, min_remainder=2, block_size=BLOCK))) >= total - 1
    whole = tokens_of(prepare(texts, tokenizer, min_remainder=10_000))
    assert len(whole) == total // BLOCK * BLOCK


@pytest.mark.parametrize("streaming", [False, True])
def test_batch_packing_is_upstreams(texts, tokenizer, streaming):
    """run_clm.py joins 1,000 texts at a time, keeps whole blocks of each thousand, and adds no end token."""
    many = (texts * 17)[:2300]
    expected = []
    for start in range(0, len(many), 1000):
        joined = list(chain.from_iterable(encode(tokenizer, many[start : start + 1000])))
        expected += [joined[i : i + BLOCK] for i in range(0, len(joined) // BLOCK * BLOCK, BLOCK)]
    rows = list(prepare(many, tokenizer, streaming, packing="batch"))
    assert [row["input_ids"] for row in rows] == expected
    assert all(row["labels"] == row["input_ids"] for row in rows)


@pytest.mark.parametrize("packing", ["split", "batch"])
def test_two_processes_give_the_same_rows(texts, tokenizer, packing):
    many = (texts * 14)[:2000]
    one, two = (list(prepare(many, tokenizer, num_proc=n, packing=packing)) for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("streaming", [False, True])
def test_end_token_between_rows(texts, tokenizer, streaming):
    ids = encode(tokenizer, ["", *texts, ""])
    rows = prepare(["", *texts, ""], tokenizer, streaming, add_eos_between_documents=True, min_remainder=2)
    expected = list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in ids if row))
    got = tokens_of(rows)
    assert got == expected[: len(got)] and len(expected) - len(got) < 2
    assert got.count(tokenizer.eos_token_id) == len(texts)


def test_end_token_is_not_doubled(texts):
    framed = train_bpe_tokenizer(texts, 400, sequence_template=True)
    got = tokens_of(prepare(texts, framed, add_eos_between_documents=True, min_remainder=2))
    assert got.count(framed.eos_token_id) == len(texts)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_end_token_at_blank_lines(texts, tokenizer, streaming, drop):
    """Rows that are lines: a run of blank lines ends a document once, wherever it stands."""
    first, second = texts[0].splitlines(), texts[1].splitlines()
    first, second = ([line + "\n" for line in lines if line.strip()] for lines in (first, second))
    lines = ["\n", " \n", *first, "\n", "", "\n", *second, "\n"]
    rows = prepare(
        lines,
        tokenizer,
        streaming,
        add_eos_between_documents=True,
        document_boundary="blank_line",
        drop_empty_lines=drop,
        min_remainder=2,
    )
    end = [tokenizer.eos_token_id]
    expected = [*chain(*encode(tokenizer, first)), *end, *chain(*encode(tokenizer, second)), *end]
    got = tokens_of(rows)
    assert got == expected[: len(got)] and len(expected) - len(got) < 2


def test_the_last_document_gets_its_end_token_too(texts, tokenizer):
    rows = prepare(
        texts[:1], tokenizer, add_eos_between_documents=True, document_boundary="blank_line", min_remainder=2
    )
    assert tokens_of(rows)[-1] == tokenizer.eos_token_id


def test_documents_that_span_map_batches(texts, tokenizer):
    lines = [line for text in texts * 3 for line in [*text.splitlines(), ""]][:2500]
    options = {"add_eos_between_documents": True, "document_boundary": "blank_line"}
    assert len(lines) > 2000
    assert tokens_of(prepare(lines, tokenizer, **options)) == tokens_of(prepare(lines, tokenizer, True, **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_drop_empty_lines(texts, tokenizer, streaming):
    lines = [line + "\n" for text in texts[:20] for line in text.splitlines()]
    assert any(not line.strip() for line in lines)
    kept = [line for line in lines if line.strip()]
    assert tokens_of(prepare(lines, tokenizer, streaming, drop_empty_lines=True)) == tokens_of(
        prepare(kept, tokenizer, streaming)
    )
    assert tokens_of(prepare(lines, tokenizer, streaming)) != tokens_of(prepare(kept, tokenizer, streaming))


def test_unicode_and_lower_case(texts, tokenizer):
    odd = [text.replace("fi", "\ufb01").replace(" ", "\u00a0") + " \u2460 \u00c9" for text in texts[:20]]
    rows = prepare(odd, tokenizer, unicode_nfkc=True, lowercase=True, min_remainder=2)
    decoded = tokenizer.decode(tokens_of(rows))
    assert "\ufb01" not in decoded and "\u00a0" not in decoded and decoded == decoded.lower()
    assert "".join(text.lower() + " 1 \u00e9" for text in texts[:20]).startswith(decoded[:-5])
    plain = ClmPreprocessing(block_size=8)
    assert normalize_text("\ufb01 A", plain) == "\ufb01 A" and normalize_text(None, plain) == ""


def test_missing_cells_count_as_empty(texts, tokenizer):
    assert tokens_of(prepare([None, *texts, None], tokenizer)) == tokens_of(prepare(texts, tokenizer))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["split", "batch"])
def test_too_little_text_is_named(tokenizer, streaming, packing):
    with pytest.raises(ValueError, match=r"train split gives no training row.*block_size 64"):
        prepare(["Return it."], tokenizer, streaming, packing=packing)


def test_all_lines_dropped_is_named(tokenizer):
    with pytest.raises(ValueError, match="gives no training row"):
        prepare(["", "\n"], tokenizer, drop_empty_lines=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size 1"),
        ({"packing": "sum"}, "packing 'sum'"),
        ({"min_remainder": 1}, "min_remainder 1"),
        ({"document_boundary": "page"}, "document_boundary 'page'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ClmPreprocessing(**{"block_size": 8, **options})


def test_end_token_needs_one(texts, tokenizer):
    bare = train_bpe_tokenizer(texts, 300)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        prepare(texts, bare, add_eos_between_documents=True)


def test_text_column():
    rows = Dataset.from_dict({"id": [1], "title": ["a"], "text": ["b"]})
    assert choose_text_column(rows, None, "train") == "text"
    assert choose_text_column(rows, "title", "train") == "title"
    assert choose_text_column(rows.select_columns(["title"]), None, "train") == "title"
    with pytest.raises(ValueError, match=r"'body'.*'id', 'title', 'text'"):
        choose_text_column(rows, "body", "train")
    with pytest.raises(ValueError, match=r"'id'.*not text"):
        choose_text_column(rows.select_columns(["id", "title"]), None, "train")


def test_a_stream_repeats_itself(texts, tokenizer):
    """Tokens left over from one pass do not leak into the next, so that resuming is exact."""
    rows = prepare(texts, tokenizer, streaming=True)
    assert list(rows) == list(rows)


def test_a_sharded_stream_keeps_its_shards(texts, tokenizer):
    """Each shard is packed by itself, so that rows do not depend on which worker reads which shard."""
    rows = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3)
    packed = prepare_clm_datasets({"train": rows}, tokenizer, ClmPreprocessing(BLOCK))["train"]
    assert packed.num_shards == 3
    expected = [tokens_of(prepare(list(part["text"]), tokenizer)) for part in shards_of(texts, 3)]
    assert tokens_of(packed) == list(chain(*expected))
    loader = torch.utils.data.DataLoader(packed, batch_size=None, num_workers=2)
    assert sorted(row["input_ids"] for row in loader) == sorted(row["input_ids"] for row in packed)


def shards_of(texts, count):
    return [Dataset.from_dict({"text": texts}).shard(count, index, contiguous=True) for index in range(count)]


def test_prepared_rows_come_from_the_cache(texts, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": texts}).to_parquet(str(path))
    from dpsm_hf.data import clm
    from dpsm_hf.data.loading import load_text_datasets

    def run(overwrite=False):
        raw = load_text_datasets(train_file=str(path), validation_split_percentage=None, cache_dir=str(tmp_path / "c"))
        return prepare_clm_datasets(raw, tokenizer, ClmPreprocessing(BLOCK), overwrite_cache=overwrite)["train"]

    first = run()
    files = [entry["filename"] for entry in first.cache_files]
    calls = []
    original = clm.Packer.add
    monkeypatch.setattr(clm.Packer, "add", lambda self, lists: calls.append(1) or original(self, lists))
    again = run()
    assert [entry["filename"] for entry in again.cache_files] == files and not calls
    assert tokens_of(again) == tokens_of(first)
    assert tokens_of(run(overwrite=True)) == tokens_of(first) and calls


def test_collator_pads_and_masks(texts, tokenizer):
    rows = list(prepare(texts, tokenizer, min_remainder=2))
    full, last = rows[0], {name: values[:40] for name, values in rows[1].items()}
    batch = ClmCollator(BLOCK, tokenizer.pad_token_id)([full, last])
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(batch, (2, BLOCK))
    assert batch["input_ids"][1, 40:].tolist() == [tokenizer.pad_token_id] * 24
    assert batch["labels"][1, 40:].tolist() == [-100] * 24
    assert batch["attention_mask"].sum(1).tolist() == [BLOCK, 40]
    assert batch["labels"][1, :40].tolist() == last["labels"]


def test_collator_equals_the_default_one_on_full_rows(texts, tokenizer):
    rows = [row for row in prepare(texts, tokenizer) if len(row["input_ids"]) == BLOCK][:4]
    ours, theirs = ClmCollator(BLOCK)(rows), default_data_collator(rows)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
