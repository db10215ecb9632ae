"""The benchmarks run end to end on tiny shapes, and the table names what they could not measure."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import common, coverage, evaluation, gpu_check, growth, head, plot, training_step
from benchmarks.hidden import hidden_states, token_ids
from dpsm_hf import TokenCalibration
from dpsm_hf.measuring import processes as measuring

CPU = torch.device("cpu")
COLUMNS = {
    "benchmark", "variant", "dtype", "tokens", "width", "vocabulary", "samples", "median_ms", "p10_ms", "p90_ms",
    "ratio", "ratio_p10", "ratio_p90", "peak_mib", "peak_ratio", "note", "date", "device", "torch", "transformers",
    "python", "commit",
}  # fmt: skip
ROOT = Path(common.HERE).parent
SESSION = common.HERE / "gpu_session.sh"


@pytest.fixture
def table(tmp_path: Path) -> common.Table:
    return common.Table(tmp_path / "folder" / "cpu.csv", CPU)


@pytest.fixture(autouse=True)
def default_grad_mode() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()


def measured(table: common.Table) -> dict[str, dict[str, str]]:
    """Return the rows by variant, after checking what every measured row has."""
    rows = common.read(table.path)
    for row in rows:
        assert set(row) == COLUMNS
        assert row["date"] and row["device"].startswith("CPU") and row["torch"] == torch.__version__
        if row["note"].startswith("failed"):
            assert not row["median_ms"]
            continue
        assert 0 < float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
        assert 0 < float(row["ratio_p10"]) <= float(row["ratio"]) <= float(row["ratio_p90"])
        assert int(row["samples"]) >= 1
    return {row["variant"]: row for row in rows}


@pytest.fixture
def peaks_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # importing torch and transformers once for each row would take minutes; test_memory_of_... does it for one
    monkeypatch.setattr(head, "peak_of", lambda *case: lambda variant: head.own_peak(variant, *case))


@pytest.mark.usefixtures("peaks_in_this_process")
def test_the_head_alone(table: common.Table) -> None:
    options = ["--tokens", "48", "--dims", "64", "--vocab", "5003", "--dtypes", "fp32", "--samples", "3", "--only",
               "research", "linear CE", "products", "ours", "--device", "cpu"]  # fmt: skip
    head.run(head.parser().parse_args(options), table, CPU)
    rows = measured(table)
    assert {"transformers CE", "research mix", "three products", "ours, ce", "ours, dpsm"} <= set(rows)
    assert not any("compiled" in name for name in rows)
    assert float(rows["transformers CE"]["ratio"]) == 1.0 and float(rows["transformers CE"]["peak_ratio"]) == 1.0
    assert all((row["samples"], row["tokens"], row["width"], row["vocabulary"]) == ("3", "48", "64", "5003")
               for row in rows.values())  # fmt: skip
    # 48 rows of 5003 float32 and the gradient of the weight are 2.1 MiB, and none of these does with less
    assert all(float(row["peak_mib"]) > 1.0 for name, row in rows.items() if name != "three products")


def test_variants_compute_the_same_losses() -> None:
    hidden, weight, labels = hidden_states(48, 64, 5003, CPU, torch.float32)
    assert (hidden.shape, weight.shape, labels.shape) == ((48, 64), (5003, 64), (48,))
    ce = head.transformers_ce(hidden, weight, labels)
    mix = head.research_mix(hidden, weight, labels)
    for variant, expected in (
        (head.ours("ce"), ce), (head.torch_linear_ce(16), ce), (head.tidy_mix, mix), (head.ours("dpsm"), mix),
    ):  # fmt: skip
        torch.testing.assert_close(variant(hidden, weight, labels), expected, rtol=1e-5, atol=1e-6)
    # the model has learned something of its text: a uniform guess costs log 5003 = 8.5 nats
    assert float(ce) < 8.0


def test_hidden_states_and_labels_belong_to_each_other() -> None:
    hidden, _, labels = hidden_states(300, 64, 4096, CPU, torch.float32)
    text = token_ids()
    assert hidden.shape == (300, 64) and hidden.is_contiguous() and torch.isfinite(hidden).all()
    # the label of a state is the token that follows it in real text
    start = next(i for i in range(len(text) - 300) if torch.equal(text[i : i + 300], labels))
    assert start > 0


def test_memory_is_measured_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    peak = head.peak_of("fp32", 512, 64, 8003)("ours, dpsm")
    assert peak is not None
    # the weight's gradient and one chunk are 9.8 MiB, two blocks of the row pass 8; all of the logits would be 16 more
    assert 9.8 < peak < 24
    assert common.peak_in_own_process("benchmarks.head", ["no such variant", "fp32", 8, 8, 8]) is None
    assert "no such variant" in capfd.readouterr().err


@pytest.mark.usefixtures("peaks_in_this_process")
def test_growth(table: common.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def small_states(tokens: int, width: int, vocabulary: int, *_: Any) -> tuple[torch.Tensor, ...]:
        asked.append((tokens, width, vocabulary))
        return torch.randn(tokens, 8), torch.randn(97, 8), torch.randint(97, (tokens,))

    # a model of its sizes would take this test half a minute to train
    monkeypatch.setattr(growth, "hidden_states", small_states)
    options = ["--tokens", "16", "32", "--vocab", "4096", "--dims", "64", "--samples", "3", "--device", "cpu"]
    growth.run(growth.parser().parse_args(options), table, CPU)
    measured(table)
    rows = common.read(table.path)
    assert [(row["benchmark"], row["variant"]) for row in rows] == [
        (f"growth with {size}", variant)
        for size in ("tokens", "tokens", "vocabulary", "width")
        for variant in ("transformers CE", "ours, dpsm")
    ]
    assert [tuple(int(row[name]) for name in ("tokens", "width", "vocabulary")) for row in rows[::2]] == asked
    assert [n for n, _, _ in asked[:2]] == [16, 32] and asked[2][2] == 4096 and asked[3][1] == 64


def tiny_model(name: str, how: str) -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=2, n_positions=32,
                                      bos_token_id=0, eos_token_id=0))  # fmt: skip


def memory_in_this_process(case: list[Any]) -> float | None:
    step = training_step.make_step(*case)
    step()
    return measuring.peak_above(step, CPU)


def test_training_steps(table: common.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "make_model", tiny_model)
    monkeypatch.setattr(training_step, "measure_memory", memory_in_this_process)
    options = ["--models", "gpt2", "--dtypes", "bf16", "--sequences", "2", "--length", "32", "--samples", "3",
               "--memory-length", "16", "--device", "cpu"]  # fmt: skip
    training_step.run(training_step.parser().parse_args(options), table, CPU)
    rows = common.read(table.path)
    memory = [("32", f"step gpt2{how}") for how in ("", ", no dropout", ", activation checkpointing")]
    assert [(row["tokens"], row["benchmark"]) for row in rows[4:]] == [case for case in memory for _ in range(2)]
    assert all(float(row["peak_mib"]) >= 0 and not row["median_ms"] for row in rows[4:])
    rows = rows[:4]
    assert [row["variant"] for row in rows] == ["Trainer, ce", "ours, ce", "ours, dpsm", "ours, dpsm, full logits"]
    for row in rows:
        assert set(row) == COLUMNS and row["samples"] == "3"
        assert float(row["ratio"]) > 0 and float(row["median_ms"]) > 0 and float(row["peak_mib"]) >= 0


def evaluation_memory_in_this_process(case: list[Any]) -> float | None:
    evaluate = evaluation.make_evaluation(*case)
    return common.peak_above(evaluate, CPU)


#: One evaluation of each variant, of the very small model.
ONE_TINY = "--tokens 256 --model tiny --dtypes fp32 --samples 1 --device cpu".split()


def test_evaluations(table: common.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "measure_memory", evaluation_memory_in_this_process)
    options = ["--tokens", "512", "--model", "tiny", "--dtypes", "fp32", "bf16", "--samples", "3", "--sizes", "256",
               "512", "--device", "cpu"]  # fmt: skip
    evaluation.run(evaluation.parser().parse_args(options), table, CPU)
    rows = common.read(table.path)
    assert all(set(row) == COLUMNS for row in rows)
    assert [(row["benchmark"], row["variant"], row["dtype"], row["tokens"]) for row in rows] == [
        *(
            ("evaluation, tiny", variant, dtype, "512")
            for dtype in ("fp32", "bf16")
            for variant in evaluation.VARIANTS
        ),
        *(("evaluation memory", "ours", "fp32", size) for size in ("256", "512")),
    ]
    for row in rows[:8]:
        assert row["samples"] == "3" and float(row["median_ms"]) > 0 and float(row["ratio"]) > 0
        assert (row["width"], row["vocabulary"], row["peak_mib"]) == ("64", "50257", "")
    for row in rows[8:]:
        assert not row["median_ms"] and float(row["peak_mib"]) >= 0
    options = [*ONE_TINY, "--no-memory"]
    evaluation.run(evaluation.parser().parse_args(options), table, CPU)
    assert len(common.read(table.path)) == len(rows) + 4


def test_evaluations_do_the_same_work() -> None:
    # what is compared are evaluations of the same tokens by the same weights
    made = [evaluation.make_evaluation(v, "fp32", 600, "tiny")() for v in evaluation.VARIANTS]
    plain, ours, all_of_it, drawn = made
    assert all_of_it["eval_tokens"] == 2 * (evaluation.LENGTH - 1)
    assert ours["eval_nll"] == pytest.approx(all_of_it["eval_nll"], rel=1e-9) == drawn["eval_nll"]
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert "eval_nll" not in plain and "eval_ece_15" in ours and "eval_classwise_ece" not in ours
    assert all_of_it["eval_temperature"] == 1.1 and all_of_it["eval_classwise_ece"] > 0
    rows = evaluation.make_rows(1000)
    assert len(rows) == 3 and torch.equal(torch.tensor(rows["labels"]).reshape(-1), token_ids()[: 3 * 256])


def test_an_evaluation_without_a_whole_sequence() -> None:
    with pytest.raises(ValueError, match="255 tokens are less than one sequence of 256"):
        evaluation.make_evaluation("ours", "fp32", 255, "tiny")


def test_memory_of_an_evaluation_comes_from_its_own_process(table: common.Table, monkeypatch: Any) -> None:
    peak = evaluation.measure_memory(["ours", "fp32", 512, "tiny"])
    # the tallies of the calibration metrics are 10 MiB; a batch of all logits would be 98
    assert peak is not None and 5 < peak < 90
    monkeypatch.setattr(evaluation, "measure_memory", lambda case: None)
    options = [*ONE_TINY, "--sizes", "512"]
    evaluation.run(evaluation.parser().parse_args(options), table, CPU)
    assert common.read(table.path)[-1]["note"] == "memory: not measured"


def test_a_variant_that_cannot_run_is_a_row_with_a_note(table: common.Table) -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nand more")

    calls = {"plain": lambda: torch.ones(2**18).exp_(), "broken": broken}
    found = common.measure(calls, "plain", samples=4, budget=60, device=CPU, clean=lambda: None)
    assert found["broken"] == {"note": "failed: RuntimeError: no such kernel"}
    assert found["plain"]["samples"] == 4 and found["plain"]["ratio"] == 1.0
    for name, columns in found.items():
        table.add(common.Row("head", name, "fp32", 1, 1, 1, **columns))  # type: ignore[arg-type]
    assert measured(table)["broken"]["note"] == "failed: RuntimeError: no such kernel"


def test_samples_are_paired_within_a_round_and_stop_with_the_budget() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in ("a", "b", "c")}
    found = common.measure(calls, "a", samples=50, budget=-1.0, device=CPU, clean=lambda: None)
    assert all(columns["samples"] == 3 for columns in found.values())
    rounds = [seen[-9:-6], seen[-6:-3], seen[-3:]]
    assert all(sorted(part) == ["a", "b", "c"] for part in rounds)
    assert len({part[0] for part in rounds}) == 3  # nobody is always first


def test_a_case_measured_again_replaces_its_row(table: common.Table) -> None:
    for median in (1.0, 2.0):
        table.add(common.Row("head", "ours, ce", "fp32", 8, 8, 8, samples=1, median_ms=median))
    table.add(common.Row("head", "ours, ce", "bf16", 8, 8, 8, samples=1, median_ms=3.0))
    assert [row["median_ms"] for row in common.read(table.path)] == ["2", "3"]


def test_peak_memory_counts_what_lives_at_once() -> None:
    # in a process of its own, as in the benchmarks: earlier tests have fragmented the heap of this one
    program = """
