"""Single runs side by side: folders, sentences and the page, on small runs written by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from dpsm_hf.campaign.report.pictures import learning_curves
from dpsm_hf.campaign.report.sentences import POINTS, SingleRun, Story, story_of
from dpsm_hf.campaign.report.side_by_side import LOSS_TITLES, main, results_of, write_runs_page
from dpsm_hf.campaign.runner.collecting import read_run
from dpsm_hf.campaign.runner.records import Record, write_record
from dpsm_hf.plots.figures import run_style

METRICS: dict[str, float | None] = {
    "perplexity": 100.0,
    "nll": 4.6052,
    "brier": 0.80,
    "ece_10": 0.020,
    "ece_15": 0.020,
    "ece_100": 0.020,
    "token_accuracy": 0.25,
    "signed_gap": 0.01,
    "tokens": 5000.0,
}
EFFICIENCY = {"train_seconds": 50.0, "tokens_per_second": 4000.0, "peak_memory_mb": 900.0}
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


def sure(metrics: dict[str, float | None], width: float = 0.001) -> dict[str, float | None]:
    """Return metrics with an interval of each figure, by default so narrow that every difference tells."""
    bounds = {}
    for name, value in metrics.items():
        if value is not None and math.isfinite(value) and not name.endswith(("_low", "_high", "_null")):
            ends = sorted((value * (1 - width), value * (1 + width)))
            bounds |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return {**bounds, **metrics}


def record(loss: str, metrics: dict[str, float | None] = METRICS, width: float = 0.001, **changes: Any) -> Record:
    given: dict[str, Any] = {
        "arguments": {"scoring_rule": loss, "seed": 42},
        "status": "ok",
        "metrics": {"last": {"validation": sure(metrics, width)}},
        "history": history(alpha=loss == "dpsm"),
        "calibration": {"validation": {"step": 20, "split": "eval", "tokens": 100, "curve": CURVE}},
        "efficiency": EFFICIENCY,
    }
    return Record(loss, loss, "language-modelling", **{**given, **changes})


def story(*records: Record) -> Story:
    return story_of([SingleRun(r.name, LOSS_TITLES.get(r.name, r.name), r) for r in records])


def sentences(*records: Record) -> tuple[str, ...]:
    return story(*records).sentences


def text(*records: Record) -> str:
    return "\n".join(sentences(*records))


def page(tmp_path: Path, *records: Record, title: str = "Runs") -> Any:
    return write_runs_page(results_of(records, title), tmp_path, title)


def test_dpsm_better_on_everything() -> None:
    better = {**METRICS, "perplexity": 90.0, "brier": 0.76, "ece_15": 0.01, "token_accuracy": 0.3}
    first, *rest = sentences(record("ce"), record("dpsm", metrics=better))
    assert first == (
        "On this run DPSM is better than cross-entropy on perplexity, Brier score, ECE-15 and token accuracy "
        "and worse on none of the figures."
    )
    (figures,) = [sentence for sentence in rest if sentence.startswith("DPSM against")]
    assert "perplexity 10.0 % lower (90.00 against 100.00)" in figures
    assert "ECE-15 50.0 % lower (0.0100 against 0.0200)" in figures
    assert "token accuracy 5.00 points higher (30.00 % against 25.00 %)" in figures
    assert any("differences of a few per cent can be noise" in sentence for sentence in rest)


def test_dpsm_worse_on_everything_is_said_plainly() -> None:
    worse = {**METRICS, "perplexity": 350.0, "brier": 0.9, "ece_15": 0.04, "token_accuracy": 0.2}
    first, *rest = sentences(record("ce"), record("dpsm", metrics=worse))
    figures = "".join(rest)
    assert first.startswith(
        "On this run DPSM loses to cross-entropy: it is worse on perplexity, Brier score, ECE-15 and"
    )
    assert "perplexity 3.5 times as high (350.00 against 100.00)" in figures


def test_mixed_result_warns_that_low_ece_is_not_a_better_model() -> None:
    mixed = {
        **METRICS,
        "perplexity": 103.1,
        "ece_15": 0.0176,
        "ece_100": 0.03,
        "signed_gap": -0.02,
    }
    said = text(record("ce"), record("dpsm", metrics=mixed))
    assert (
        "DPSM is better than cross-entropy on ECE-15 and worse on perplexity; Brier score and token accuracy cannot"
        in said
    )
    assert "perplexity 3.1 % higher" in said and "ECE-15 12.0 % lower" in said
    assert "A lower ECE beside a higher perplexity is not a better model" in said
    assert "Mean confidence minus accuracy: cross-entropy +1.00 points (overconfident) and DPSM -2.00" in said
    assert "depends on the number of bins: DPSM is not to be told apart at 10, better at 15 and worse at 100" in said


def test_rouge_of_models_that_cannot_write_is_not_taken_for_a_result() -> None:
    weak, strong = {**METRICS, "rougeLsum": 4.9}, {**METRICS, "rougeLsum": 24.9}
    assert "ROUGE-Lsum reaches 10: none of these models writes usable texts" in text(
        record("ce", metrics={**METRICS, "rougeLsum": 2.6}), record("dpsm", metrics=weak)
    )
    assert "usable" not in text(record("ce", metrics=weak), record("dpsm", metrics=strong))


def test_equal_runs_are_called_equal() -> None:
    said = text(record("ce"), record("dpsm"))
    assert "come out the same within 0.5 % on every figure compared" in said
    assert "better" not in said.split("\n")[0]


def test_missing_figures_are_left_out_not_invented() -> None:
    few: dict[str, float | None] = {"perplexity": 110.0, "tokens": 5000.0}
    first, *rest = sentences(record("ce"), record("dpsm", metrics=few))
    assert "worse on perplexity" in first and not any("against" in said and "ECE-15 " in said for said in rest)
    assert "have no evaluation figure in common" in text(record("ce"), record("dpsm", metrics={"entropy": 1.0}))


def broken(tmp_path: Path) -> Record:
    """A run that no campaign has started and that ends with figures that are not finite."""
    entries = [*history(alpha=True), {"step": 30, "loss": math.nan, "nll": math.nan}]
    metrics: dict[str, float | None] = {**METRICS, "nll": math.nan, "perplexity": math.inf}
    return read_run(write_run(tmp_path / "dpsm", record("dpsm", metrics, history=entries)))


def test_a_diverged_run_is_reported_and_not_compared(tmp_path: Path) -> None:
    run = broken(tmp_path)
    assert run.status == "diverged"
    said = text(record("ce"), run)
    assert "The run 'dpsm' (DPSM) diverged (not finite from step 30 on) and is not compared." in said
    assert "against" not in said
    made = page(tmp_path / "page", record("ce"), run)
    assert "DPSM" not in made.table  # it has no row among those that are compared
    assert "DPSM, seed 42: diverged: its nll on the validation split is not finite" in made.html.read_text()


def test_a_failed_run_is_reported_with_its_reason() -> None:
    failed = record("brier", {}, status="failed", message="exit code 1: boom")
    said = text(record("ce"), record("dpsm"), failed)
    assert "The run 'brier' failed and is not compared: exit code 1: boom." in said
    for status, words in (("oom", "ran out of memory"), ("interrupted", "was interrupted")):
        said = text(record("ce"), record("dpsm"), record("brier", {}, status=status))
        assert f"The run 'brier' {words} and is not compared." in said


def test_without_a_reference_nothing_is_compared() -> None:
    assert "There is no finished 'ce' run to compare with." in text(record("dpsm"))
    assert "Only the reference run 'ce' has finished: there is nothing to compare it with." in text(record("ce"))


def test_scope_names_kind_split_bins_tokens_and_seed() -> None:
    said = text(record("ce"), record("dpsm"))
    for words in ("token-level on the validation split (5,000 tokens)", "top-label", "10, 15 and 100 bins", "seed 42"):
        assert words in said


def test_what_a_calibrated_model_would_show_is_said() -> None:
    said = text(record("ce", metrics={**METRICS, "ece_15_null": 0.00431}), record("dpsm"))
    assert "On 5,000 tokens even a perfectly calibrated model would show an ECE-15 of about 0.0043, so" in said
    assert "perfectly calibrated" not in text(record("ce"), record("dpsm"))


def test_the_same_start_is_stated_and_another_one_is_a_caution() -> None:
    assert "All runs started from the same weights" in text(record("ce"), record("dpsm"))
    said = text(record("ce"), record("dpsm", history=history(start=8.1, alpha=True)))
    assert "did NOT start from the same weights" in said and "8.1000" in said


def unlike_before(entries: list[dict[str, Any]], evaluated: bool, first_nll: float) -> list[dict[str, Any]]:
    """Return a history with the NLL of the first batch, without the evaluation before training unless evaluated."""
    kept = [entry for entry in entries if evaluated or entry["step"] or "eval_nll" not in entry]
    return [*kept, {"step": 1, "nll": first_nll, "loss": first_nll}]


def test_the_row_before_training_is_of_one_run_where_the_others_began_alike(tmp_path: Path) -> None:
    begun = history()
    begun[0] |= {"eval_perplexity": 2980.958, "eval_ece_15": 0.05}

    def rows(first_nll: float, other_nll: float, **more: Any) -> list[str]:
        ce = record("ce", history=unlike_before(begun, True, first_nll))
        dpsm = record("dpsm", history=unlike_before(history(), False, other_nll), **more)
        made = page(tmp_path, ce, dpsm)
        findings = json.loads(made.results.read_text(encoding="utf-8"))["findings"]
        return [
            line
            for line in (*made.table.split("\n"), *findings)
            if "before training" in line or "first training" in line
        ]

    row, said = rows(7.9, 7.9000001)  # sums in another order
    assert row.split() == ["before", "training", "2,980.96", "8.0000", "–", "–", "0.0500", "–", "–"]
    assert said == "All runs started from the same weights: the NLL of the first training batch is 7.9000 for each."
    assert not rows(7.9, 7.91)  # other weights, or another batch: nobody knows
    assert len(rows(7.9, 7.91, status="diverged")) == 1  # what is not compared need not have begun alike


def test_schedule_cost_and_overfitting_are_derived_from_the_log() -> None:
    slow = record("dpsm", efficiency={**EFFICIENCY, "tokens_per_second": 3600.0})
    said = text(record("ce"), slow)
    assert "DPSM: α reached 1 after 10 of 20 steps, so the last 50 % of training was pure Brier score." in said
    assert "DPSM trained 3,600 scored tokens a second and cross-entropy 4,000 (median of the log, 0.90 times" in said
    rising = record("ce", metrics={**METRICS, "nll": 5.5})
    risen = "The NLL of cross-entropy on the validation split was lowest at step 20 (4.6052) and has risen to 5.5000"
    assert risen in text(rising, slow)


def test_a_run_on_a_busy_machine_is_a_caution() -> None:
    def at(*speeds: float) -> Record:
        entries = [{"step": i, "loss": 5.0, "tokens_per_second": speed} for i, speed in enumerate(speeds, 1)]
        return record("ce", history=entries)

    said = text(at(4000, 4100, 900, 1000, 4000, 4200, 4000), record("dpsm"))
    assert "the run 'ce' shared the machine" in said and "varied between 900 and 4,200 tokens a second" in said
    # One slow entry is the start of the process, not another program.
    assert "Caution" not in text(at(900, 4000, 4100, 4000, 4200, 4000, 3900), record("dpsm"))


def test_a_run_that_got_less_of_the_processor_is_a_caution() -> None:
    def given(loss: str, cpu: float) -> Record:
        return record(loss, attempts=[{"seconds": 100.0}], efficiency={**EFFICIENCY, "cpu_seconds": cpu})

    said = text(given("ce", 180.0), given("dpsm", 90.0))
    assert "the run 'dpsm' shared the machine" in said and "0.9 processor cores where another run got 1.8" in said
    assert "Caution" not in text(given("ce", 180.0), given("dpsm", 170.0))


def test_best_of_a_column_knows_its_direction_and_ties(tmp_path: Path) -> None:
    better = record("dpsm", metrics={**METRICS, "perplexity": 90.0, "token_accuracy": 0.3, "ece_15": 0.01999})
    diverged = record("brier", metrics={**METRICS, "nll": None, "perplexity": 1.0}, status="diverged")
    table = page(tmp_path, record("ce"), better, diverged).table.split("\n\n")[0]
    lines = {line.split()[0]: line.split()[1:] for line in table.split("\n")[3:]}
    assert lines["DPSM"] == [
        "90.00*",
        "4.6052",
        "0.8000",
        "0.0200",
        "0.0200",
        "0.0200",
        "30.00*",
    ]  # ECE-15 is lower by less than its interval
    assert lines["cross-entropy"] == ["100.00", "4.6052", "0.8000", "0.0200", "0.0200", "0.0200", "25.00"]


def test_table_shows_directions_and_rouge_only_where_it_exists(tmp_path: Path) -> None:
    plain = page(tmp_path, record("ce"), record("dpsm")).table
    assert "perplexity ↓" in plain and "accuracy (%) ↑" in plain and "ROUGE" not in plain
    summaries = page(tmp_path, record("ce", metrics={**METRICS, "rouge1": 21.5}), record("dpsm")).table
    assert "ROUGE-1 ↑" in summaries and "21.50" in summaries
    few = page(tmp_path, record("ce"), record("dpsm", metrics={"perplexity": 90.0})).table
    assert re.search(r"DPSM +90.00\* +– ", few)


def write_run(directory: Path, made: Record, **more: Any) -> Path:
    (directory / "calibration").mkdir(parents=True)
    state = {"global_step": 20, "log_history": list(made.history)}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    results = {f"eval_{key}": value for key, value in made.metrics["last"]["validation"].items()}
    (directory / "all_results.json").write_text(json.dumps({**results, "train_runtime": 77.0}))
    for step in (5, 20):
        content = {"schema": 1, "step": step, "split": "eval", "tokens": 100, "curve": CURVE}
        (directory / "calibration" / f"eval-step-{step:06d}.json").write_text(json.dumps(content))
    content = {"name": made.name, "scoring_rule": made.name, "status": "finished", "seed": 42, "seconds": 60.0}
    content |= {
        "peak_memory_mb": 900.0,
        "command": ["python", "train.py", "--a", "b"],
        "versions": {"torch": "2.13.0"},
    }
    (directory / "run.json").write_text(json.dumps(content | more))
    return directory


def test_read_run_takes_everything_from_its_directory(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "ce", record("ce")))
    assert (run.name, run.arguments, run.status) == ("ce", {"scoring_rule": "ce", "seed": 42}, "ok")
    assert run.value("perplexity", split="validation") == 100.0
    assert run.efficiency["train_seconds"] == 10.0  # from the log: train_runtime counts evaluation too
    assert run.efficiency["tokens_per_second"] == 4000.0 and run.efficiency["peak_memory_mb"] == 900.0
    assert run.calibration["validation"]["step"] == 20 and len(run.history) == 5
    assert run.machine["versions"] == {"torch": "2.13.0"} and run.attempts[0]["seconds"] == 60.0
    failed = read_run(write_run(tmp_path / "brier", record("brier"), status="failed", message="boom"))
    assert (failed.status, failed.message) == ("failed", "boom")


def test_read_run_of_a_folder_without_results_takes_the_last_evaluation(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ce", record("ce"))
    (folder / "all_results.json").unlink()
    (folder / "run.json").unlink()
    run = read_run(folder)
    assert (run.name, run.status, run.arguments["scoring_rule"]) == ("ce", "ok", "ce")
    assert run.value("nll", split="validation") == 4.6052
    assert run.calibration["validation"]["step"] == 20


def test_read_run_takes_the_record_of_a_campaign(tmp_path: Path) -> None:
    write_record(record("focal"), tmp_path)
    assert read_run(tmp_path).name == "focal"


def test_read_run_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither trainer_state.json nor run.json"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{half")
    with pytest.raises(ValueError, match="trainer_state.json is not JSON"):
        read_run(tmp_path)


def test_report_is_one_page_without_outside_resources(tmp_path: Path) -> None:
    hostile = replace(record("dpsm"), run_id="x", name="<script>/x", command=["<b>"])
    report = page(tmp_path, record("ce"), record("dpsm"), hostile, title="A & B")
    html = report.html.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html and "A &amp; B" in html and "<b>" not in html
    for outside in ('src="http', "href=", "url(", "@import"):
        assert outside not in html
    assert html.count("data:image/svg+xml;base64,") == len(report.plots) >= 8
    assert all(path.exists() and path.suffix == ".png" for path in report.plots)
    assert {path.stem for path in report.plots} >= {"eval_nll-over-step", "eval_nll-over-seconds", "alpha-over-step"}
    assert sentences(record("ce"), record("dpsm"))[0] == report.sentences[0] and len(report.sentences) <= 1 + POINTS
    assert all(str(escape(sentence)) in html for sentence in report.sentences)
    assert "scoring_rule: dpsm" in html and "versions" not in html  # what it was made with, as far as it is known


def test_results_are_strict_json_even_for_a_diverged_run(tmp_path: Path) -> None:
    report = page(tmp_path / "page", record("ce"), broken(tmp_path))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(report.results.read_text(encoding="utf-8"), parse_constant=refuse)
    theirs, ours = content["runs"]
    assert theirs["status"] == "finished" and theirs["metrics"]["tokens_per_second"] == 4000.0
    assert theirs["calibration"]["curve"] == CURVE
    assert ours["status"] == "diverged" and ours["metrics"]["eval_nll"] is None
    assert ours["metrics"]["eval_brier"] == 0.8
    assert "diverged" in report.html.read_text(encoding="utf-8")


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same name \(ce, ce\)"):
        page(tmp_path, record("ce"), record("ce"))
    with pytest.raises(ValueError, match="at least one run"):
        page(tmp_path)


def test_command_line_reports_on_run_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / loss, record(loss))) for loss in ("ce", "dpsm")]
    assert main([*runs, "--output_dir", str(tmp_path / "report")]) == 0
    assert "cross-entropy" in capsys.readouterr().out and (tmp_path / "report" / "report.html").exists()
    assert main([str(tmp_path / "gone"), "--output_dir", str(tmp_path / "report")]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_ece_on_the_way_is_counted() -> None:
    def with_ece(loss: str, values: list[float]) -> Record:
        return record(loss, history=[{"step": step, "eval_ece_15": value} for step, value in enumerate(values)])

    ours, theirs = with_ece("dpsm", [0.9, 0.1, 0.3, 0.1, 0.1]), with_ece("ce", [0.9, 0.2, 0.2, 0.2, 0.2])
    assert "Over the 4 evaluations during training DPSM's ECE-15 was lower than cross-entropy's at 3" in text(
        theirs, ours
    )


def curves(key: str, x: str, *records: Record) -> Axes:
    results = results_of(records, "x")
    names = [r.name for r in records]
    figure = learning_curves(results, results.settings()[0], names, key, "label", x)
    assert figure is not None
    (ax,) = figure.axes
    return ax


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    assert box is not None
    return [entry.get_text() for entry in box.get_texts()]


def test_curves_show_each_run_and_name_the_axes() -> None:
    ax = curves("eval_nll", "seconds", record("ce"), record("dpsm"))
    assert legend(ax) == ["cross-entropy", "DPSM"]
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [0.0, 5.0, 10.0]
    assert ax.get_ylabel() == "label" and "seconds" in ax.get_xlabel()
    ax = curves("nll", "step", record("ce"), record("dpsm"))
    assert np.asarray(ax.get_lines()[1].get_xdata()).tolist() == [10, 20] and "step" in ax.get_xlabel()
    assert ax.get_lines()[0].get_color() == run_style("ce", 0)["color"] != ax.get_lines()[1].get_color()


def test_a_diverged_run_ends_at_its_last_finite_value() -> None:
    entries = [*history()[:5], {"step": 30, "eval_nll": None, "eval_train_seconds": 13.0}]
    entries.append({"step": 40, "eval_nll": 4.0, "eval_train_seconds": 14.0})
    ax = curves("eval_nll", "step", record("brier", history=entries, status="diverged"), record("ce", history=[]))
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [0, 10, 20]
    assert legend(ax) == ["Brier (not finite from step 30)"]
    assert len(ax.collections) == 1  # the cross


def test_alpha_is_drawn_between_zero_and_one() -> None:
    ax = curves("alpha", "step", record("ce"), record("dpsm"))
    assert np.asarray(ax.get_lines()[0].get_ydata()).tolist() == [1.0, 1.0] and legend(ax) == ["DPSM"]
    low, high = ax.get_ylim()
    assert low < 0 and high > 1
    results = results_of([record("ce")], "x")
    assert learning_curves(results, results.settings()[0], ["ce"], "alpha", "x") is None


def test_better_and_worse_are_said_only_where_intervals_are_apart() -> None:
    other = {**METRICS, "perplexity": 130.0, "ece_15": 0.012, "token_accuracy": 0.2, "brier": 0.801}
    told = story(record("ce", width=0.1), record("dpsm", metrics=other, width=0.1))
    assert told.headline == (
        "On this run DPSM is better than cross-entropy on ECE-15 and worse on perplexity and token accuracy; Brier "
        "score cannot be told apart."
    )
    wide = story(record("ce", width=0.5), record("dpsm", metrics=other, width=0.5))
    assert wide.headline == (
        "On this run DPSM and cross-entropy cannot be told apart on perplexity, Brier score, ECE-15 or token accuracy."
    )
    assert not re.search(r"better (?!model)|worse", " ".join(wide.sentences))


def test_nobody_leads_in_what_training_cost_and_a_busy_machine_is_not_compared(tmp_path: Path) -> None:
    def at(loss: str, *speeds: float) -> Record:
        entries = [{"step": i, "loss": 5.0, "tokens_per_second": speed} for i, speed in enumerate(speeds, 1)]
        return record(loss, history=entries, efficiency={**EFFICIENCY, "tokens_per_second": speeds[0]})

    quiet, busy = (4000.0,) * 7, (4100.0, 4100.0, 900.0, 1000.0, 4000.0, 4200.0, 4000.0)
    made = page(tmp_path, at("ce", *quiet), at("dpsm", *busy))
    cost = made.table.split("\n\n")[1]
    assert "tokens/s" in cost and "4,100" in cost and "*" not in cost
    assert '"best"' not in made.html.read_text().partition("Cost of training")[2]
    assert "times as many" not in text(at("ce", *quiet), at("dpsm", *busy))
    assert "times as many" in text(at("ce", *quiet), at("dpsm", *quiet))


def test_two_busy_runs_are_one_caution() -> None:
    entries = [
        {"step": i, "loss": 5.0, "tokens_per_second": speed}
        for i, speed in enumerate((4000, 4100, 900, 1000, 4000, 4200, 4000), 1)
    ]
    told = story(record("ce", history=entries), record("dpsm", history=entries))
    (caution,) = [sentence for sentence in told.points if sentence.startswith("Caution")]
    assert "the runs 'ce' and 'dpsm' shared the machine" in caution


def test_a_page_says_five_things_at_most_beside_its_headline() -> None:
    """Everything that can be said at once: the rest stands in the details."""
    bad = {**METRICS, "perplexity": 300.0, "ece_15": 0.01, "rougeLsum": 4.0, "nll": 5.7, "ece_15_null": 0.004}
    runs = [
        record("ce", metrics={**METRICS, "rougeLsum": 5.0}),
        record("dpsm", metrics=bad, history=history(start=8.1, alpha=True)),
        record("focal", metrics=bad),
        record("brier", {}, status="failed", message="boom"),
    ]
    told = story(*runs)
    assert len(told.points) == POINTS and len(told.details) > POINTS
    assert told.points[0].startswith("The run 'brier' failed") and "did NOT start" in told.points[1]
    assert len(set(told.sentences)) == len(told.sentences)


def test_the_page_of_interrupted_runs_has_no_empty_section_and_says_it_once(tmp_path: Path) -> None:
    stopped = record("ce", {}, status="interrupted", message="interrupted; it goes on from its newest checkpoint")
    html = page(tmp_path, stopped).html.read_text()
    assert ">Results<" not in html and "lower is better" not in html
    said = "The run &#39;ce&#39; was interrupted and is not compared: it goes on from its newest checkpoint."
    assert html.count(said) == 1
    html = page(tmp_path, record("ce"), replace(stopped, run_id="dpsm", name="dpsm")).html.read_text()
    shown = html.partition("How it was made")[0]
    assert ">Results<" in html and shown.count("interrupted") == 1


def test_how_a_run_stands_is_told_by_colour_and_sign(tmp_path: Path) -> None:
    other = {**METRICS, "perplexity": 130.0, "ece_15": 0.012, "token_accuracy": 0.2, "brier": 0.801}
    html = page(tmp_path, record("ce", width=0.1), record("dpsm", metrics=other, width=0.1)).html.read_text()
    against = html[html.index("Against cross-entropy") : html.index("</section>")]
    found = re.findall(r'data-label="([^"]+)" class="([^"]+)"><span>([^<]+)</span> <small>([^<]+)<', against)
    assert found == [
        ("perplexity", "worse", "worse", "(30.0 % higher)"),
        ("Brier score", "cannot-tell", "cannot tell", "(the same within 0.5 %)"),
        ("ECE-15", "better", "better", "(40.0 % lower)"),
        ("token accuracy", "worse", "worse", "(5.00 points lower)"),
    ]
