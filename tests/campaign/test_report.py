"""Records, sentences and the report, on small runs written by hand."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.comparison.findings import findings
from dpsm_hf.campaign.comparison.records import RunRecord, best_of, read_run, table_columns
from dpsm_hf.campaign.comparison.report import main, text_table, write_report

METRICS = {
    "eval_perplexity": 100.0,
    "eval_nll": 4.6052,
    "eval_brier": 0.80,
    "eval_ece_10": 0.020,
    "eval_ece_15": 0.020,
    "eval_ece_100": 0.020,
    "eval_token_accuracy": 0.25,
    "eval_signed_gap": 0.01,
    "eval_tokens": 5000.0,
    "train_seconds": 50.0,
    "tokens_per_second": 4000.0,
    "peak_memory_mb": 900.0,
}
CURVE = {"bins": 2, "edges": [0, 0.5, 1], "confidence": [0.2, 0.7], "accuracy": [0.25, 0.6], "count": [60, 40]}


def history(start: float = 8.0, end: float = 4.6052, alpha: bool = False) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"step": 0, "eval_nll": start, "eval_loss": start, "eval_train_seconds": 0.0}]
    if alpha:
        entries.insert(0, {"step": 0, "alpha_schedule": "linear: alpha 0 -> 1 over 10 steps (of 20)"})
    for step in (10, 20):
        entry: dict[str, Any] = {"step": step, "loss": 5.0, "nll": 5.0, "grad_norm": 1.0, "train_seconds": step / 2}
        if alpha:
            entry["alpha"] = step / 10 if step < 10 else 1.0
        entries.append(entry | {"tokens_per_second": 4000.0})
        nll = start + (end - start) * step / 20
        entries.append({"step": step, "eval_nll": nll, "eval_loss": nll, "eval_train_seconds": step / 2})
    return entries


def run(loss: str, **changes: Any) -> RunRecord:
    given: dict[str, Any] = {
        "metrics": METRICS,
        "log_history": history(alpha=loss == "dpsm"),
        "calibration": {"step": 20, "split": "eval", "tokens": 100, "curve": CURVE},
        "run": {"seed": 42},
    }
    return RunRecord(loss, loss, **{**given, **changes})


def text(*records: RunRecord) -> str:
    return "\n".join(findings(records))


def test_dpsm_better_on_everything() -> None:
    better = {**METRICS, "eval_perplexity": 90.0, "eval_brier": 0.76, "eval_ece_15": 0.01, "eval_token_accuracy": 0.3}
    first, figures, *rest = findings([run("ce"), run("dpsm", metrics=better)])
    assert first == (
        "On this run DPSM is better than cross-entropy on perplexity, Brier score, ECE-15 and token accuracy "
        "and worse on none of the figures compared."
    )
    assert "perplexity 10.0 % lower (90.00 against 100.00)" in figures
    assert "ECE-15 50.0 % lower (0.0100 against 0.0200)" in figures
    assert "token accuracy 5.00 points higher (30.00 % against 25.00 %)" in figures
    assert any("differences of a few per cent can be noise" in sentence for sentence in rest)


def test_dpsm_worse_on_everything_is_said_plainly() -> None:
    worse = {**METRICS, "eval_perplexity": 350.0, "eval_brier": 0.9, "eval_ece_15": 0.04, "eval_token_accuracy": 0.2}
    first, figures, *_ = findings([run("ce"), run("dpsm", metrics=worse)])
    assert first.startswith(
        "On this run DPSM loses to cross-entropy: it is worse on perplexity, Brier score, ECE-15 and"
    )
    assert "perplexity 3.5 times as high (350.00 against 100.00)" in figures


def test_mixed_result_warns_that_low_ece_is_not_a_better_model() -> None:
    mixed = {
        **METRICS,
        "eval_perplexity": 103.1,
        "eval_ece_15": 0.0176,
        "eval_ece_100": 0.03,
        "eval_signed_gap": -0.02,
    }
    said = text(run("ce"), run("dpsm", metrics=mixed))
    assert "DPSM is better than cross-entropy on ECE-15 and worse on perplexity." in said
    assert "perplexity 3.1 % higher" in said and "ECE-15 12.0 % lower" in said
    assert "A lower ECE beside a higher perplexity is not a better model" in said
    assert "Mean confidence minus accuracy: cross-entropy +1.00 points (overconfident) and DPSM -2.00" in said
    assert "depends on the number of bins: DPSM is equal at 10, better at 15 and worse at 100" in said


def test_rouge_of_models_that_cannot_write_is_not_taken_for_a_result() -> None:
    weak, strong = {**METRICS, "eval_rougeLsum": 4.9}, {**METRICS, "eval_rougeLsum": 24.9}
    assert "ROUGE-Lsum reaches 10: none of these models writes usable texts" in text(
        run("ce", metrics={**METRICS, "eval_rougeLsum": 2.6}), run("dpsm", metrics=weak)
    )
    assert "usable" not in text(run("ce", metrics=weak), run("dpsm", metrics=strong))


def test_equal_runs_are_called_equal() -> None:
    said = text(run("ce"), run("dpsm"))
    assert "come out the same within 0.5 % on every figure compared" in said
    assert "better" not in said.split("\n")[0]


def test_missing_figures_are_left_out_not_invented() -> None:
    few = {"eval_perplexity": 110.0, "eval_tokens": 5000.0}
    first, figures, *_ = findings([run("ce"), run("dpsm", metrics=few)])
    assert "worse on perplexity" in first and "ECE" not in figures
    assert "have no evaluation figure in common" in text(run("ce"), run("dpsm", metrics={"eval_entropy": 1.0}))


def test_a_diverged_run_is_reported_and_not_compared() -> None:
    entries = [*history(), {"step": 30, "loss": math.nan, "nll": math.nan}]
    broken = run("dpsm", metrics={**METRICS, "eval_nll": math.nan, "eval_perplexity": math.nan}, log_history=entries)
    said = text(run("ce"), broken)
    assert "The run 'dpsm' (DPSM) diverged (not finite from step 30 on) and is not compared." in said
    assert "against" not in said
    table = text_table([run("ce"), broken])
    assert "NaN" in table


def test_a_failed_run_is_reported_with_its_reason() -> None:
    failed = RunRecord("brier", "brier", status="failed", message="exit code 1: boom")
    said = text(run("ce"), run("dpsm"), failed)
    assert "The run 'brier' failed and is not compared: exit code 1: boom." in said


def test_without_a_reference_nothing_is_compared() -> None:
    assert "There is no finished 'ce' run to compare with." in text(run("dpsm"))
    assert "Only the reference run 'ce' has finished: there is nothing to compare it with." in text(run("ce"))


def test_scope_names_kind_split_bins_tokens_and_seed() -> None:
    said = text(run("ce"), run("dpsm"))
    for words in ("token-level on the eval split (5,000 tokens)", "top-label", "10, 15 and 100 bins", "seed 42"):
        assert words in said


def test_noise_floor_of_ece_matches_a_simulation() -> None:
    generator = random.Random(0)
    floors = []
    for _ in range(2000):
        right = [sum(generator.random() < c for _ in range(n)) for n, c in ((60, 0.2), (40, 0.7))]
        floors.append(abs(right[0] - 12) / 100 + abs(right[1] - 28) / 100)
    said = text(run("ce"), run("dpsm"))
    stated = float(re.findall(r"ECE-2 of about ([0-9.]+),", said)[0])
    assert stated == pytest.approx(sum(floors) / len(floors), rel=0.05)


def test_the_same_start_is_stated_and_another_one_is_a_caution() -> None:
    assert "All runs started from the same weights" in text(run("ce"), run("dpsm"))
    said = text(run("ce"), run("dpsm", log_history=history(start=8.1, alpha=True)))
    assert "did NOT start from the same weights" in said and "8.1000" in said


def test_schedule_cost_and_overfitting_are_derived_from_the_log() -> None:
    slow = run("dpsm", metrics={**METRICS, "tokens_per_second": 3600.0})
    said = text(run("ce"), slow)
    assert "α reached 1 after 10 of 20 steps, so the last 50 % of training was pure Brier score." in said
    assert "DPSM trained 3,600 scored tokens a second and cross-entropy 4,000 (median of the log, 0.90 times" in said
    rising = run("ce", metrics={**METRICS, "eval_nll": 5.5})
    assert "held-out NLL of cross-entropy was lowest at step 20 (4.6052) and has risen to 5.5000" in text(rising, slow)


def test_a_run_on_a_busy_machine_is_a_caution() -> None:
    def at(*speeds: float) -> RunRecord:
        entries = [{"step": i, "loss": 5.0, "tokens_per_second": speed} for i, speed in enumerate(speeds, 1)]
        return run("ce", log_history=entries)

    said = text(at(4000, 4100, 900, 1000, 4000, 4200, 4000), run("dpsm"))
    assert "the run 'ce' shared the machine" in said and "varied between 900 and 4,200 tokens a second" in said
    # One slow entry is the start of the process, not another program.
    assert "Caution" not in text(at(900, 4000, 4100, 4000, 4200, 4000, 3900), run("dpsm"))


def test_a_run_that_got_less_of_the_processor_is_a_caution() -> None:
    def given(loss: str, cpu: float) -> RunRecord:
        return run(loss, run={"seed": 42, "seconds": 100.0, "cpu_seconds": cpu})

    said = text(given("ce", 180.0), given("dpsm", 90.0))
    assert "the run 'dpsm' shared the machine" in said and "0.9 processor cores where another run got 1.8" in said
    assert "Caution" not in text(given("ce", 180.0), given("dpsm", 170.0))


def test_best_of_a_column_knows_its_direction_and_ties() -> None:
    records = [run("ce"), run("dpsm", metrics={**METRICS, "eval_perplexity": 90.0, "eval_token_accuracy": 0.3})]
    columns = {column.key: column for _, group in table_columns(records) for column in group}
    assert best_of(records, columns["eval_perplexity"]) == {"dpsm"}
    assert best_of(records, columns["eval_token_accuracy"]) == {"dpsm"}
    assert best_of(records, columns["eval_brier"]) == set()
    broken = run("brier", metrics={**METRICS, "eval_nll": math.nan, "eval_perplexity": 1.0})
    assert best_of([*records, broken], columns["eval_perplexity"]) == {"dpsm"}


def test_table_shows_directions_and_rouge_only_where_it_exists() -> None:
    plain = text_table([run("ce"), run("dpsm")])
    assert "perplexity ↓" in plain and "accuracy (%) ↑" in plain and "ROUGE" not in plain
    summaries = text_table([run("ce", metrics={**METRICS, "eval_rouge1": 21.5}), run("dpsm")])
    assert "ROUGE-1 ↑" in summaries and "21.50" in summaries and "–" in summaries
    with pytest.raises(ValueError, match="at least one run"):
        text_table([])


def write_run(directory: Path, record: RunRecord, **more: Any) -> Path:
    (directory / "calibration").mkdir(parents=True)
    state = {"global_step": 20, "log_history": list(record.log_history)}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    results = {key: value for key, value in record.metrics.items() if key.startswith("eval_")}
    (directory / "all_results.json").write_text(json.dumps({**results, "train_runtime": 77.0}))
    for step in (5, 20):
        content = {"schema": 1, "step": step, "split": "eval", "tokens": 100, "curve": CURVE}
        (directory / "calibration" / f"eval-step-{step:06d}.json").write_text(json.dumps(content))
    content = {"name": record.name, "loss_type": record.loss_type, "status": "finished", "seed": 42, "seconds": 60.0}
    content |= {
        "peak_memory_mb": 900.0,
        "command": ["python", "train.py", "--a", "b"],
        "versions": {"torch": "2.13.0"},
    }
    (directory / "run.json").write_text(json.dumps(content | more))
    return directory


def test_read_run_takes_everything_from_its_directory(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "ce", run("ce")))
    assert (record.name, record.loss_type, record.status) == ("ce", "ce", "finished")
    assert record.metrics["eval_perplexity"] == 100.0
    assert record.metrics["train_seconds"] == 10.0  # from the log: train_runtime counts evaluation too
    assert record.metrics["tokens_per_second"] == 4000.0 and record.metrics["peak_memory_mb"] == 900.0
    assert record.calibration is not None and record.calibration["step"] == 20
    assert record.comparable and len(record.log_history) == 5


def test_read_run_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither trainer_state.json nor run.json"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{half")
    with pytest.raises(ValueError, match="trainer_state.json is not JSON"):
        read_run(tmp_path)


def test_report_is_one_page_without_outside_resources(tmp_path: Path) -> None:
    hostile = RunRecord("<script>/x", "dpsm", METRICS, history(alpha=True), run={"command": ["<b>"]})
    report = write_report([run("ce"), run("dpsm"), hostile], tmp_path, title="A & B")
    page = report.html.read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "A &amp; B" in page and "<b>" not in page
    for outside in ('src="http', "href=", "url(", "@import"):
        assert outside not in page
    assert page.count("data:image/svg+xml;base64,") == len(report.plots) >= 8
    assert all(path.exists() and path.suffix == ".png" for path in report.plots)
    assert {path.stem for path in report.plots} >= {"eval_nll-over-step", "eval_nll-over-seconds", "alpha-over-step"}
    assert all(sentence in report.sentences for sentence in findings([run("ce"), run("dpsm"), hostile]))


def test_results_are_strict_json_even_for_a_diverged_run(tmp_path: Path) -> None:
    broken = run("dpsm", metrics={**METRICS, "eval_nll": math.nan, "eval_perplexity": math.inf})
    report = write_report([run("ce"), broken], tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(report.results.read_text(encoding="utf-8"), parse_constant=refuse)
    ours = content["runs"][1]
    assert ours["status"] == "diverged" and ours["metrics"]["eval_nll"] is None
    assert ours["metrics"]["eval_brier"] == 0.8
    assert "diverged" in report.html.read_text(encoding="utf-8")


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same name \(ce, ce\)"):
        write_report([run("ce"), run("ce")], tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path)


def test_command_line_reports_on_run_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / loss, run(loss))) for loss in ("ce", "dpsm")]
    assert main([*runs, "--output_dir", str(tmp_path / "report")]) == 0
    assert "cross-entropy" in capsys.readouterr().out and (tmp_path / "report" / "report.html").exists()
    assert main([str(tmp_path / "gone"), "--output_dir", str(tmp_path / "report")]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_ece_on_the_way_is_counted() -> None:
    def with_ece(loss: str, values: list[float]) -> RunRecord:
        record = run(loss)
        record.log_history[:] = [{"step": step, "eval_ece_15": value} for step, value in enumerate(values)]
        return record

    ours, theirs = with_ece("dpsm", [0.9, 0.1, 0.3, 0.1, 0.1]), with_ece("ce", [0.9, 0.2, 0.2, 0.2, 0.2])
    assert "Over the 4 evaluations during training DPSM's ECE-15 was lower than cross-entropy's at 3" in text(
        theirs, ours
    )
