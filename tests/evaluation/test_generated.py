"""Free-running calibration: real generation, re-scored, against what generate itself says."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LENGTH, VOCAB, make_data, make_model
from torch import Tensor

from dpsm_hf.evaluation.generation import GENERATED_METRICS, GeneratedCalibration, generated_batch
from dpsm_hf.evaluation.generation.forecasts import forecast_figures
from dpsm_hf.rules.losses import score_tokens

EOS, PAD, BOS = 2, 1, 0


def inputs_of(name: str, rows: int = 4) -> dict[str, Tensor]:
    data = make_data(name, rows)
    return {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask", "labels")}


# Seeds of weights with which some outputs end early and others do not, and which never say the padding token.
SEEDS = {"bart": 9, "t5": 26}


def make_generator(name: str) -> Any:
    """Return a model that says more than one token, which `tiny` ones, with small tied weights, hardly do."""
    model: Any = make_model(name).eval()
    weights = torch.Generator().manual_seed(SEEDS.get(name, 0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3, generator=weights)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=weights) * 0.3)
        if name == "bart":
            model.model.decoder.embed_positions.weight.mul_(10)
            model.final_logits_bias[0, EOS] = 1.5
    return model


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    given = {key: value for key, value in inputs.items() if key != "labels"}
    return model.generate(**given, **options, return_dict_in_generate=True, output_logits=True, output_scores=True)


def rescore(model: Any, batch: dict[str, Tensor]) -> Tensor:
    given = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**given).logits
    targets = batch["labels"]
    if logits.shape[1] == batch.get("input_ids", logits).shape[1] and "decoder_input_ids" not in batch:
        targets = torch.nn.functional.pad(targets, (0, 1), value=-100)[:, 1:]
    return score_tokens(logits, targets).nll.reshape(targets.shape)


def sequences(rows: int = 40, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Return made-up ids and probabilities: tests of bookkeeping need no model."""
    g = torch.Generator().manual_seed(seed)
    generated = torch.randint(0, 12, (rows, length), generator=g)
    generated[torch.arange(length) >= torch.randint(1, length + 1, (rows, 1), generator=g)] = -100
    reference = torch.randint(0, 12, (rows, length + 2), generator=g)
    return {"generated": generated, "reference": reference, "nll": torch.rand(rows, length, generator=g) * 3}


def add(calibration: GeneratedCalibration, data: dict[str, Tensor], rows: slice | None = None, **more: Any) -> None:
    part = {key: value if rows is None else value[rows] for key, value in data.items()}
    calibration.update(part["generated"], part["reference"], nll=part["nll"], **more)


# ---- generated tokens, scored again --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_greedy_nll_is_what_generate_says(name: str) -> None:
    model, inputs = make_generator(name), inputs_of(name, 6)
    options = dict(max_new_tokens=10, do_sample=False, no_repeat_ngram_size=2)
    found = generate(model, inputs, **options)
    batch = generated_batch(model, inputs, found.sequences, **options)
    nll = rescore(model, batch)
    labels = batch["labels"]
    assert torch.equal(labels[labels >= 0], found.sequences[:, 1 : labels.shape[1] + 1][labels >= 0])
    said = torch.stack(found.logits, 1).log_softmax(-1)  # the model's own, before the processors
    expected = -said[:, : labels.shape[1]].gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    counted = labels != -100
    assert counted.sum() > 20 and len(labels[counted].unique()) > 8 and not counted.all(), "nothing to compare"
    torch.testing.assert_close(nll[counted], expected[counted], rtol=1e-5, atol=1e-5)
    assert (nll[~counted] == 0).all()


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_beam_nll_adds_up_to_the_score_of_the_beam(name: str) -> None:
    model, inputs = make_generator(name), inputs_of(name, 6)
    options = dict(max_new_tokens=10, num_beams=2, do_sample=False, length_penalty=0.0)
    found = generate(model, inputs, **options)
    batch = generated_batch(model, inputs, found.sequences, **options)
    total = rescore(model, batch).sum(1)
    torch.testing.assert_close(-total, found.sequences_scores, rtol=1e-5, atol=1e-5)
    greedy = generate(model, inputs, max_new_tokens=10, do_sample=False).sequences
    assert greedy.shape != found.sequences.shape or not torch.equal(greedy, found.sequences), (
        "the beam chose as greedy"
    )


