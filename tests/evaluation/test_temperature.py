"""Temperature scaling: fitted against other optimisers, kept in files and configs, folded into models."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from dpsm_hf import TemperatureScaler
from dpsm_hf.evaluation.temperature import FILE_NAME, Moments
from tests.tiny import VOCAB, make_model


def rows(number: int = 2000, vocab: int = 20, temperature: float = 1.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return float64 logits z and labels drawn from ``softmax(z / temperature)``."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(number, vocab, generator=generator, dtype=torch.float64)
    return temperature * z, torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)


def mean_nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return float(F.cross_entropy(logits.double() / temperature, labels))


# ---- the fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 3.0])
def test_the_temperature_that_labels_were_drawn_at(temperature: float) -> None:
    logits, labels = rows(300_000, 10, temperature)
    scaler = TemperatureScaler.fit(logits.float(), labels)
    # its standard error is T / sqrt(n * information), about 0.001 T here
    assert scaler.temperature == pytest.approx(temperature, abs=0.01)
    assert scaler.tokens == 300_000 and scaler.passes <= 10
    assert scaler.nll_before is not None and scaler.nll_after is not None
    assert scaler.nll_after == pytest.approx(mean_nll(logits, labels, scaler.temperature), abs=1e-6)
    assert scaler.nll_before == pytest.approx(mean_nll(logits, labels, 1.0), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0, 30.0])
def test_the_minimum_is_scipys(temperature: float) -> None:
    logits, labels = rows(temperature=temperature)
    scaler = TemperatureScaler.fit(logits, labels)
    found = minimize_scalar(
        lambda x: mean_nll(logits, labels, math.exp(x)), bracket=(-4, 4), method="brent", options={"xtol": 1e-10}
    )
    # Newton stops at steps of 1e-6 in log T; what is minimised is flat to rounding over 1e-8 or so
    assert math.log(scaler.temperature) == pytest.approx(found.x, abs=1e-6)
    assert scaler.nll_after == pytest.approx(found.fun, abs=1e-12)
    assert scaler.nll_after <= scaler.nll_before  # type: ignore[operator]


class Logits(ClassifierMixin, BaseEstimator):
    """A fitted classifier of scikit-learn whose decision is its input."""

    def __init__(self, classes: int = 20) -> None:
        self.classes = classes
        self.classes_ = np.arange(classes)

    def fit(self, X: Any, y: Any) -> Logits:
        return self

    def decision_function(self, X: Any) -> Any:
        return X

    def predict(self, X: Any) -> Any:
        return X.argmax(-1)


@pytest.mark.skipif(Version(sklearn.__version__) < Version("1.8"), reason="scikit-learn before 1.8 does not scale")
def test_the_fit_is_scikit_learns() -> None:
    logits, labels = rows()
    theirs = CalibratedClassifierCV(FrozenEstimator(Logits()), method="temperature", ensemble=False)
    theirs.fit(logits.numpy(), labels.numpy())
    temperature = 1 / float(theirs.calibrated_classifiers_[0].calibrators[0].beta_)
    scaler = TemperatureScaler.fit(logits, labels)
    assert mean_nll(logits, labels, scaler.temperature) == pytest.approx(
        mean_nll(logits, labels, temperature), abs=1e-6
    )
    assert scaler.temperature == pytest.approx(temperature, rel=1e-5)
    p = scaler(logits).softmax(-1).numpy()
    np.testing.assert_allclose(theirs.predict_proba(logits.numpy()), p, atol=1e-5)


def test_batches_are_as_all_at_once() -> None:
    logits, labels = rows()
    at_once = TemperatureScaler.fit(logits.view(40, 50, 20), labels.view(40, 50), split="held out")
    calls = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        calls.append(1)
        yield from zip(logits.split(333), labels.split(333), strict=True)

    in_batches = TemperatureScaler.fit_batches(batches, split="held out")
    assert in_batches.temperature == pytest.approx(at_once.temperature, rel=1e-9)
    assert in_batches.nll_after == pytest.approx(at_once.nll_after, rel=1e-12)
    assert (in_batches.tokens, in_batches.passes, in_batches.split) == (2000, len(calls), "held out")


def test_ignored_labels_do_not_count_whatever_their_logits() -> None:
    logits, labels = rows()
    expected = TemperatureScaler.fit(logits[:1500], labels[:1500])
    labels[1500:] = -100
    logits[1500:] = math.nan
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    found = TemperatureScaler.fit(logits[order], labels[order])
    assert found.tokens == 1500 and found.temperature == pytest.approx(expected.temperature, rel=1e-9)


def test_masked_logits() -> None:
    logits, labels = rows()
    masked = torch.cat([logits, torch.full((2000, 5), -math.inf)], -1)
    expected = TemperatureScaler.fit(logits, labels).temperature
    assert TemperatureScaler.fit(masked, labels).temperature == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_dtypes(dtype: torch.dtype) -> None:
    logits, labels = rows()
    rounded = logits.to(dtype)
    expected = TemperatureScaler.fit(rounded.double(), labels).temperature
    assert TemperatureScaler.fit(rounded, labels).temperature == pytest.approx(expected, rel=1e-5)


def test_newton_is_safe_where_the_curvature_is_not_positive() -> None:
    # far from its minimum at T = 40 the NLL by log T is concave: a bare Newton step would go the wrong way
    logits, labels = rows(temperature=40.0)
    visited = []

    def moments(temperature: float) -> Moments:
        x = torch.tensor(math.log(temperature), dtype=torch.float64, requires_grad=True)
        nll = F.cross_entropy(logits / x.exp(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(nll, x, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient, x)
        visited.append(temperature)
        return Moments(float(nll.detach()), float(gradient.detach()), float(curvature), len(labels))

    scaler = TemperatureScaler.fit_moments(moments)
    assert visited[0] == 1.0 and len(visited) == scaler.passes <= 15
    assert scaler.temperature == pytest.approx(TemperatureScaler.fit(logits, labels).temperature, rel=1e-6)


# ---- data that no temperature is best for --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.1, 3.0, 20.0, 100.0])
def test_data_where_every_token_is_right(margin: float, dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=r"no minimum between temperatures 0.01 and 100.0.*every token is predicted ri"
    ):
        TemperatureScaler.fit(margin * torch.eye(5, dtype=dtype), torch.arange(5))


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_logits_that_tell_nothing(sign: float) -> None:
    with pytest.raises(ValueError, match="its predictions tell nothing of the labels"):
        TemperatureScaler.fit(sign * torch.eye(5), torch.arange(5))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 5), torch.full((3,), -100), "no scored token to fit a temperature on"),
        (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), "no scored token to fit a temperature on"),
        (torch.zeros(3, 5), torch.tensor([0, 5, 1]), r"label 5 lies outside \[0, 5\)"),
        (torch.zeros(3, 5), torch.tensor([0, -1, 1]), r"label -1 lies outside \[0, 5\).*carry -100"),
        (torch.zeros(3, 5), torch.tensor([0, 1]), r"logits have shape \(3, 5\) and labels \(2,\)"),
        (torch.zeros(2, 3, 5), torch.zeros(6, dtype=torch.int64), r"expected \[..., V\] and \[...\]"),
        (torch.full((3, 5), math.nan), torch.zeros(3, dtype=torch.int64), "at temperature 1 is nan: a logit is NaN"),
        (torch.tensor([[0.0, -math.inf]] * 2), torch.tensor([1, 0]), "is inf: .*its logit is masked"),
        (torch.tensor([[0.0, math.inf]] * 2), torch.tensor([1, 0]), "a logit is NaN"),
    ],
)
def test_refused_data(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureScaler.fit(logits, labels)


def test_batches_that_can_be_read_only_once() -> None:
    once = iter([rows()])
    with pytest.raises(ValueError, match="no scored token to fit a temperature on"):
        TemperatureScaler.fit_batches(lambda: once)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "2", None])
def test_a_temperature_that_is_none(temperature: Any) -> None:
    with pytest.raises(ValueError, match="must be a positive number; 1 changes nothing"):
        TemperatureScaler(temperature)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    scaler = TemperatureScaler.fit(*rows(), split="validation[:10%]")
    path = scaler.save(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / FILE_NAME
    assert TemperatureScaler.load(path) == TemperatureScaler.load(path.parent) == scaler
    assert json.loads(path.read_text(encoding="utf-8"))["split"] == "validation[:10%]"
    assert TemperatureScaler.load(TemperatureScaler(2.5).save(tmp_path)) == TemperatureScaler(2.5)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "{}", '{"schema": 1}', '{"temperature": 2.0}', '{"schema": 1, "temperature": -2.0}',
        '{"schema": 1, "temperature": "2"}', '{"schema": 1, "temperature": null}', '{"schema": 1, "temperatur": 2.0}',
    ],
)  # fmt: skip
def test_broken_files(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError):
        TemperatureScaler.load(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / FILE_NAME):
        with pytest.raises(FileNotFoundError, match="TemperatureScaler.save writes it"):
            TemperatureScaler.load(source)


# ---- models --------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[0, 5, 9, 3, 4, 2], [0, 8, 8, 7, 6, 2]])


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits.clone()
    return result


def folds(model: nn.Module, temperature: float = 1.7) -> None:
    before = logits_of(model)
    TemperatureScaler(temperature).fold_into(model)
    torch.testing.assert_close(logits_of(model), before / temperature, rtol=1e-6, atol=1e-6)


def small(cls: Any, config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = cls(
        config(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
               num_key_value_heads=2, head_dim=8, pad_token_id=1, bos_token_id=0, eos_token_id=2, **options)
    )  # fmt: skip
    return model


def test_generation_config_keeps_it(tmp_path: Path) -> None:
    model = make_model("gpt2")
    TemperatureScaler(1.37).apply_to_generation_config(model)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.generation_config.temperature == 1.37 and loaded.generation_config.do_sample is True
    # generate() draws from softmax(z / T)
    out = loaded.generate(IDS[:1], max_new_tokens=1, output_scores=True, output_logits=True,
                          return_dict_in_generate=True, top_k=0, pad_token_id=1)  # fmt: skip
    torch.testing.assert_close(out.scores[0], out.logits[0] / 1.37)


def test_a_model_that_does_not_generate() -> None:
    with pytest.raises(ValueError, match="Linear has no generation_config: it does not generate"):
        TemperatureScaler(2.0).apply_to_generation_config(nn.Linear(2, 2))


def test_fold_into_an_untied_head() -> None:
    folds(make_model("llama"))
    folds(make_model("llama"), 0.3)
    folds(make_model("llama_lora"))  # LoRA elsewhere


def test_fold_into_a_head_with_a_bias() -> None:
    model = small(PhiForCausalLM, PhiConfig)
    nn.init.normal_(model.lm_head.bias)
    folds(model)


def test_fold_into_a_head_whose_logits_are_scaled() -> None:
    folds(small(GraniteForCausalLM, GraniteConfig, logits_scaling=4.0, tie_word_embeddings=False))


def test_fold_into_an_untied_encoder_decoder_with_a_bias_behind_its_head() -> None:
    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
                   tie_word_embeddings=False)
    )  # fmt: skip
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 16))
    model.final_logits_bias.normal_()
    folds(model)


def test_fold_into_16_bits_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama").to(torch.bfloat16)
    expected = model.lm_head.weight.float() / 1.7
    with caplog.at_level(logging.WARNING, logger="dpsm_hf"):
        TemperatureScaler(1.7).fold_into(model)
    assert "the weights of LlamaForCausalLM are torch.bfloat16: folded, they are rounded once more" in caplog.text
    torch.testing.assert_close(model.lm_head.weight.float(), expected, rtol=2**-8, atol=0)


def lora_on_the_head() -> nn.Module:
    return get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))


def marian_with_two_embeddings() -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    sizes = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    config = MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, decoder_vocab_size=40,
        share_encoder_decoder_embeddings=False, **sizes,
    )  # fmt: skip
    return MarianMTModel(config)


def float8_head() -> nn.Module:
    model = make_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_model("gpt2"), "its output weights are those of .* too"),
        (lambda: make_model("t5"), "its output weights are those of .* too"),
        (lambda: make_model("bart"), "its output weights are those of .* too"),
        (marian_with_two_embeddings, "its output weights are those of model.decoder.embed_tokens.weight too"),
        (lambda: small(Gemma2ForCausalLM, Gemma2Config, tie_word_embeddings=False), "it caps its logits behind the l"),
        (lora_on_the_head, "its output layer is"),
        (float8_head, "its weights are torch.float8_e4m3fn"),
        (lambda: nn.Linear(2, 2), "its output layer is builtins.NoneType, not a plain torch"),
    ],
)
def test_where_folding_would_change_something_else(make: Any, reason: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"cannot be folded into \w+: {reason}"):
        TemperatureScaler(2.0).fold_into(model)
    assert all(value.to(torch.float32).equal(before[name].to(torch.float32))
               for name, value in model.state_dict().items())  # fmt: skip
