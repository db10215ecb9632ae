"""What an evaluation says of a temperature without fitting one, of other fits than by NLL, and of rare tokens."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from dpsm_hf import CalibrationCallback, TemperatureScaler
from dpsm_hf.evaluation.temperature_search import BrierSearch, MomentSums, search
from dpsm_hf.evaluation.token_frequency import TokenFrequency, TrainingFrequency
from tests.evaluation_trainers import float64_logits, make_trainer
from tests.tiny import SEQ2SEQ, VOCAB, make_data


def record_of(folder: Path, step: int = 0) -> dict[str, Any]:
    path = folder / "calibration" / f"eval-step-{step:06d}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def with_labels_of_rank(trainer: Any, data: Any, ranks: list[int]) -> Any:
    """Return rows of GPT-2 whose labels are what the model finds most likely (rank 0), next most likely and so on."""
    with torch.no_grad():
        logits = trainer.model.eval()(torch.tensor(data["input_ids"])).logits
    order = logits.argsort(-1, descending=True)[:, :-1]
    wanted = torch.tensor(ranks).repeat(order.shape[0], order.shape[1] // len(ranks) + 1)[:, : order.shape[1], None]
    labels = torch.cat([torch.zeros(len(order), 1, dtype=torch.int64), order.gather(-1, wanted)[..., 0]], 1)
    return data.remove_columns("labels").add_column("labels", labels.tolist())


# ---- NLL less entropy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "llama_lora", "bart"])
def test_first_order_signals_are_those_of_the_logits(name: str, fused_head: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, name, fused_head=fused_head)
    trainer.train()
    trainer.use_temperature(1.3)
    metrics = trainer.evaluate()
    logits, labels = float64_logits(trainer.model, trainer.eval_dataset, shifted=name not in SEQ2SEQ)
    for suffix, temperature in (("", 1.0), ("_scaled", 1.3)):
        log_p = (logits / temperature).log_softmax(-1)
        p = log_p.exp()
        nll, entropy = -log_p.gather(1, labels[:, None])[:, 0], -(p * log_p).sum(-1)
        spread = (p * log_p.square()).sum(-1) - entropy.square()
        expected = {
            "nll_entropy_gap": (nll - entropy).mean(),
            "varentropy": spread.mean(),
            "first_order_log_temperature": (nll - entropy).sum() / spread.sum(),
        }
        found = {key: metrics[f"eval_{key}{suffix}"] for key in expected}
        assert found == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-4, abs=1e-6)


def test_near_its_minimum_the_first_order_is_the_temperature_that_is_fitted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=60)
    trainer.train()
    data = trainer.train_dataset
    near = trainer.fit_temperature(data).temperature * 0.98
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight.div_(near)
        trainer.model.transformer.ln_f.bias.div_(near)
    metrics = trainer.evaluate(data)
    fitted = math.log(trainer.fit_temperature(data).temperature)
    # what is left out is of second order
    assert metrics["eval_first_order_log_temperature"] == pytest.approx(fitted, rel=0.1) and abs(fitted) > 0.01


def test_the_log_has_them_where_they_are_named(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "calibration_metrics": "core", "scoring_rule": "dpsm"}
    for metric in ("nll_entropy_gap", "first_order_log_temperature"):
        trainer = make_trainer(
            tmp_path,
            alpha_schedule="feedback",
            alpha_feedback_metric=f"eval_{metric}",
            alpha_warmup_steps=1,
            **options,
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
        assert logged and all(f"eval_{metric}" in entry for entry in logged)
        assert not any(key in entry for entry in logged for key in ("eval_varentropy", "eval_temperature_conflict"))
    with pytest.raises(ValueError, match="metric_for_best_model='eval_nll_entropy_gap' cannot choose"):
        make_trainer(tmp_path, metric_for_best_model="eval_nll_entropy_gap")


@pytest.mark.parametrize(("ranks", "conflict"), [([0, 1, 0, 1, 1], 1.0), ([0, 1, 30, 60, 90], 0.0)])
def test_no_temperature_helps_both(ranks: list[int], conflict: float, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():  # peaked enough to be surer than right; the labels then lie where the entropy does not
        trainer.model.lm_head.weight.mul_(8.0)
    data = with_labels_of_rank(trainer, make_data("gpt2", 24), ranks)
    trainer.add_callback(CalibrationCallback())
    metrics = trainer.evaluate(data)
    record = record_of(tmp_path)
    over = record["intervals"]["signed_gap"][0] > 0
    assert metrics["eval_temperature_conflict"] == record["reported"]["temperature_conflict"] == conflict
    if conflict:
        assert over and record["intervals"]["nll_entropy_gap"][1] < 0
        said = record["temperature_conflict"]
        assert said.startswith("No temperature can help both: confidence is above the accuracy (signed_gap +")
        assert f"nll_entropy_gap {metrics['eval_nll_entropy_gap']:+.4f}" in said
        assert "asks for a temperature above 1, while the labels are more likely" in said and "one below 1" in said
    else:
        assert over and record["intervals"]["nll_entropy_gap"][0] > 0 and "temperature_conflict" not in record
    # of one document there is no interval, so that nothing can be said
    assert "eval_temperature_conflict" not in trainer.evaluate(data.select([0]))


# ---- other fits ----------------------------------------------------------------------------------------------------


def brier(logits: Tensor, labels: Tensor, log_t: float) -> float:
    p = (logits / math.exp(log_t)).softmax(-1)
    return float((p - torch.nn.functional.one_hot(labels, logits.shape[-1])).square().sum(-1).mean())


def gap(logits: Tensor, labels: Tensor, log_t: float) -> float:
    p = (logits / math.exp(log_t)).softmax(-1)
    return float(p.amax(-1).mean() - (p.argmax(-1) == labels).double().mean())


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_temperatures_by_brier_score_and_gap_are_those_of_brute_force(
    name: str, fused_head: str, tmp_path: Path
) -> None:
    held_out = make_data(name, 12)
    trainer = make_trainer(
        tmp_path, name, max_steps=12, fit_temperature=True, calibration_dataset=held_out, fused_head=fused_head
    )
    trainer.add_callback(CalibrationCallback())
    trainer.train()
    passes = []
    moments = trainer._moments
    trainer._moments = lambda loader, wanted, *more: (passes.append(dict(wanted)), moments(loader, wanted, *more))[1]
    metrics = trainer.evaluate()
    logits, labels = float64_logits(trainer.model, held_out, shifted=name not in SEQ2SEQ)
    grid = [x / 50 for x in range(-230, 231)]
    start = min(grid, key=lambda x: brier(logits, labels, x))
    least = minimize_scalar(
        lambda x: brier(logits, labels, x), bracket=(start - 0.02, start, start + 0.02), options={"xtol": 1e-9}
    ).x
    crossing = brentq(lambda x: gap(logits, labels, x), *map(math.log, (0.01, 100)), xtol=1e-10)
    scaler = trainer.temperature_scaler
    # of float32 sums: a Brier score is flat to 1e-7 over 1e-4 in log T
    assert math.log(scaler.temperature_brier) == pytest.approx(least, abs=2e-4)
    assert math.log(scaler.temperature_gap) == pytest.approx(crossing, abs=1e-5)
    assert TemperatureScaler.load(tmp_path) == scaler and scaler.left_out == ""
    # one pass serves all three, and NLL's search takes no note of the others
    assert passes[0] == dict.fromkeys(("nll", "brier", "gap"), 1.0) and len(passes) == scaler.passes <= 12
    at_nll = TemperatureScaler.fit_moments(lambda t: _nll_moments(trainer, moments, held_out, t))
    for field in ("temperature", "nll_before", "nll_after", "tokens"):
        assert getattr(at_nll, field) == getattr(scaler, field), "equal to the bit"
    record = record_of(tmp_path, 12)["other_temperatures"]
    logits, labels = float64_logits(trainer.model, trainer.eval_dataset, shifted=name not in SEQ2SEQ)
    for fit, temperature in (("brier", scaler.temperature_brier), ("gap", scaler.temperature_gap)):
        assert metrics[f"eval_temperature_{fit}"] == temperature == record[fit]["temperature"]
        nll = float(torch.nn.functional.cross_entropy(logits / temperature, labels))
        assert metrics[f"eval_nll_scaled_by_{fit}"] == record[fit]["nll"] == pytest.approx(nll, rel=1e-5)
        found = metrics[f"eval_brier_scaled_by_{fit}"]
        assert found == record[fit]["brier"] == pytest.approx(brier(logits, labels, math.log(temperature)), rel=1e-5)
        assert 0 <= metrics[f"eval_ece_15_scaled_by_{fit}"] == record[fit]["ece_15"] <= 1
    on_the_split = trainer.evaluate(held_out.select(range(12)))
    scores = {fit: on_the_split[f"eval_brier_scaled{fit}"] for fit in ("", "_by_brier", "_by_gap")}
    assert min(scores, key=scores.__getitem__) == "_by_brier" and on_the_split["eval_nll_scaled"] == min(
        on_the_split[f"eval_nll_scaled{fit}"] for fit in scores
    )


def _nll_moments(trainer: Any, moments: Any, data: Any, temperature: float) -> Any:
    sums, tokens = moments(trainer.get_eval_dataloader(data), {"nll": temperature})
    return (*sums["nll"], tokens)


def test_a_fit_that_does_not_exist_is_left_out_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, fit_temperature=True, calibration_dataset=make_data("gpt2", 12))
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(8.0)
    trainer.calibration_dataset = with_labels_of_rank(trainer, make_data("gpt2", 12), [1])
    trainer.add_callback(CalibrationCallback())
    metrics = trainer.evaluate()
    assert metrics["eval_temperature"] > 0 and "eval_temperature_gap" not in metrics
    sentence = "Mean confidence is the accuracy at no temperature between 0.01 and 100.0: it is still above it at"
    record = record_of(tmp_path)
    assert sentence in record["other_temperatures"]["left_out"] and "gap" not in record["other_temperatures"]
    assert sentence in json.loads((tmp_path / "temperature.json").read_text(encoding="utf-8"))["left_out"]
    assert sentence in caplog.text


def test_a_brier_score_without_a_minimum() -> None:
    # two answers as likely as each other beside a certain one: the NLL has a minimum, the Brier score falls to T = 0
    logits = torch.tensor([[4.0, 0.0, 0.0, 0.0]] * 30 + [[0.0, 0.0, 0.0, 0.0]] * 2).double()
    labels = torch.tensor([0] * 30 + [1, 2])
    logits[0, 1] = 3.9
    with pytest.raises(ValueError, match="the NLL has no minimum"):
        TemperatureScaler.fit(logits, labels)
    labels[1] = 2
    logits[1] = torch.tensor([0.6, 0.0, 0.4, 0.0])
    fitted = TemperatureScaler.fit(logits, labels)
    grid = [x / 100 for x in range(-460, 461)]
    best = min(grid, key=lambda x: brier(logits, labels, x))
    if fitted.temperature_brier is None:
        assert "The Brier score has no minimum" in fitted.left_out and abs(best) > 4.5
    else:
        assert math.log(fitted.temperature_brier) == pytest.approx(best, abs=0.011)


@pytest.mark.parametrize("field", ["temperature_brier", "temperature_gap"])
def test_the_others_must_be_positive_too(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{field}=-1.0 must be a positive number"):
        TemperatureScaler(1.0, **{field: -1.0})  # type: ignore[arg-type]
    (tmp_path / "temperature.json").write_text('{"schema": 1, "temperature": 2.0, "split": "x"}', encoding="utf-8")
    assert TemperatureScaler.load(tmp_path).others == {}, "a file of an earlier version"


def test_a_process_that_sees_nothing_adds_nothing() -> None:
    sums, tokens = MomentSums({"brier": 1.0, "gap": 2.0}).finish(torch.device("cpu"))
    assert sums == {"brier": [0.0] * 3, "gap": [0.0] * 2} and tokens == 0


# ---- buckets by frequency ------------------------------------------------------------------------------------------


def expected_buckets(counts: Counter[int], logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Return the figures by their definition."""
    order = sorted(counts, key=lambda token: (-counts[token], token))
    total, before, members = sum(counts.values()), 0, [set() for _ in range(4)]
    for token in order:
        members[sum(before / total >= share for share in (0.5, 0.8, 0.95))].add(token)
        before += counts[token]
    members[3] |= set(range(logits.shape[-1])) - set(order)
    p = logits.softmax(-1)
    found = []
    for bucket in members:
        inside = torch.tensor([int(y) in bucket for y in labels])
        own = p.gather(1, labels[:, None])[:, 0][inside]
        mass = float(p[:, sorted(bucket)].sum(-1).mean())
        found.append({
            "types": len(bucket & set(order)), "tokens": int(inside.sum()), "share": float(inside.double().mean()),
            "mass": mass, "gap": mass - float(inside.double().mean()),
            "label_probability": float(own.mean()) if len(own) else None,
        })  # fmt: skip
    return found