def test_forced_tokens_are_inputs_but_not_the_models_choice() -> None:
    model, inputs = make_generator("bart"), inputs_of("bart", 6)
    options = dict(max_new_tokens=7, num_beams=2, do_sample=False, length_penalty=0.0,
                   forced_bos_token_id=BOS, forced_eos_token_id=EOS)  # fmt: skip
    found = generate(model, inputs, **options)
    assert (found.sequences[:, 1] == BOS).all() and (found.sequences[:, 7] == EOS).any()
    batch = generated_batch(model, inputs, found.sequences, **options)
    assert (batch["labels"][:, 0] == -100).all()
    assert (batch["decoder_input_ids"][:, 1] == BOS).all(), "what follows is conditioned on it"
    reached = found.sequences[:, 7] == EOS
    assert (batch["labels"][reached] != EOS).all()
    # a forced token costs the beam nothing, so the sums agree only if exactly the forced ones are left out
    torch.testing.assert_close(-rescore(model, batch).sum(1), found.sequences_scores, rtol=1e-5, atol=1e-5)
    # the same from the model's own generation config
    for key, value in options.items():
        setattr(model.generation_config, key, value)
    torch.testing.assert_close(generated_batch(model, inputs, found.sequences)["labels"], batch["labels"])


def test_an_end_token_that_was_not_forced_counts() -> None:
    model, inputs = make_generator("bart"), inputs_of("bart", 2)
    generated = torch.tensor([[EOS, BOS, 5, 6, EOS, PAD, PAD], [EOS, BOS, 7, 8, 9, EOS, PAD]])
    batch = generated_batch(
        model, inputs, generated, forced_bos_token_id=BOS, forced_eos_token_id=EOS, max_new_tokens=5
    )
    assert batch["labels"].tolist() == [[-100, 5, 6, EOS], [-100, 7, 8, 9]]
    assert batch["decoder_input_ids"].tolist() == [[EOS, BOS, 5, 6], [EOS, BOS, 7, 8]]


def test_what_follows_the_end_and_padding_do_not_count() -> None:
    model, inputs = make_generator("t5"), inputs_of("t5", 5)
    generated = torch.tensor(
        [
            [1, 5, PAD, 6, 2, 1, 1],  # the model said the padding token itself
            [1, 2, 1, 1, 1, 1, 1],  # ended at once
            [1, 5, 6, 7, 8, 9, 9],  # never ended
            [1, 5, 6, 2, 7, 2, 1],  # goes on behind its end
            [1, 5, 6, 1, 1, -100, -100],  # stopped from outside, padded twice
        ]
    )
    labels = generated_batch(model, inputs, generated)["labels"]
    assert labels.tolist() == [
        [5, PAD, 6, 2, -100, -100],
        [2, -100, -100, -100, -100, -100],
        [5, 6, 7, 8, 9, 9],
        [5, 6, 2, -100, -100, -100],
        [5, 6, -100, -100, -100, -100],
    ]
    several = generated_batch(model, inputs, generated, eos_token_id=[2, 6])["labels"]
    assert several[2].tolist() == [5, 6, -100]


def test_nothing_generated_is_one_ignored_label() -> None:
    model, inputs = make_generator("bart"), inputs_of("bart", 2)
    for generated in (torch.tensor([[EOS], [EOS]]), torch.tensor([[EOS, BOS], [EOS, BOS]])):
        batch = generated_batch(model, inputs, generated, forced_bos_token_id=BOS)
        assert batch["labels"].tolist() == [[-100], [-100]]
        assert (rescore(model, batch) == 0).all()


