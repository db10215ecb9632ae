"""The modules through `evaluate.load`, in this process and from an installed wheel in a new one."""

from __future__ import annotations

import doctest
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
import yaml

from dpsm_hf import TokenCalibration, score_tokens
from dpsm_hf.evaluate_modules import MODULES, module_path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(Path(module_path(name)) / "README.md" for name in MODULES), ROOT / "docs" / "evaluate-modules.md"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Load a module by name or path, with its copy and its data in a temporary folder."""
    cache = tmp_path_factory.mktemp("evaluate")
    path, folders = list(sys.path), {name: module_path(name) for name in MODULES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache / "metrics"))
        forget_copies()
        yield lambda name, *args, **kwargs: evaluate.load(folders.get(name, name), *args, **kwargs)
    sys.path[:] = path
    forget_copies()


def forget_copies() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def tokens(number: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 1.5, number)
    confidence[:40] = rng.integers(0, 101, 40) / 100  # on edges of bins, which float32 would move
    return confidence, (rng.random(number) < confidence**1.5).astype(np.int64), rng.integers(10**6, 10**6 + 60, number)


def expected(confidence: Any, correct: Any, **more: Any) -> TokenCalibration:
    result = TokenCalibration()
    result.update(confidence=confidence, correct=correct, **more)
    return result


# ---- token_calibration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_equal_to_the_accumulator_to_the_last_bit(load: Callable[..., Any], keep_in_memory: bool) -> None:
    confidence, correct, _ = tokens()
    module = load("token_calibration", keep_in_memory=keep_in_memory)
    results = module.compute(predictions=confidence, references=correct)
    assert results == expected(confidence, correct).compute()
    assert (module.name, module.module_type) == ("token_calibration", "metric")
    assert results != expected(confidence.astype(np.float32), correct).compute()


def test_batches_and_single_places(load: Callable[..., Any]) -> None:
    confidence, correct, _ = tokens(500)
    module = load("token_calibration")
    for lo in range(0, 490, 70):
        module.add_batch(predictions=confidence[lo : lo + 70], references=correct[lo : lo + 70])
    for p, right in zip(confidence[490:], correct[490:], strict=True):
        module.add(prediction=p, reference=right)
    assert module.compute() == expected(confidence, correct).compute()
    assert module.compute(predictions=[0.5], references=[1])["tokens"] == 1, "the tokens before are still there"


@pytest.mark.parametrize("bins", [15, 20])
def test_what_is_asked_for_besides(load: Callable[..., Any], bins: int, tmp_path: Path) -> None:
    confidence, correct, document = tokens(800)
    calibration = expected(confidence, correct, document=document)
    module = load("token_calibration", "documents", level=0.8)
    for some in (slice(300), slice(300, None)):
        module.add_batch(predictions=confidence[some], references=correct[some], documents=document[some])
    results = module.compute(bins=bins, intervals=True, curve=True, samples=50, seed=3)
    assert results["curve"] == calibration.curve(bins).as_dict()
    assert results[f"ece_{bins}"] == pytest.approx(calibration.curve(bins).ece, rel=1e-12)
    intervals = calibration.intervals(level=0.8, samples=50, seed=3)
    assert results["intervals"] == {name: list(interval) for name, interval in intervals.items()}
    assert {name: results[name] for name in calibration.compute()} == calibration.compute()
    saved = evaluate.save(tmp_path, **results)
    assert json.loads(Path(saved).read_text())["intervals"] == results["intervals"]
    options = {"intervals": True, "level": 0.8, "samples": 50, "seed": 3}
    plain = load("token_calibration")
    at_once = plain.compute(predictions=confidence, references=correct, documents=document, **options)
    assert at_once["intervals"] == results["intervals"]
    assert plain.compute(predictions=confidence, references=correct, **options)["intervals"] != results["intervals"]
    sure = plain.compute(predictions=[0.5, 0.7], references=[1, 1], intervals=True)
    assert math.isnan(sure["confidence_auroc"]) and sure["intervals"]["confidence_auroc"] == [None, None]


def test_ignored_places(load: Callable[..., Any]) -> None:
    given = {"predictions": [0.9, 7.0, 0.4], "references": [1, -100, 0]}  # what is ignored may be anything
    found = load("token_calibration").compute(**given, documents=[4, 9, 4], intervals=True)
    assert {name: found[name] for name in found if name != "intervals"} == expected([0.9, 0.4], [1, 0]).compute()
    assert found["intervals"]["ece_15"] == [None, None], "one document only: nothing to resample"
    given["predictions"] = [[0.9, 0.1], [7.0, -1.0], [0.6, 0.4]]
    assert load("token_calibration", "probabilities").compute(**given)["confidence"] == pytest.approx(0.75)


def test_probabilities_against_the_scores_of_logits(load: Callable[..., Any]) -> None:
    logits = 2 * torch.randn(200, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(200) % 7
    scores = score_tokens(logits, labels)
    names = ("nll", "brier", "spherical", "entropy")
    wanted = expected(scores.confidence, scores.correct, **{name: getattr(scores, name) for name in names}).compute()
    results = load("token_calibration", "probabilities").compute(predictions=logits.softmax(-1), references=labels)
    assert results.keys() == wanted.keys()
    # score_tokens works in float32
    for name in (*names, "perplexity", "label_probability", "confidence", "token_accuracy", "tokens"):
        assert results[name] == pytest.approx(wanted[name], rel=1e-6), name


def test_probabilities_against_their_definitions(load: Callable[..., Any]) -> None:
    p, y = [[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.4, 0.4, 0.2]], [1, 2, 1]
    results = load("token_calibration", "probabilities").compute(predictions=p, references=y)
    nll = [math.log(4), 0.0, -math.log(0.4)]
    brier = [0.25 + 0.75**2 + 0.0625, 0.0, 0.16 + 0.36 + 0.04]
    spherical = [1 - 0.25 / math.sqrt(0.375), 0.0, 1 - 0.4 / 0.6]
    entropy = [1.5 * math.log(2), 0.0, -0.8 * math.log(0.4) - 0.2 * math.log(0.2)]
    for name, values in (("nll", nll), ("brier", brier), ("spherical", spherical), ("entropy", entropy)):
        assert results[name] == pytest.approx(sum(values) / 3, rel=1e-12), name
    assert results["token_accuracy"] == pytest.approx(2 / 3), "a tie counts as right"
    impossible = load("token_calibration", "probabilities").compute(predictions=[[1.0, 0.0]], references=[1])
    assert impossible["nll"] == impossible["perplexity"] == math.inf and impossible["brier"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_of_every_precision(load: Callable[..., Any], dtype: torch.dtype) -> None:
    p = torch.randn(200, 500, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1).to(dtype)
    results = load("token_calibration", "probabilities").compute(predictions=p, references=p.argmax(-1))
    assert results["token_accuracy"] == 1
    assert results["confidence"] == p.double().max(-1).values.numpy().sum() / len(p)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ("default", ([0.5, 1.2], [1, 1]), r"predictions\[1\]=1.2 lies outside \[0, 1\]: give the probability"),
        ("default", ([0.5, math.nan], [1, 1]), r"predictions\[1\]=nan lies outside"),
        ("default", ([0.5, 0.1, 2.0], [1, -100, 1]), r"predictions\[2\]=2.0 lies outside"),
        ("default", ([0.5, None], [1, 1]), r"predictions\[1\]=nan lies outside"),
        ("default", ([0.5, 0.5], [1, 0.5]), r"references\[1\]=0.5 must be 1 where .*config_name='probabilities'"),
        ("default", ([0.5], [17]), r"references\[0\]=17 must be 1 where"),
        ("default", ([0.5, 0.5], [1]), r"Mismatch in the number of predictions \(2\) and references \(1\)"),
        ("default", ([], []), "no scored token was seen"),
        ("default", ([0.5], [-100]), "no scored token was seen"),
        ("default", ([[0.5, 0.5]], [1]), r"don't match the expected format"),
        ("documents", ([0.5], [1], [-3]), r"documents\[0\]=-3 must be a whole number from 0 on"),
        ("documents", ([0.5, 0.5], [1, 1], [3, None]), r"documents\[1\]=None must be a whole number"),
        ("probabilities", ([[0.5, 0.5], [0.2, 0.2]], [0, 1]), r"predictions\[1\] adds up to 0.4, not 1"),
        ("probabilities", ([[0.5, 0.5], [-1.0, 2.0]], [0, 1]), r"predictions\[1\] holds -1.0, outside \[0, 1\]"),
        ("probabilities", ([[math.nan, 0.5]], [0]), r"predictions\[0\] holds nan, outside"),
        ("probabilities", ([[0.5, 0.5], [1.0]], [0, 0]), r"predictions\[1\] holds 1 probabilities and .*\[0\] 2"),
        ("probabilities", ([[0.5, 0.5]], [2]), r"references\[0\]=2 is no class in \[0, 2\)"),
        ("probabilities", ([[0.5, 0.5]], [-1]), r"references\[0\]=-1 is no class"),
        ("probabilities", ([[0.5, 0.5]], [0.5]), r"references\[0\]=0.5 is no class"),
    ],
)
def test_refused_places(load: Callable[..., Any], config: str, given: tuple[Any, ...], message: str) -> None:
    module = load("token_calibration", config, keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        module.compute(**dict(zip(("predictions", "references", "documents"), given, strict=False)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 7}, "bins=7 does not divide the grid"),
        ({"intervals": True, "level": 95}, "level=95 must lie between 0 and 1"),
        ({"intervals": True, "samples": 3}, "samples=3 must be a whole number from 20 on"),
        ({"bin": 10}, r"unknown options \['bin'\]; token_calibration knows bins, intervals"),
        ({"documents": [1]}, r"documents holds 1 numbers for 2 places"),
        ({"documents": [1, 0.5]}, r"documents\[1\]=0.5 must be a whole number"),
    ],
)
def test_refused_options(load: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    module = load("token_calibration", keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        module.compute(predictions=[0.5, 0.7], references=[1, 0], **options)


def test_after_an_error_the_module_starts_anew(load: Callable[..., Any]) -> None:
    module = load("token_calibration")
    with pytest.raises(ValueError, match="lies outside"):
        module.compute(predictions=[0.5, 1.5], references=[1, 1])
    assert module.compute(predictions=[0.5], references=[1])["tokens"] == 1


# ---- distinct_n ----------------------------------------------------------------------------------------------------


def by_hand(texts: list[list[str]], n: int, divide_by: str) -> tuple[float, float]:
    """Count with plain loops over lists."""
    seen: list[list[str]] = []
    total, ratios = 0, []
    for words in texts:
        grams = [words[i : i + n] for i in range(len(words)) if i + n <= len(words)]
        size = len(words) if divide_by == "words" else len(grams)
        seen += grams
        total += size
        if size:
            ratios.append(len([g for i, g in enumerate(grams) if g not in grams[:i]]) / size)
    distinct = len([g for i, g in enumerate(seen) if g not in seen[:i]])
    return distinct / total if total else math.nan, sum(ratios) / len(ratios) if ratios else math.nan


@pytest.mark.parametrize("divide_by", ["words", "ngrams"])
def test_distinct_n_against_plain_loops(load: Callable[..., Any], divide_by: str) -> None:
    rng = np.random.default_rng(0)
    words = [[str(word) for word in rng.integers(0, 9, length)] for length in (0, 1, 2, 3, 12, 30, 40)]
    module = load("distinct_n")
    for part in (words[:3], words[3:]):
        module.add_batch(predictions=["\n".join(text) if len(text) > 20 else "  ".join(text) for text in part])
    results = module.compute(n=[1, 2, 3, 5], divide_by=divide_by)
    for n in (1, 2, 3, 5):
        found = results[f"distinct_{n}"], results[f"distinct_{n}_mean"]
        assert found == pytest.approx(by_hand(words, n, divide_by), rel=1e-14)
    assert (results["texts"], results["empty_texts"], results["words"]) == (7, 1, 88)


def test_distinct_n_by_its_definition(load: Callable[..., Any]) -> None:
    module = load("distinct_n")
    texts = ["a b a b", "a b c"]
    results = module.compute(predictions=texts)
    # unigrams a b c of 7 words; bigrams ab ba bc; trigrams aba bab abc
    assert [results[f"distinct_{n}"] for n in (1, 2, 3)] == [3 / 7] * 3
    assert results["distinct_2_mean"] == (2 / 4 + 2 / 3) / 2
    results = module.compute(predictions=texts, n=2, divide_by="ngrams")
    assert results["distinct_2"] == 3 / 5 and "distinct_1" not in results
    assert module.compute(predictions=["a", "b"], n=2)["distinct_2"] == 0.0, "a bigram never joins two texts"


def test_distinct_n_words(load: Callable[..., Any]) -> None:
    text = ["The the THE cat"]
    assert load("distinct_n").compute(predictions=text, n=1)["distinct_1"] == 1.0
    assert load("distinct_n").compute(predictions=text, n=1, lowercase=True)["distinct_1"] == 0.5
    assert load("distinct_n", lowercase=True, n=3).compute(predictions=text, lowercase=False, n=1)["distinct_1"] == 1.0
    assert load("distinct_n").compute(predictions=["abca"], n=1, tokenizer=list)["distinct_1"] == 0.75


def test_distinct_n_of_nothing(load: Callable[..., Any]) -> None:
    results = load("distinct_n").compute(predictions=["", " \n"])
    assert all(math.isnan(results[f"distinct_{n}{mean}"]) for n in (1, 2, 3) for mean in ("", "_mean"))
    assert results["empty_texts"] == results["texts"] == 2
    assert math.isnan(load("distinct_n").compute(predictions=["one"], divide_by="ngrams")["distinct_2"])
    assert load("distinct_n").compute(predictions=["one"])["distinct_2"] == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"predictions": "one text"}, "must be a list of texts, not one text"),
        ({"predictions": ["a", 5]}, r"predictions\[1\]=5 is not text; decode token ids"),
        ({"predictions": ["a", None]}, r"predictions\[1\]=None is not text"),
        ({"predictions": []}, "got no texts"),
        ({"predictions": ["a"], "n": 0}, "n=0 must be a whole number from 1 on"),
        ({"predictions": ["a"], "n": []}, r"n=\[\] must be"),
        ({"predictions": ["a"], "n": [1, 2.5]}, "must be a whole number"),
        ({"predictions": ["a"], "n": True}, "n=True must be a whole number"),
        ({"predictions": ["a"], "divide_by": "tokens"}, "divide_by='tokens' must be 'words' or 'ngrams'"),
        ({"predictions": ["a"], "stem": True}, r"unknown options \['stem'\]; distinct_n knows n, divide_by"),
    ],
)
def test_refused_texts(load: Callable[..., Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("distinct_n", keep_in_memory=True).compute(**given)


# ---- both ----------------------------------------------------------------------------------------------------------

OTHER = """
import datasets
import evaluate

