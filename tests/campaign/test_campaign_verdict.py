"""The verdict on records made by hand: each of holds, fails and cannot tell, for each family of claims."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from dpsm_hf.campaign.spec.design import Point
from dpsm_hf.campaign.verdict.claims import Finding, claims_of
from dpsm_hf.campaign.verdict.results import Results
from dpsm_hf.campaign.verdict.verdict import overall, verdict
from tests.campaign.hand_made import VARIATIONS, campaign, records

PLAIN = VARIATIONS[:3]


def judged(
    make: Any, seeds: tuple[int, ...] = (1, 2, 3), studies: tuple[str, ...] = ("main",), variations: Any = PLAIN
) -> dict[tuple[str, str], Finding]:
    made = campaign(seeds, studies, variations)
    found = verdict(Results(made, records(made, make)))
    assert len({(f.key, f.variation) for f in found}) == len(found)
    return {(f.key, f.variation): f for f in found}


def of_metric(name: str, values: Mapping[str, tuple[float, ...]]) -> Any:
    return lambda point: {"metrics": {name: values[point.variation][point.seed - 1]}}


@pytest.mark.parametrize(
    ("ours", "word"),
    [((50.1, 51.1, 49.1), "holds"), ((52.0, 53.05, 51.02), "fails"), ((50.0, 52.0, 49.5), "cannot tell")],
)
def test_a_perplexity_gap(ours: tuple[float, ...], word: str) -> None:
    values = {"ce-baseline": (50.0, 51.0, 49.05), "brier-baseline": (70.0, 70.0, 70.0), "dpsm-linear": ours}
    finding = judged(of_metric("perplexity", values))["perplexity-gap", "dpsm-linear"]
    assert finding.decision == word and finding.pairs == 3 and finding.at_most == 0.3
    gaps = [x - y for x, y in zip(ours, values["ce-baseline"], strict=True)]
    mean, se = sum(gaps) / 3, stats.tstd(gaps) / math.sqrt(3)
    assert finding.estimate == pytest.approx(mean)
    assert (finding.low, finding.high) == pytest.approx(stats.t.interval(0.9, 2, mean, se))
    assert finding.p_value == pytest.approx(stats.ttest_1samp(gaps, 0.3, alternative="less").pvalue)
    assert ("chance of 80%" in finding.note) == (word == "cannot tell")


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ((65.0, 66.0, 64.0), "holds"), ((75.0, 76.0, 75.5), "fails"), ((69.0, 72.0, 70.0), "cannot tell"),
        ((70.0, 70.5, 70.0), "cannot tell"),  # Brier's own figures, seed by seed: nothing is known of a spread
        ((69.9, 70.2, 69.85), "holds"),
    ],
)  # fmt: skip
def test_never_worse_than_both(ours: tuple[float, ...], word: str) -> None:
    values = {"ce-baseline": (50.0, 51.0, 49.05), "brier-baseline": (70.0, 70.5, 70.0), "dpsm-linear": ours}
    assert judged(of_metric("perplexity", values))["not-worst", "dpsm-linear"].decision == word


@pytest.mark.parametrize(
    ("ours", "gain", "as_brier"),
    [
        ((0.020, 0.021, 0.019), "holds", "holds"),
        ((0.0395, 0.041, 0.040), "fails", "fails"),
        ((0.0341, 0.0357, 0.0331), "fails", "fails"),  # 15 % below cross-entropy's
        ((0.020, 0.035, 0.028), "cannot tell", "cannot tell"),
    ],
)
def test_calibration_is_judged_by_ratios(ours: tuple[float, ...], gain: str, as_brier: str) -> None:
    values = {"ce-baseline": (0.040, 0.042, 0.039), "brier-baseline": (0.021, 0.022, 0.020), "dpsm-linear": ours}
    found = judged(of_metric("ece_15", values))
    finding = found["ece-gain", "dpsm-linear"]
    logs = [math.log(x / y) for x, y in zip(ours, values["ce-baseline"], strict=True)]
    assert finding.estimate == pytest.approx(math.exp(sum(logs) / 3))
    assert (finding.decision, found["ece-brier", "dpsm-linear"].decision) == (gain, as_brier)
    assert found["ece-gain-scaled", "dpsm-linear"].pairs == 0, "no temperature was fitted"


def test_scaled_figures_and_a_variation_that_reads_them() -> None:
    def make(point: Point) -> dict[str, Any]:
        plain = {"ce-baseline": 0.040, "brier-baseline": 0.022, "dpsm-linear": 0.020, "focal": 0.030}[point.variation]
        plain += 0.0001 * point.seed
        scaled = plain / 4 + 0.00001 * point.seed
        return {"metrics": {"ece_15": plain, "ece_15_scaled": scaled, "temperature": 1.2}}

    found = judged(make, variations=VARIATIONS)
    scaled = found["ece-gain", "ce+tempscale"]  # against cross-entropy as it is
    assert scaled.estimate == pytest.approx(0.25, rel=0.01) and scaled.decision == "holds"
    assert {key for key, name in found if name == "ce+tempscale"} == {"ece-gain", "ece-brier"}
    assert found["ece-gain-scaled", "dpsm-linear"].estimate == pytest.approx(0.5, rel=0.01)
    assert found["ece-gain", "focal"].role == "ablation"


def curves(ours: tuple[float, float], brier: tuple[float, float]) -> Any:
    """Return runs of 400 steps from NLL 10; given are the seconds of a hundred steps and the NLL at the end."""
    both = {"ce-baseline": (10.0, 2.0), "dpsm-linear": ours, "brier-baseline": brier}

    def make(point: Point) -> dict[str, Any]:
        pace, end = both[point.variation]
        pace *= 1 + {"dpsm-linear": 0.01, "brier-baseline": 0.013}.get(point.variation, 0.0) * point.seed
        return {"curve": [(pace * i, 10.0 + (end - 10.0) * min(1.0, i / 3)) for i in range(5)]}

    return make


def test_time_to_the_quality_of_cross_entropy() -> None:
    made = campaign(variations=PLAIN)
    results = Results(made, records(made, curves((10.0, 2.0), (30.0, 2.0))))
    point = made.points[0]
    # from 10 to 2 in 300 steps of 0.1 s; 95 % of the way is at 285
    assert results.to_quality(point) == pytest.approx((28.5, 285.0))
    assert results.values(point.setting, "brier-baseline", "steps_to_quality")[1] == pytest.approx(285.0)
    found = judged(curves((10.0, 2.0), (30.0, 2.0)))
    assert found["time-to-quality", "dpsm-linear"].decision == "holds"
    assert found["time-to-quality-brier", "dpsm-linear"].decision == "holds"
    found = judged(curves((15.0, 2.0), (16.0, 2.0)))
    assert found["time-to-quality", "dpsm-linear"].decision == "fails"
    assert found["time-to-quality-brier", "dpsm-linear"].decision == "fails"


def test_the_quality_to_reach_is_that_of_the_same_seed() -> None:
    made = campaign(variations=PLAIN)

    def make(point: Point) -> dict[str, Any]:  # the reference of seed 2 goes half the way of seed 1's
        end = 2.0 if point.seed == 1 or point.variation != "ce-baseline" else 6.0
        return {"curve": [(10.0 * i, 10.0 + (end - 10.0) * min(1.0, i / 3)) for i in range(5)]}

    results = Results(made, records(made, make))
    steps = results.values(made.points[0].setting, "dpsm-linear", "steps_to_quality")
    assert (steps[1], steps[2]) == pytest.approx((285.0, 142.5))


def test_a_reference_that_ended_early_sets_no_quality_to_reach() -> None:
    whole = curves((10.0, 2.0), (30.0, 2.0))

    def make(point: Point) -> dict[str, Any]:
        made = whole(point)
        cut = point.variation == "ce-baseline"
        return {"curve": made["curve"][:2] if cut else made["curve"], "status": "interrupted" if cut else "ok"}

    finding = judged(make)["time-to-quality-brier", "dpsm-linear"]
    assert (finding.pairs, finding.decision) == (0, "cannot tell")


def test_a_reference_that_was_not_evaluated_before_training_sets_none() -> None:
    made = campaign(variations=PLAIN)
    found = records(made, curves((10.0, 2.0), (30.0, 2.0)))
    late = {i: replace(r, history=[e for e in r.history if e["step"]]) for i, r in found.items()}
    assert Results(made, late).to_quality(made.points[0]) is None


def test_a_run_that_had_the_quality_before_it_began() -> None:
    made = campaign(variations=PLAIN, quality=("rougeL", True))

    def make(point: Point) -> dict[str, Any]:
        return {"efficiency": {"train_seconds": 40.0}}

    found = {}
    for run_id, record in records(made, make).items():
        never = record.name == "dpsm-linear/2"
        rouge = [1.0, 1.0] if never else [30.0, 30.0]  # at once, or never
        history = [{"step": 100 * i, "eval_rougeL": r, "eval_train_seconds": 20.0 * i} for i, r in enumerate(rouge)]
        found[run_id] = replace(record, history=history)
    findings = {(f.key, f.variation): f for f in verdict(Results(made, found))}
    finding = findings["time-to-quality", "dpsm-linear"]
    assert finding.decision == "cannot tell" and "1 of its 3 runs never got there" in finding.note


def test_runs_that_never_arrive() -> None:
    # Brier ends at 6 after 160 s, ours arrives after 30: at most a fifth of Brier's time, whatever that would be
    found = judged(curves((10.0, 2.0), (40.0, 6.0)))
    finding = found["time-to-quality-brier", "dpsm-linear"]
    assert finding.decision == "holds" and finding.high is not None and finding.high < 0.25 and finding.low is None
    assert "3" in finding.note and "at most" in finding.note
    # ours never arrives in 40 s of training where cross-entropy took 28.5: the time is at least 1.4 times as long
    finding = judged(curves((10.0, 6.0), (40.0, 6.0)))["time-to-quality", "dpsm-linear"]
    assert finding.decision == "fails" and finding.low is not None and finding.low > 1.1 and finding.high is None
    # it stopped before cross-entropy arrived: nothing is known
    finding = judged(curves((5.0, 6.0), (40.0, 6.0)))["time-to-quality", "dpsm-linear"]
    assert finding.decision == "cannot tell"
    # neither of the two arrives
    assert judged(curves((10.0, 6.0), (40.0, 6.0)))["time-to-quality-brier", "dpsm-linear"].decision == "cannot tell"


@pytest.mark.parametrize(
    ("speed", "memory", "words"),
    [(1000.0, 900.0, ("holds", "holds")), (900.0, 2000.0, ("fails", "fails")), (None, None, ("cannot tell",) * 2)],
)
def test_efficiency(speed: float | None, memory: float | None, words: tuple[str, str]) -> None:
    def make(point: Point) -> dict[str, Any]:
        ours = point.variation == "dpsm-linear"
        return {
            "efficiency": {
                "tokens_per_second": (speed if ours else 1000.0)
                and (speed if ours else 1000.0) + (1 + ours) * point.seed,  # type: ignore[operator]
                "peak_memory_mb": memory if ours else 1000.0 + point.seed,
            }
        }

    found = judged(make)
    assert (found["throughput", "dpsm-linear"].decision, found["memory", "dpsm-linear"].decision) == words


def robust(good: int, cells: int) -> Any:
    """Return runs whose perplexity is lower than cross-entropy's in ``good`` of the other studies' cells."""
    seen: list[tuple[str, int]] = []

    def make(point: Point) -> dict[str, Any]:
        if point.variation != "dpsm-linear":
            return {"metrics": {"perplexity": 50.0 + point.seed}}
        key = (point.study, point.seed)
        if point.study != "main" and key not in seen:
            seen.append(key)
        better = point.study == "main" or seen.index(key) < good
        return {"metrics": {"perplexity": 50.0 + point.seed + (-1.0 if better else 1.0)}}

    return make


@pytest.mark.parametrize(("theirs", "estimate"), [((50.0, 51.0, 49.0), 2.0), ((52.0, 53.0, 51.0), 0.0)])
def test_seeds_that_all_show_the_same_tell_nothing(theirs: tuple[float, ...], estimate: float) -> None:
    values = {"ce-baseline": theirs, "brier-baseline": (70.0, 70.1, 70.3), "dpsm-linear": (52.0, 53.0, 51.0)}
    finding = judged(of_metric("perplexity", values))["perplexity-gap", "dpsm-linear"]
    assert (finding.decision, finding.estimate, finding.pairs) == ("cannot tell", estimate, 3)
    assert (finding.low, finding.high, finding.p_value, finding.p_fails) == (None,) * 4
    assert "every seed shows exactly the same" in finding.note


@pytest.mark.parametrize(("opposite", "word"), [(0, "fails"), (2, "fails"), (5, "cannot tell"), (8, "cannot tell")])
def test_a_worse_sign_that_returns_is_no_merit(opposite: int, word: str) -> None:
    better = robust(opposite, 8)

    def make(point: Point) -> dict[str, Any]:  # worse in the main study, and in all but some of the other cells
        main = point.study == "main" and point.variation == "dpsm-linear"
        return {"metrics": {"perplexity": 51.0 + point.seed}} if main else better(point)

    found = judged(make, seeds=(1, 2), studies=("main", "noise", "books", "lower", "small"))
    finding = found["same-sign-perplexity-gap", "dpsm-linear"]
    assert (finding.decision, finding.estimate) == (word, (8 - opposite) / 8)
    assert "worse than cross-entropy in the first setting" in finding.note


@pytest.mark.parametrize(("good", "word"), [(8, "holds"), (6, "holds"), (5, "fails")])
def test_signs_in_other_settings(good: int, word: str) -> None:
    found = judged(robust(good, 8), seeds=(1, 2), studies=("main", "noise", "books", "lower", "small"))
    finding = found["same-sign-perplexity-gap", "dpsm-linear"]
    assert (finding.decision, finding.pairs, finding.estimate) == (word, 8, good / 8)
    low, high = stats.binomtest(good, 8).proportion_ci(0.95, method="exact")
    assert (finding.low, finding.high) == pytest.approx((low, high))


def test_shared_runs_and_studies_without_a_reference_are_no_other_settings() -> None:
    made = campaign((1, 2), ("main", "noise", "grid", "warm-up"), PLAIN)
    ids = {(p.study, p.variation, p.seed): p.run_id for p in made.points}
    points = tuple(
        replace(p, run_id=ids["main", p.variation, p.seed]) if p.study == "grid" else p
        for p in made.points
        if p.study != "warm-up" or p.variation == "dpsm-linear"
    )
    made = replace(made, points=points)
    found = {f.key: f for f in verdict(Results(made, records(made, robust(0, 2)))) if f.variation == "dpsm-linear"}
    finding = found["same-sign-perplexity-gap"]  # the grid would agree with itself
    assert (finding.setting, finding.pairs, finding.estimate) == ("1 other setting", 2, 0.0)


def test_signs_are_those_of_the_first_setting_or_of_none() -> None:
    made = campaign((1, 2), ("main", "noise"), PLAIN)
    gone = {p.run_id for p in made.points if p.study == "main"}
    found = {i: r for i, r in records(made, robust(2, 2)).items() if i not in gone}
    findings = {f.key: f for f in verdict(Results(made, found)) if f.variation == "dpsm-linear"}
    assert "no difference whose sign could return" in findings["same-sign-perplexity-gap"].note


def test_missing_runs_leave_signs_open() -> None:
    whole = robust(8, 8)
    found = judged(
        lambda p: None if p.study == "noise" and p.variation == "dpsm-linear" else whole(p),
        seeds=(1, 2), studies=("main", "noise", "books"),
    )  # fmt: skip
    finding = found["same-sign-perplexity-gap", "dpsm-linear"]
    assert finding.decision == "cannot tell" and "2 missing" in finding.note


def test_one_seed_tells_nothing_and_two_little() -> None:
    values = {"ce-baseline": (50.0, 51.0), "brier-baseline": (70.0, 70.0), "dpsm-linear": (49.0, 50.2)}
    one = judged(of_metric("perplexity", values), seeds=(1,))["perplexity-gap", "dpsm-linear"]
    assert (one.decision, one.low, one.p_value, one.pairs) == ("cannot tell", None, None, 1)
    assert one.estimate == pytest.approx(-1.0) and "one seed" in one.note
    two = judged(of_metric("perplexity", values), seeds=(1, 2))["perplexity-gap", "dpsm-linear"]
    assert two.low is not None and two.high is not None and two.high - two.low > 1.2  # 12.6 standard errors


def test_failed_and_missing_runs_are_named_and_never_counted() -> None:
    values = {"ce-baseline": (50.0,) * 3, "brier-baseline": (70.0,) * 3, "dpsm-linear": (50.1, 50.12, 1e9)}
    make = of_metric("perplexity", values)
    for status in ("oom", "diverged", "failed", "interrupted", "pruned", None):
        found = judged(
            lambda p, status=status: (
                (None if status is None else {**make(p), "status": status})
                if p.seed == 3 and p.variation == "dpsm-linear"
                else make(p)
            )
        )
        finding = found["perplexity-gap", "dpsm-linear"]
        assert finding.pairs == 2 and "missing: seed 3" in finding.note
        assert finding.estimate == pytest.approx(0.11)


def test_holm_corrects_over_the_variations_of_a_role() -> None:
    from dataclasses import replace

    others = tuple(replace(PLAIN[2], name=f"dpsm-{i}", arguments={"i": i}) for i in range(3))
    gaps = (0.05, 0.06, 0.19)  # p of .03 alone

    def make(point: Point) -> dict[str, Any]:
        ours = point.variation.startswith("dpsm")
        return {"metrics": {"perplexity": 50.0 + (gaps[point.seed - 1] if ours else 0.0)}}

    alone = judged(make)["perplexity-gap", "dpsm-linear"]
    assert alone.decision == "holds" and alone.p_adjusted == alone.p_value
    assert alone.p_value is not None and 0.0125 < alone.p_value < 0.05
    family = judged(make, variations=(*PLAIN, *others))
    four = family["perplexity-gap", "dpsm-linear"]
    assert four.p_value == alone.p_value and four.p_adjusted == pytest.approx(4 * alone.p_value)
    assert four.decision == "cannot tell"
    # an ablation is in another family
    ablations = tuple(replace(v, role="ablation") for v in others)
    assert judged(make, variations=(*PLAIN, *ablations))["perplexity-gap", "dpsm-linear"].decision == "holds"


def test_overall_needs_every_setting() -> None:
    def finding(setting: str, word: str) -> Finding:
        return Finding("k", "quality", "", "v", setting, "main", word, None, None, None, None, None, "", "", 3)

    for words, joint in (
        (("holds", "holds"), "holds"), (("holds", "cannot tell"), "cannot tell"), (("cannot tell", "fails"), "fails"),
    ):  # fmt: skip
        assert overall([finding(str(i), w) for i, w in enumerate(words)], "v") == {"k": joint}


def test_summaries_are_judged_by_rouge() -> None:
    made = campaign(variations=PLAIN, task="summarization", quality=("rougeL", True))
    values = {"ce-baseline": 20.0, "brier-baseline": 15.0, "dpsm-linear": 20.6}
    pace = {"ce-baseline": 0.11, "brier-baseline": 0.14, "dpsm-linear": 0.12}
    found = records(made, lambda p: {"metrics": {"rougeL": values[p.variation] + pace[p.variation] * p.seed}})
    by_key = {f.key: f for f in verdict(Results(made, found))}
    assert by_key["rouge-gain"].decision == "holds" and by_key["not-worst"].decision == "holds"
    assert len({c.key for c in claims_of("summarization")}) == len(claims_of("summarization"))