def test_the_collators_own_decoder_inputs_are_replaced() -> None:
    model, inputs = make_generator("bart"), inputs_of("bart", 2)
    inputs["decoder_input_ids"] = torch.full((2, LENGTH), 7)
    inputs["decoder_attention_mask"] = torch.ones(2, LENGTH)
    batch = generated_batch(model, inputs, torch.tensor([[EOS, 5, 6, EOS]] * 2))
    assert sorted(batch) == ["attention_mask", "decoder_input_ids", "input_ids", "labels"]
    assert batch["decoder_input_ids"].tolist() == [[EOS, 5, 6]] * 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_is_scored_behind_its_prompt(name: str) -> None:
    model, inputs = make_generator(name), inputs_of(name, 3)
    inputs["attention_mask"][0, :4] = 0  # padded at the left, as for generation
    inputs["attention_mask"][2, :1] = 0
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    found = generate(model, inputs, **options)
    batch = generated_batch(model, inputs, found.sequences, **options)
    assert (batch["labels"][:, :LENGTH] == -100).all()
    nll = rescore(model, batch)[:, LENGTH - 1 : -1]
    labels = batch["labels"][:, LENGTH:]
    expected = -torch.stack(found.logits, 1).log_softmax(-1)[:, : labels.shape[1]]
    expected = expected.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    counted = labels != -100
    assert counted.sum() > 8
    torch.testing.assert_close(nll[counted], expected[counted], rtol=1e-5, atol=1e-5)


def test_sequences_of_another_batch_are_refused() -> None:
    model, inputs = make_generator("bart"), inputs_of("bart", 2)
    with pytest.raises(ValueError, match=r"shape \(4, 3\).*num_return_sequences=1"):
        generated_batch(model, inputs, torch.full((4, 3), EOS))
    with pytest.raises(ValueError, match=r"begins with \[5\].*expected \[2\], the start token"):
        generated_batch(model, inputs, torch.tensor([[5, 6], [5, 6]]))
    decoder, prompts = make_generator("gpt2"), inputs_of("gpt2", 2)
    with pytest.raises(ValueError, match="the prompt"):
        generated_batch(decoder, prompts, torch.zeros(2, LENGTH + 2, dtype=torch.int64))


# ---- the accumulator -----------------------------------------------------------------------------------------------


def test_tokens_and_summaries_by_hand() -> None:
    calibration = GeneratedCalibration(special_tokens=[EOS])
    generated = torch.tensor([[5, 6, 7, EOS], [8, 9, EOS, -100]])
    reference = torch.tensor([[6, 5, 7, EOS], [3, 4, EOS, -100]])
    probability = torch.tensor([[0.5, 0.25, 0.8, 0.9], [0.4, 0.2, 0.1, 0.7]], dtype=torch.float64)
    calibration.update(generated, reference, nll=-probability.log(), text_quality=[0.75, 0.1])
    metrics = calibration.metrics()
    # of two common subsequences of length 2, 5 7 comes first; the end token is no text
    assert metrics["generated_tokens"] == 5
    assert metrics["generated_supported"] == pytest.approx(2 / 5)
    assert metrics["generated_confidence"] == pytest.approx((0.5 + 0.25 + 0.8 + 0.4 + 0.2) / 5)
    assert metrics["generated_signed_gap"] == pytest.approx(0.43 - 0.4)
    assert metrics["generated_nll"] == pytest.approx(-math.log(0.5 * 0.25 * 0.8 * 0.4 * 0.2) / 5)
    # 0.5, 0.8 are supported; of 6 pairs, 0.8 and 0.5 win all three each
    assert metrics["generated_auroc"] == 1.0
    assert metrics["generated_ece_15"] == pytest.approx((0.5 + 0.25 + 0.2 + 0.4 + 0.2) / 5)
    numbers = calibration.summaries()
    assert numbers["length"].tolist() == [4, 3]
    np.testing.assert_allclose(numbers["log_probability"], np.log([0.5 * 0.25 * 0.8 * 0.9, 0.4 * 0.2 * 0.1]))
    np.testing.assert_allclose(numbers["confidence"], [0.09**0.25, 0.008 ** (1 / 3)])
    np.testing.assert_allclose(numbers["quality"], [2 * 2 / 6, 0])
    assert metrics["summaries"] == 2 and metrics["summaries_empty"] == 0
    assert metrics["summary_length"] == 3.5
    assert metrics["summary_quality"] == pytest.approx(1 / 3)
    assert metrics["summary_log_probability"] == pytest.approx((math.log(0.09) / 4 + math.log(0.008) / 3) / 2)
    assert metrics["summary_rank_correlation"] == 1 and metrics["summary_auroc"] == 1
    assert metrics["summary_text_quality"] == pytest.approx(0.425)
    assert "summary_rank_correlation_low" not in metrics
    assert set(metrics) <= set(GENERATED_METRICS)