class Other(evaluate.Metric):
    def _info(self):
        kind = datasets.Value(self.config_name)
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features({"predictions": kind, "references": kind})
        )

    def _compute(self, predictions, references):
        return {"equal": sum(p == r for p, r in zip(predictions, references)), "tokens": -1}
"""


def test_combined_with_others(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "other.py").write_text(OTHER)
    other = str(tmp_path / "other")
    confidence, correct, _ = tokens(200)
    both = evaluate.combine([load("token_calibration", bins=50), load(other, "float64")])
    for lo in (0, 100):
        both.add_batch(predictions=confidence[lo : lo + 100], references=correct[lo : lo + 100])
    results = both.compute()
    assert results["ece_50"] == pytest.approx(expected(confidence, correct).curve(50).ece, rel=1e-12)
    assert (results["token_calibration_tokens"], results["other_tokens"]) == (200, -1)
    texts = evaluate.combine([load("distinct_n", n=1), load(other, "string")])
    results = texts.compute(predictions=["a a b", "c"], references=["a a b", "d"])
    assert results["distinct_1"] == 0.75 and results["equal"] == 1


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="no evaluate module 'bleu'; it has token_calibration, distinct_n"):
        module_path("bleu")


@pytest.mark.parametrize("name", MODULES)
def test_help_and_card(load: Callable[..., Any], name: str) -> None:
    module = load(name)
    assert Path(inspect.getfile(type(module))).is_relative_to(evaluate.config.HF_MODULES_CACHE)
    with pytest.raises(ValueError, match="config_name='fine' is unknown"):
        load(name, "fine")
    assert "predictions (list of" in module.compute.__doc__ and "ValueError" in module.inputs_description
    run_examples(module.inputs_description, name, {"evaluate": evaluate, "module_path": module_path})
    front = (Path(module_path(name)) / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    card = yaml.safe_load(front)
    assert {"evaluate", "metric"} <= set(card["tags"]) and card["title"] and card["description"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_examples_of_the_pages(load: Callable[..., Any], page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    run_examples("\n".join(blocks), page.name, {})


def run_examples(text: str, name: str, names: dict[str, Any]) -> None:
    examples = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    assert examples.examples
    report: list[str] = []
    failed, _ = doctest.DocTestRunner().run(examples, out=report.append)
    assert not failed, "".join(report)


FRESH = """
import json, sys
import evaluate
import dpsm_hf
from dpsm_hf.evaluate_modules import MODULES, module_path

calibration = evaluate.load(module_path("token_calibration"))
calibration.add_batch(predictions=[0.9, 0.3], references=[1, 0])
distinct = evaluate.load(module_path("distinct_n")).compute(predictions=["a a b"])
ece = calibration.compute()["ece_15"]
print(json.dumps({"from": dpsm_hf.__file__, "ece": ece, "distinct": distinct["distinct_1"]}))
"""


def test_a_wheel_in_a_fresh_process_offline(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dpsm_hf", source / "dpsm_hf", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as b; b.build_wheel('../wheel')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in MODULES:
        assert {f"{name}.py", "README.md"} == set(os.listdir(site / "dpsm_hf" / "evaluate_modules" / name))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_METRICS_CACHE": str(tmp_path / "metrics"),
    }
    done = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert Path(said["from"]).is_relative_to(site)
    assert said["ece"] == expected([0.9, 0.3], [1, 0]).compute()["ece_15"]
    assert said["distinct"] == 2 / 3
    assert (tmp_path / "modules" / "evaluate_modules" / "metrics" / "token_calibration").is_dir()