import torch
from dpsm_hf.measuring.processes import peak_above
def call():
    for _ in range(3):
        torch.ones(2**23)  # 32 MiB, freed before the next
first = peak_above(call, torch.device("cpu"))
kept = torch.ones(2**24)
print(first, peak_above(call, torch.device("cpu")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **measuring.EXACT_MEMORY}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    first, second = done.stdout.split()
    if first == "None":
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 31 < float(first) < 48 and float(second) == pytest.approx(float(first), abs=8)


def test_the_picture_and_the_table(table: common.Table) -> None:
    for dtype in ("fp32", "bf16"):
        for variant, ratio in (("transformers CE", 1.0), ("ours, dpsm", 0.7), ("three products", 0.5)):
            table.add(common.Row("head", variant, dtype, 1024, 768, 50257, 20, 10.0, 9.0, 11.0, ratio, ratio, ratio,
                                 100.0, ratio))  # fmt: skip
    table.add(common.Row("head", "Liger", "bf16", 1024, 768, 50257, note="not installed: no module"))
    for size in (256, 512):
        for variant in ("transformers CE", "ours, dpsm"):
            table.add(common.Row("growth with tokens", variant, "fp32", size, 256, 50257, 3, 1.0, 1.0, 1.0, 1.0, 1.0,
                                 1.0, float(size), 1.0))  # fmt: skip
    picture = plot.draw(table.path)
    assert picture.suffix == ".png" and picture.stat().st_size > 10_000
    text = plot.table(table.path)
    assert "not installed: no module" in text and "0.70" in text and "### growth with tokens" in text
    assert len([line for line in text.splitlines() if line.startswith("| 1024 ")]) == 7


@pytest.mark.parametrize("module", [head, growth, training_step, evaluation])
def test_help_names_every_option(module: Any) -> None:
    parser: argparse.ArgumentParser = module.parser()
    text = parser.format_help()
    assert "python -m benchmarks." in text
    assert all(option in text for option in ("--samples", "--budget", "--device", "--output"))


# ---- coverage of intervals ------------------------------------------------------------------------------------------


def test_coverage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "coverage.csv"
    coverage.main(["--repetitions", "2", "--samples", "20", "--output", str(path)])
    rows = common.read(path)
    assert [(row["model"], row["metric"]) for row in rows] == [
        (case.name, name) for case in coverage.CASES for name in coverage.METRICS
    ]
    for row in rows:
        assert row["repetitions"] == "2" and row["samples"] == "20" and row["commit"] and row["date"]
        assert {row["coverage"], row["coverage_basic"]} <= {"0", "0.5", "1"}
        assert float(row["width"]) > 0 and float(row["width_basic"]) >= 0
        if row["metric"] not in coverage.ERRORS:
            assert (row["coverage"], row["width"]) == (row["coverage_basic"], row["width_basic"])
        elif row["temperature"] == "1":
            assert row["truth"] == "0"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(coverage.CASES) and printed[0].startswith("| model | true ECE-15 | `ece_15` |")
    assert printed[-1].startswith("| T = 2, alike | 0.15")
    assert len({line.count("|") for line in printed}) == 1


def test_both_kinds_of_interval() -> None:
    calibration = TokenCalibration()
    calibration.update(**coverage.World(1.1, 0.3).sample(0, documents=60, length=20))
    reported, basic = coverage.both_intervals(calibration, 40)
    assert reported == calibration.intervals(samples=40)
    for name in coverage.METRICS:
        assert (basic[name] == reported[name]) == (name not in coverage.ERRORS), name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsm_hf.calibration.intervals.NOISE_RAISES", frozenset())
        assert basic == calibration.intervals(samples=40)


def test_coverage_counts_intervals_that_hold_the_truth() -> None:
    # of a calibrated model the basic bootstrap of an ECE over 100 bins never reaches down to 0, and the other one does
    case = coverage.Case("small", coverage.World(1.0, 0.0), documents=60, length=20)
    rows = {row["metric"]: row for row in coverage.measure(case, 5, 50)}
    assert rows["ece_100"]["coverage"] == 1 and rows["ece_100"]["coverage_basic"] == 0
    assert rows["ece_100"]["truth"] == 0 and rows["nll"]["truth"] == case.world.truth()["nll"]
    with pytest.raises(ValueError, match="--repetitions 0 must be at least 1"):
        coverage.run([case], 0, 20, Path("never-written.csv"))


def test_the_truth_is_what_the_metrics_tend_to() -> None:
    world = coverage.World(2.0, 0.2)
    calibration = TokenCalibration()
    calibration.update(**world.sample(1, documents=6000, length=50))
    truth, found = world.truth(), calibration.compute()
    for name in coverage.METRICS:
        if name != "mce":  # of the bin with the fewest tokens
            # the deviation of a mean over 300,000 tokens, of which 50 are alike, is below 0.004
            assert found[name] == pytest.approx(truth[name], abs=0.012), name
    assert truth["mce"] >= truth["ece_15"] > 0.1 and math.isfinite(truth["mce"])


# ---- what runs on a GPU, as far as it goes without one -------------------------------------------------------------


def test_the_gpu_checks_pass_on_a_cpu() -> None:
    found = gpu_check.run(CPU, ["torch"], small=True)
    assert len(found) > 80 and {check.name for check in found if not check.passed} == set()


def test_the_gpu_checks_see_errors() -> None:
    case = gpu_check.make_case(47, 123, 40, torch.float32, CPU)
    rule = {"scoring_rule": "dpsm", "alpha": 0.3}
    truth = gpu_check.unfused(case, rule, {}, torch.float64)
    plain = gpu_check.unfused(case, rule, {}, None)
    assert gpu_check.compare(truth, plain, plain, 0.0)[0]
    for i, name in enumerate(("loss", "hidden", "weight", "bias")):
        wrong = [t.clone() for t in plain]
        wrong[i] = wrong[i] * (1 + 1e-4)
        passed, text = gpu_check.compare(truth, plain, wrong, 0.0)
        assert not passed and name in text
    wrong = [t.clone() for t in plain]
    wrong[2][5, 3] = torch.nan
    assert not gpu_check.compare(truth, plain, wrong, 0.0)[0]
    assert not gpu_check.compare(truth, plain, gpu_check.unfused(case, {"scoring_rule": "ce"}, {}, None), 0.0)[0]


def test_the_gpu_session_says_what_is_missing(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(SESSION)], check=True)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false", "OUT": str(tmp_path), "DEVICE": "cpu"}
    done = subprocess.run(["bash", str(SESSION)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot be imported" in done.stdout
    assert (tmp_path / "gpu-environment.txt").exists() and (tmp_path / "gpu-session.log").exists()