def test_supported_tokens_of_a_real_model() -> None:
    model, inputs = make_generator("bart"), inputs_of("bart", 8)
    generated = generate(model, inputs, max_new_tokens=10, num_beams=2, do_sample=False).sequences
    batch = generated_batch(model, inputs, generated, max_new_tokens=10)
    inputs["labels"][:4, :6] = batch["labels"][:4, :6]  # half of the references agree with the model at first
    calibration = GeneratedCalibration(special_tokens=[EOS, PAD, BOS])
    calibration.update(batch["labels"], inputs["labels"], nll=rescore(model, batch).reshape(-1))
    metrics, record = calibration.metrics(), calibration.record(15)
    assert metrics["summaries"] == 8 and metrics["generated_supported"] > 0.2
    assert metrics["summary_quality"] > 0.1
    assert set(metrics) <= set(GENERATED_METRICS)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["tokens"] == metrics["generated_tokens"] == sum(record["curve"]["count"])
    assert record["metrics"]["supported"] == metrics["generated_supported"]
    assert record["summary"]["count"] == 8 and len(record["summary"]["curve"]["quality"]) == 10
    assert "summary_text" not in record


def test_processes_join_to_what_one_would_have_found() -> None:
    data = sequences(20)
    alone = GeneratedCalibration(special_tokens=[EOS])
    for start in range(0, 20, 4):
        add(alone, data, slice(start, start + 4))
    states = []
    for process in range(2):
        one = GeneratedCalibration(special_tokens=[EOS])
        for start in range(4 * process, 24, 8):
            # the last batch of the second process only fills up
            rows = slice(start % 20, start % 20 + 4)
            add(one, data, rows, samples=torch.arange(start, start + 4), real=torch.full((4,), start < 20))
        states.append(one.state())
    joined = GeneratedCalibration.from_states(states[::-1])
    assert joined.summaries()["sample"].tolist() == list(range(20))
    for name, values in alone.summaries().items():
        np.testing.assert_array_equal(joined.summaries()[name], values, err_msg=name)
    assert torch.equal(joined.tokens.count, alone.tokens.count)
    for name, value in alone.metrics().items():
        assert joined.metrics()[name] == pytest.approx(value, rel=1e-12), name
    first, second = (GeneratedCalibration.from_states([state]) for state in states)
    assert first.merge(second).metrics() == joined.metrics()
    add(joined, data, slice(0, 4))
    assert joined.summaries()["sample"].tolist() == list(range(24)), "numbers go on behind the last"


def test_a_sample_counts_once() -> None:
    data = sequences(6)
    once, twice = GeneratedCalibration(), GeneratedCalibration()
    add(once, data)
    add(twice, data, samples=torch.arange(6))
    add(twice, data, slice(0, 3), samples=torch.tensor([5, 0, 2]))
    assert twice.metrics() == once.metrics()
    numbered = GeneratedCalibration()
    add(numbered, data, samples=torch.tensor([0, 1, 2, 3, 0, 0]))
    assert numbered.metrics()["summaries"] == 4
    with pytest.raises(ValueError, match="sample 0 was generated on two processes"):
        once.merge(twice)
    with pytest.raises(ValueError, match="special_tokens are"):
        once.merge(GeneratedCalibration(special_tokens=[3]))


def test_quality_of_the_text_may_come_later() -> None:
    data = sequences(12)
    calibration = GeneratedCalibration()
    numbers = torch.arange(12).flip(0)
    add(calibration, data, samples=numbers)
    assert "summary_text_quality" not in calibration.metrics()
    values = np.linspace(0, 1, 12)
    calibration.set_text_quality(values)
    found = calibration.summaries()
    assert found["text_quality"].tolist() == values.tolist() and found["sample"].tolist() == list(range(12))
    expected = forecast_figures(found["confidence"], values)
    assert calibration.metrics()["summary_text_rank_correlation"] == expected["rank_correlation"]
    assert "summary_text_rank_correlation_low" in calibration.metrics()
    with pytest.raises(ValueError, match=r"shape \(11,\); expected \[12\]"):
        calibration.set_text_quality(values[:-1])
    with pytest.raises(ValueError, match=r"quality 40.0 lies outside \[0, 1\]; divide"):
        calibration.set_text_quality(np.full(12, 40.0))