def skewed(rows: int, seed: int) -> Any:
    """Return rows whose labels are the more frequent the smaller they are, as words of a text."""
    return make_data("gpt2", rows, seed).map(
        lambda row: {"labels": [y if y < 0 else 3 + (y * y) // 400 for y in row["labels"]]}, load_from_cache_file=False
    )


def check_buckets(record: dict[str, Any], counts: Counter[int], trainer: Any, data: Any) -> None:
    logits, labels = float64_logits(trainer.model, data, shifted=True)
    expected = expected_buckets(counts, logits, labels)
    assert record["shares"] == [0.5, 0.8, 0.95] and len(record["buckets"]) == 4
    for found, wanted in zip(record["buckets"], expected, strict=True):
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        assert found["interval"][0] < found["gap"] < found["interval"][1]
    assert sum(bucket["mass"] for bucket in record["buckets"]) == pytest.approx(1)
    assert sum(bucket["gap"] for bucket in record["buckets"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("least", [-1.7, 1.2])
def test_the_search_goes_downhill_where_the_score_is_not_convex(least: float) -> None:
    # -exp(-u^2), u the distance in log T from the least: at T = 1 it bends downwards, as a Brier score may
    def one_pass(wanted: Mapping[str, float]) -> tuple[dict[str, list[float]], int]:
        u = math.log(wanted["brier"]) - least
        value = -math.exp(-(u**2))
        return {"brier": [value, -2 * u * value, (4 * u**2 - 2) * value]}, 1

    found = BrierSearch()
    search(one_pass, found)
    assert found.temperature == pytest.approx(math.exp(least), rel=1e-6) and not found.failure


def test_a_token_that_was_never_counted_is_among_the_rarest() -> None:
    frequency = TokenFrequency.of_counts(torch.tensor([1, 0, 90]), "here")
    # 90 of 91 labels make up the first bucket; one beyond all counted ids is as rare as one that was counted 0 times
    assert frequency.of(torch.tensor([2, 0, 1, 3, 1000])).tolist() == [0, 3, 3, 3, 3]


@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_mass_and_labels_by_frequency_in_the_training_set(fused_head: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, frequency_buckets=True, fused_head=fused_head)
    trainer.train_dataset = skewed(40, 1).select(range(5, 40))
    trainer.add_callback(CalibrationCallback())
    data = skewed(11, 2)
    metrics = trainer.evaluate(data)
    record = record_of(tmp_path)["frequency"]
    counts = Counter(y for row in trainer.train_dataset["labels"] for y in row if y >= 0)
    assert record["counted_in"] == "the training set"
    check_buckets(record, counts, trainer, data)
    assert [bucket["least_count"] for bucket in record["buckets"]] == sorted(
        (bucket["least_count"] for bucket in record["buckets"]), reverse=True
    )
    assert not any("bucket" in key or "frequency" in key for key in metrics)


@pytest.mark.parametrize(
    ("streaming", "where"),
    [(False, "the evaluation set"), (True, "the first 256 samples of the evaluation set")],
)
def test_without_labels_to_count_in_training_the_evaluated_ones_are_counted(
    streaming: bool, where: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, frequency_buckets=True)
    trainer.train_dataset = make_data("gpt2", 8).remove_columns("labels")
    trainer.add_callback(CalibrationCallback())
    data = skewed(11, 2)
    trainer.evaluate(data.to_iterable_dataset() if streaming else data)
    record = record_of(tmp_path)["frequency"]
    assert record["counted_in"] == where
    check_buckets(record, Counter(y for row in data["labels"] for y in row if y >= 0), trainer, data)


def test_labels_that_a_collator_makes_cannot_be_counted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, frequency_buckets=True)
    trainer.train_dataset = None
    with pytest.raises(
        ValueError, match="the samples of this data set have no 'labels'.*leave frequency_buckets at off"
    ):
        trainer.evaluate(make_data("gpt2", 3).remove_columns("labels"))


def test_a_training_set_is_counted_once_and_another_anew() -> None:
    frequency, one, other = TrainingFrequency(), skewed(20, 1), skewed(20, 4)
    first = frequency.of(one, None)
    assert frequency.of(one, None) is first and frequency.of(other, None) is not first


def test_tokens_beyond_those_counted_are_rare_and_ties_go_to_the_smaller_id() -> None:
    found = TokenFrequency.of_counts(torch.tensor([0, 10, 10, 0, 1]), "here")
    assert found.buckets.tolist() == [3, 0, 0, 3, 3] and found.types == (2, 0, 0, 1) and found.least[1] is None
    assert found.of(torch.tensor([1, 4, VOCAB + 1000])).tolist() == [0, 3, 3]
