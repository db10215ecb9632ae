"""Loading: every kind of source, and clear errors for wrong ones."""

import gzip
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dpsm_hf.data import loading
from dpsm_hf.data.file_checks import check_utf8
from dpsm_hf.data.loading import check_columns, file_builder, load_text_datasets

LINES = [f"This is line number {index} of a text." for index in range(40)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(folder, extension, lines=LINES, name="train"):
    path = folder / f"{name}.{extension}"
    kind, _, packed = extension.partition(".")
    if kind == "parquet":
        Dataset.from_dict({"text": lines}).to_parquet(str(path))
        return str(path)
    text = {
        "txt": "\n".join(lines),
        "csv": "text,number\n" + "\n".join(f'"{line}",{index}' for index, line in enumerate(lines)),
        "json": "\n".join(json.dumps({"text": line}) for line in lines),
        "jsonl": "\n".join(json.dumps({"text": line}) for line in lines),
    }[kind] + "\n"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["txt", "csv", "json", "jsonl", "parquet", "txt.gz", "csv.gz", "jsonl.gz"])
def test_local_files(tmp_path, extension, streaming):
    train, valid = write(tmp_path, extension), write(tmp_path, extension, LINES[:3], "valid")
    raw = load_text_datasets(
        train_file=train,
        validation_file=valid,
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
        keep_linebreaks=False,
        required_splits=["train", "validation"],
    )
    assert [row["text"] for row in raw["train"]] == LINES
    assert [row["text"] for row in raw["validation"]] == LINES[:3]
    assert isinstance(raw["train"], IterableDataset) == streaming


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_files_are_no_patterns(tmp_path, streaming):
    folder = tmp_path / "runs [new] *"
    folder.mkdir()
    for name in ("run[1].txt", "run1.txt"):
        (folder / name).write_text(name, encoding="utf-8")
    data = load_text_datasets(
        test_file=str(folder / "run[1].txt"), streaming=streaming, cache_dir=str(tmp_path / "c"),
        required_splits=["test"],
    )  # fmt: skip
    assert [row["text"] for row in data["test"]] == ["run[1].txt"]


@pytest.mark.parametrize("keep", [True, False])
def test_keep_linebreaks_and_byte_order_mark(tmp_path, keep):
    path = tmp_path / "a.txt"
    path.write_bytes("first\nsecond\n".encode("utf-8-sig"))
    raw = load_text_datasets(
        train_file=str(path), keep_linebreaks=keep, validation_split_percentage=None, cache_dir=str(tmp_path / "c")
    )
    assert list(raw["train"]["text"]) == (["first\n", "second\n"] if keep else ["first", "second"])


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_is_cut_from_train(tmp_path, streaming):
    raw = load_text_datasets(
        train_file=write(tmp_path, "txt"),
        streaming=streaming,
        keep_linebreaks=False,
        validation_split_percentage=10,
        cache_dir=str(tmp_path / "c"),
        required_splits=["train", "validation"],
    )
    train, valid = ([row["text"] for row in raw[split]] for split in ("train", "validation"))
    # 10 % of 40 rows; of a stream, whose length is unknown, the first 10 of every 100 rows.
    held_out = 10 if streaming else 4
    assert valid == LINES[:held_out] and train == LINES[held_out:]


def test_one_row_cannot_be_divided(tmp_path):
    path = write(tmp_path, "txt", LINES[:1])
    assert "validation" not in load_text_datasets(train_file=path, cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="1 row.*--validation_file"):
        load_text_datasets(train_file=path, cache_dir=str(tmp_path / "c"), required_splits=["train", "validation"])


@pytest.mark.parametrize("percentage", [-1, 100])
def test_impossible_percentage(tmp_path, percentage):
    with pytest.raises(ValueError, match=f"{percentage} must lie between"):
        load_text_datasets(
            train_file=write(tmp_path, "txt"), validation_split_percentage=percentage, cache_dir=str(tmp_path / "c")
        )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "column"), [("python-docs", "text"), ("python-docstrings", "document")])
def test_embedded_sets_by_name(name, column, streaming):
    raw = load_text_datasets(name, streaming=streaming, required_splits=["train", "validation", "test"])
    assert set(raw) == {"train", "validation", "test"}
    assert len(next(iter(raw["validation"]))[column]) > 10
    assert isinstance(raw["train"], IterableDataset) == streaming


def test_embedded_sets_have_no_other_configuration():
    with pytest.raises(ValueError, match="'en'.*site-packages"):
        load_text_datasets("python-docs", "en")


@pytest.mark.parametrize("streaming", [False, True])
def test_unreachable_hub_is_an_error_that_helps(streaming):
    with pytest.raises(ConnectionError) as caught:
        load_text_datasets("Salesforce/wikitext", "wikitext-2-raw-v1", streaming=streaming)
    for part in ("Salesforce/wikitext", "cannot be reached", "--train_file", "--dataset_name python-docs"):
        assert part in str(caught.value)