def test_empty_and_immediate_ends() -> None:
    calibration = GeneratedCalibration(special_tokens=[EOS])
    assert calibration.metrics() == {} and calibration.record(15) == {"tokens": 0}
    nothing = torch.full((2, 3), -100)
    calibration.update(nothing, torch.tensor([[4, 5], [-100, -100]]), nll=torch.full((2, 3), math.nan))
    assert calibration.metrics() == {"summaries": 0, "summaries_empty": 2}
    ended = torch.tensor([[EOS, -100, -100]])
    calibration.update(ended, torch.tensor([[4, EOS]]), nll=torch.tensor([[0.5, 0.0, 0.0]]))
    metrics = calibration.metrics()
    assert metrics["summaries"] == 1 and metrics["summaries_empty"] == 3
    assert metrics["summary_quality"] == 0, "the end of both texts is no agreement"
    assert metrics["summary_confidence"] == pytest.approx(math.exp(-0.5))
    assert "generated_tokens" not in metrics and "summary_rank_correlation" not in metrics
    json.dumps(calibration.record(15), allow_nan=False)
    calibration.update(nothing[:0], nothing[:0], nll=torch.zeros(0, 3))
    assert calibration.metrics() == metrics


def test_bad_input_adds_nothing() -> None:
    data = sequences(4)
    calibration = GeneratedCalibration()
    add(calibration, data)
    before = calibration.metrics()
    broken = data["nll"].clone()
    broken[2, 0] = math.nan
    with pytest.raises(FloatingPointError, match="token 0 of row 2 is NaN"):
        add(calibration, {**data, "nll": broken})
    with pytest.raises(ValueError, match=r"token 0 of row 0 has nll .* and probability 1.5"):
        add(calibration, data, probability=torch.full_like(data["nll"], 1.5))
    with pytest.raises(ValueError, match="expected -log p from 0 on"):
        add(calibration, {**data, "nll": -data["nll"]})
    with pytest.raises(ValueError, match=r"nll has shape \(4, 8\), but generated has \(4, 9\)"):
        add(calibration, {**data, "nll": data["nll"][:, :8]})
    with pytest.raises(ValueError, match="one reference for each"):
        add(calibration, {**data, "reference": data["reference"][:3]})
    with pytest.raises(ValueError, match="numbered from 0"):
        add(calibration, data, samples=torch.tensor([0, 1, -2, 3]))
    with pytest.raises(ValueError, match=r"samples has shape \(3,\)"):
        add(calibration, data, samples=torch.arange(3))
    with pytest.raises(ValueError, match=r"lies outside \[0, 1\]"):
        add(calibration, data, text_quality=[0.1, 0.2, math.nan, 0.3])
    with pytest.raises(ValueError, match="no intervals of 'summary_text'"):
        calibration.intervals("summary_text")
    with pytest.raises(ValueError, match="no state"):
        GeneratedCalibration.from_states([])
    with pytest.raises(ValueError, match="does not divide"):
        calibration.record(7000)
    assert calibration.metrics() == before


def test_a_mask_takes_tokens_out() -> None:
    data = sequences(4)
    mask = torch.ones_like(data["nll"], dtype=torch.bool)
    mask[:, 0] = False
    masked, plain = GeneratedCalibration(), GeneratedCalibration()
    add(masked, data, mask=mask)
    add(plain, {**data, "generated": torch.where(mask, data["generated"], -100)})
    assert masked.metrics() == plain.metrics()
    assert masked.metrics()["generated_tokens"] == int((data["generated"][:, 1:] >= 0).sum()) < VOCAB


def test_quality_is_rouge_l_of_the_token_ids() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    class Ids:
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    data = sequences()
    calibration = GeneratedCalibration(special_tokens=[EOS, PAD])
    add(calibration, data)
    scorer = RougeScorer(["rougeL"], tokenizer=Ids())
    words = [[str(i) for i in row if i not in (EOS, PAD, -100)] for row in data["generated"].tolist()]
    wanted = [[str(i) for i in row if i not in (EOS, PAD, -100)] for row in data["reference"].tolist()]
    expected = [scorer.score(" ".join(w), " ".join(g))["rougeL"].fmeasure for g, w in zip(words, wanted, strict=True)]
    np.testing.assert_allclose(calibration.summaries()["quality"], expected, rtol=1e-12)