def test_hub_says_there_is_no_such_set(monkeypatch):
    def missing(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(loading.datasets, "load_dataset", missing)
    with pytest.raises(FileNotFoundError, match=r"'no/such'.*--train_file"):
        load_text_datasets("no/such")


def test_loading_scripts_are_refused(monkeypatch):
    def script(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found old.py")

    monkeypatch.setattr(loading.datasets, "load_dataset", script)
    with pytest.raises(ValueError, match=r"'old/set' is a loading script"):
        load_text_datasets("old/set", trust_remote_code=True)


def test_a_saved_dataset_is_found_by_its_folder(tmp_path):
    parts = {"train": Dataset.from_dict({"text": LINES}), "validation": Dataset.from_dict({"text": LINES[:2]})}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert list(load_text_datasets(str(tmp_path / "saved"))["validation"]["text"]) == LINES[:2]


def test_a_file_is_no_name_of_a_data_set(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="a.jsonl' is a file, where the name of a data set.*--train_file"):
        load_text_datasets(str(tmp_path / "a.jsonl"))
    for name in ("none.jsonl", "none.csv.gz"):  # at once, and not after asking the hub
        with pytest.raises(FileNotFoundError, match=f"There is no file '{name}'"):
            load_text_datasets(name)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--train_file '.*nowhere.txt'"):
        load_text_datasets(train_file=str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.gz", "a.parquet.gz", "a.txt.zip"])
def test_unknown_extension(name):
    with pytest.raises(ValueError, match=rf"{name}.*\.csv.*\.parquet"):
        load_text_datasets(train_file=name)


def test_mixed_kinds():
    with pytest.raises(ValueError, match=r"one kind.*a.csv, b.txt"):
        load_text_datasets(train_file="a.csv", validation_file="b.txt")
    assert file_builder("a.json") == file_builder("b.jsonl") == "json"


def test_contradicting_and_missing_sources():
    with pytest.raises(ValueError, match="contradict"):
        load_text_datasets("python-docs", train_file="a.txt")
    with pytest.raises(ValueError, match="Give a data set"):
        load_text_datasets()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.csv", b""), ("a.csv", b"text,label\n"), ("a.jsonl", b"\n"), ("a.json", b"[]")],
)
def test_empty_split_is_named(tmp_path, name, content, streaming):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"validation split.*empty \(0 rows\)"):
        load_text_datasets(
            train_file=write(tmp_path, name.split(".")[1]),
            validation_file=str(path),
            streaming=streaming,
            cache_dir=str(tmp_path / "c"),
            required_splits=["train", "validation"],
        )


def test_missing_split_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no 'test' split.*'train'"):
        load_text_datasets(
            train_file=write(tmp_path, "txt"), required_splits=["train", "test"], cache_dir=str(tmp_path / "c")
        )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b'{"text": "a"}\n{"te'), ("a.parquet", b"not parquet")])
def test_broken_file_is_named(tmp_path, name, content, streaming):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}' could not be read as"):
        load_text_datasets(train_file=str(path), streaming=streaming, cache_dir=str(tmp_path / "c"))


@pytest.mark.parametrize("extension", ["txt", "csv", "jsonl"])
def test_not_utf8_names_file_offset_and_remedy(tmp_path, extension):
    path = tmp_path / f"latin.{extension}"
    path.write_bytes(b"text\n" + "Er sagte: schön.\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"latin.{extension}' is not UTF-8: byte 18 is 0xf6.*iconv -f WINDOWS-1252"):
        load_text_datasets(train_file=str(path))


@pytest.mark.parametrize("ahead", [0, 1, 2, (1 << 20) - 2, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82x"])
def test_offset_is_right_across_read_blocks(tmp_path, ahead, bad):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * ahead + bad + b"yz")
    with pytest.raises(ValueError, match=rf"byte {ahead} is"):
        check_utf8(str(path))


def test_cut_off_character_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xe2\x82")
    with pytest.raises(ValueError, match="byte 3 is 0xe2"):
        check_utf8(str(path))


def test_utf16_and_false_gzip(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("text".encode("utf-16"))
    with pytest.raises(ValueError, match="iconv -f UTF-16"):
        check_utf8(str(path))
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(b"plain text")
    with pytest.raises(ValueError, match="not a complete gzip"):
        check_utf8(str(packed))


def test_missing_column_lists_those_that_are_there():
    rows = Dataset.from_dict({"text": ["a"], "label": [1]})
    for dataset in (rows, rows.to_iterable_dataset()):
        check_columns(dataset, {"--text_column": "text", "--summary_column": None}, "train")
        with pytest.raises(ValueError, match=r"--text_column 'txt'.*train.*'text', 'label'.*Did you mean 'text'"):
            check_columns(dataset, {"--text_column": "txt"}, "train")
