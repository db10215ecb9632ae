"""The report of a campaign from records made by hand: what is on the page, and that the page needs nothing else."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dpsm_hf.campaign.audit.audit import audited_runs
from dpsm_hf.campaign.report.pictures import Pictures, colours, learning_curves, pareto, reliability_pictures
from dpsm_hf.campaign.report.report import write_campaign_report
from dpsm_hf.campaign.report.tables import (
    AFTER,
    QUALITY,
    Column,
    Table,
    comparison,
    cost,
    differences,
    document_table,
    spread,
)
from dpsm_hf.campaign.report.words import claim_line, headline, shown
from dpsm_hf.campaign.runner.records import Record, write_record
from dpsm_hf.campaign.spec.design import Campaign, Point, Variation
from dpsm_hf.campaign.verdict.claims import Finding
from dpsm_hf.campaign.verdict.results import Results
from dpsm_hf.plots.figures import empty_figure, plain_log_axis
from tests.campaign.hand_made import VARIATIONS, campaign, records

pytestmark = pytest.mark.slow
STUDIES = ("main", "flipped-targets")
LEVEL = {"ce-baseline": 50.0, "brier-baseline": 80.0, "dpsm-linear": 53.0, "focal": 56.0}
CURVE = {
    "edges": [i / 15 for i in range(16)], "count": [400 - 20 * i for i in range(15)],
    "confidence": [(i + 0.5) / 15 for i in range(15)], "accuracy": [(i + 0.4) / 15 for i in range(15)],
}  # fmt: skip


def make(point: Point) -> dict[str, Any]:
    level = LEVEL[point.variation] + 0.3 * point.seed + (2.0 if point.study != "main" else 0.0)
    level += 0.004 * (point.seed - 2) * (point.variation != "ce-baseline")  # of three seeds, so that means stay
    ece = level / 1500
    values = {"perplexity": level, "nll": float(np.log(level)), "ece_15": ece, "ece_10": ece, "brier": 0.8}
    scaled = {f"{name}_scaled": value / (4 if "ece" in name else 1.01) for name, value in values.items()}
    return {
        "metrics": {**values, **scaled, "temperature": 1.1},
        "curve": [(10.0 * i, 8.0 - i * (8.0 - float(np.log(level))) / 4) for i in range(5)],
        "efficiency": {"tokens_per_second": 5000.0 + point.seed, "peak_memory_mb": 800.0, "energy_joules": None},
    }


def blocks(rng: np.random.Generator, worse: float) -> dict[str, np.ndarray]:
    count = rng.integers(20, 40, size=(16, 15))
    confidence = count * (np.arange(15) + 0.5) / 15
    sums = {"count": count, "correct": np.round(confidence * 0.9), "confidence": confidence}
    sums |= {"nll": count.sum(1) * (4 + worse), "brier": count.sum(1) * 0.8, "spherical": count.sum(1) * 0.3}
    return {**sums, "labels": np.array("abc")}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Campaign, Path, dict[str, Record]]:
    made = campaign(studies=STUDIES, variations=VARIATIONS, source="name: by-hand\n# <b>&</b>\n")
    found = records(made, make)
    for run_id, record in found.items():
        folder = tmp_path / "runs" / run_id
        folder.mkdir(parents=True)
        rng = np.random.default_rng(record.arguments["seed"])
        np.savez(folder / "last-test.npz", **blocks(rng, 0.1 * (record.arguments["scoring_rule"] != "ce")))
        found[run_id] = replace(
            record,
            documents={"last-test": "last-test.npz"},
            calibration={"test": {"step": 400, "split": "test", "tokens": 3900, "curve": CURVE}},
            samples=[{"prompt": "The <module>", "reference": "is | here", "output": f"was {record.name}"}],
            machine={"device": "CPU, 2 cores", "versions": {"torch": "2.13.0"}, "commit": "abc", "dirty": False},
            attempts=[{"started": "2026-01-01T00:00:00", "seconds": 41.0, "exit_code": 0, "from_step": 0}],
        )
        write_record(found[run_id], folder)
    return made, tmp_path, found


class Outside(HTMLParser):
    """Collect what a page would fetch, and check that its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, folder, _ = written
    paths = write_campaign_report(made, folder)
    assert [p.name for p in paths] == ["report.html", "report.md", "verdict.json", "figures.json"]
    page = Outside()
    page.feed(paths[0].read_text())
    assert not page.open
    assert page.links and all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    for words in (
        "Verdict", "DPSM, linear", "has a perplexity at most 0.3 above cross-entropy's", "How to reproduce it",
        "Quality against calibration", "The <module>", "# <b>&</b>", "after temperature scaling", "in brackets",
        "By documents", "CPU, 2 cores",
    ):  # fmt: skip
        assert words in page.text, words
    assert "53.60 ± 0.30 ***" in page.text  # differs from cross-entropy by 3 in each seed: no variance, p = 0
    markdown = paths[1].read_text()
    pictures = re.findall(r"\]\((plots/[^)]+)\)", markdown)
    assert len(pictures) == len(set(pictures)) > 8 and len(pictures) == len(list((folder / "plots").iterdir()))
    assert all((folder / picture).stat().st_size > 5000 for picture in pictures)
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and " cannot tell | " in line[:20]]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    verdict = json.loads(paths[2].read_text())
    assert verdict["overall"]["dpsm-linear"]["perplexity-gap"] == "fails"
    (said,) = [line for line in verdict["headline"] if line.startswith("DPSM, linear: ")]
    assert "Fails: perplexity within 0.3 of cross-entropy's" in said
    assert not [key for of in verdict["overall"].values() for key in of if key in said and "-" in key]
    assert len(verdict["findings"]) > 20
    assert json.loads(paths[3].read_text())["tables"][0]["rows"]


def test_the_same_records_give_the_same_report(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, folder, _ = written
    first = [path.read_bytes() for path in write_campaign_report(made, folder)]
    assert [path.read_bytes() for path in write_campaign_report(made, folder)] == first


def test_an_audit_is_judged_and_shown(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, folder, _ = written
    runs = audited_runs(made)
    variations = {
        name: {
            "title": name, "status": "ok", "run": runs[name].id,
            "samples": [{"seconds": s, "reference_seconds": 1.0} for s in (0.9, 0.91)],
            "peak_memory_mb": 700.0, "peak_memory_difference_mb": -50.0,
        }
        for name in ("ce-baseline", "brier-baseline", "dpsm-linear")
    }  # fmt: skip
    content = {
        "settings": {"tokens": 2000, "repeats": 2}, "machine": {"device": "CPU, 2 cores"}, "reference": "ce-baseline",
        "scale": "small", "variations": variations,
    }  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(content))
    page = write_campaign_report(made, folder)[0].read_text()
    assert "needs at most 500 MB more memory than cross-entropy for a step of the same batch" in page
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["overall"]["dpsm-linear"]["audited-memory"] == "holds"
    assert verdict["overall"]["dpsm-linear"]["audited-throughput"] == "holds"


def test_a_seed_without_a_temperature_is_not_read_as_scaled(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    made, folder, found = written
    for record in found.values():
        if record.name in ("ce-baseline/1", "ce-baseline/2"):
            path = folder / "runs" / record.run_id / "last-test.npz"
            with np.load(path) as arrays:
                kept = dict(arrays)
            scaled = {f"{name}_scaled": kept[name] for name in ("count", "correct", "confidence")}
            np.savez(path, **kept, **scaled, nll_scaled=kept["nll"] * 0.9)
    results = Results(made, found)
    table = document_table(results, results.settings("main")[0], folder)
    assert table is not None
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["cross-entropy, temperature-scaled"][0] == "2" and rows["DPSM, linear"][0] == "3"
    assert rows["cross-entropy, temperature-scaled"][1].startswith("-")


def test_a_study_says_what_is_missing_and_what_it_is_compared_with(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    made, _, found = written
    made = replace(made, points=tuple(replace(p, size="big") if p.study == "main" else p for p in made.points))
    for run_id, record in found.items():
        if record.arguments["study"] != "main" and record.name == "focal/2":
            found[run_id] = replace(record, status="failed", message="out of ink")
    (table,) = differences(Results(made, found), QUALITY["language-modelling"])
    assert table.caption.endswith(
        "in brackets its mean difference from clean cross-entropy of main; big; docs, same seed"
    )
    row = next(row for row in table.rows if row[0].text == "focal loss")
    assert "(2 of 3)" in row[1].text and table.notes == ["focal loss, seed 2: failed: out of ink"]


def test_pictures_of_two_data_sets_have_files_of_their_own(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, folder, _ = written
    points, long = [], {"a_rather_long_name_of_an_argument_of_the_script": "x" * 300}
    for point in made.points:
        for data in ("docs", "books") if point.study != "main" else ("docs",):
            points += [
                replace(point, data=data, settings={"alpha": a, "beta": b, **long} if point.study != "main" else {})
                for a in ("1", "2") for b in ("3", "4")
            ]  # fmt: skip
    markdown = write_campaign_report(replace(made, points=tuple(points)), folder)[1].read_text()
    grids = [p for p in re.findall(r"\]\((plots/[^)]+)\)", markdown) if "grid" in p]
    assert len(grids) == len(set(grids)) == 2 * 2 * len(VARIATIONS)
    assert all((folder / grid).exists() for grid in grids)


def test_every_ending_is_named(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, folder, found = written
    by_name = {record.name: record for record in found.values() if record.arguments["study"] == "main"}
    for name, status, message in (
        ("dpsm-linear/1", "diverged", "the loss is NaN at step 120"),
        ("focal/1", "pruned", ""),
        ("focal/2", "pruned", "told otherwise"),
        ("focal/3", "pruned", "left out: a long account"),
    ):  # fmt: skip
        decision: dict[str, Any] = {}
        if name == "focal/1":
            figures = {"focal/1": 4.1, "spherical/1": 3.9, "brier/1": None}
            decision = {
                "kind": "halving",
                "rule": "the best go on",
                "step": 40,
                "figures": figures,
                "kept": ["spherical/1"],
            }
        elif name == "focal/3":
            decision = {"kind": "limit", "rule": "all runs together", "needed_seconds": 51.2}
        record = replace(by_name[name], status=status, message=message, decision=decision)
        write_record(record, folder / "runs" / record.run_id)
    gone = by_name["brier-baseline/3"]
    (folder / "runs" / gone.run_id / "record.json").unlink()
    text = write_campaign_report(made, folder)[0].read_text()
    assert "seed 1: diverged: the loss is NaN at step 120" in text
    cells = ("step 40: 4.1 (1 of 3 went on, up to 3.9)", "told otherwise", "no time left for its 51 s")
    assert "".join(cells) in re.sub(r"</td>|<[^>]+>", "", text)
    assert "The best go on." in text and "All runs together." in text
    assert "focal loss, seed" not in text and "a long account" not in text
    assert "left out here: focal loss." in text
    name = "</i>{}</th>"
    judged, _, rest = text.partition('id="results"')
    final = rest.partition('id="pictures"')[0]
    assert "</i>DPSM, linear</span></th>" in judged and name.format("DPSM, linear") in final
    assert judged.count("</i>focal loss") == 1 and "focal loss" not in final, "only in the table of those stopped"
    assert "</i>focal loss" not in text.partition('id="evidence"')[2].partition('id="efficiency"')[0]
    assert "brier-baseline, seed 3" in text and "not run yet" in text and "1 run missing" in text
    assert "(2 of 3)" in text


def test_nothing_finished_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run of this campaign that ended well \(none has begun\)"):
        write_campaign_report(campaign(), tmp_path)


def test_numbers_of_the_tables(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, _, found = written
    results = Results(made, found)
    setting = results.settings("main")[0]
    table = comparison(results, setting, QUALITY["language-modelling"], "x")
    assert table.headings == ["", "perplexity ↓", "NLL ↓"]  # no run has an accuracy
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert cells["cross-entropy"][0] == "50.60 ± 0.30"
    assert cells["DPSM, linear"][0] == "53.60 ± 0.30 ***†"  # without variance, so that Holm takes nothing away
    assert cells["cross-entropy, temperature-scaled"][0].startswith("50.10 ± 0.30")
    assert [row[1].state for row in table.rows] == ["", "", "", "best", ""]
    (other,) = differences(results, QUALITY["language-modelling"])
    assert other.caption.startswith("flipped-targets; tiny; docs: the figure, and in brackets")
    row = next(row for row in other.rows if row[0].text == "DPSM, linear")
    assert row[1].text == "55.60 ± 0.30 (+5.00)"  # 3 of its own and 2 of the noise


@pytest.mark.parametrize(
    ("gaps", "best"),
    [
        ((-1.0, -1.1, -0.9), {"DPSM, linear"}),
        ((-1.0, -3.0, 0.5), set()),  # the best mean, but the interval of the difference has 0 in it
        ((-1.0, -1.0, -1.0), set()),  # no spread, so that nothing is known of it
        ((-1.0,), set()),
    ],
)
@pytest.mark.parametrize("better", [-1, 1])
def test_the_best_mean_is_marked_only_where_intervals_say_so(
    gaps: tuple[float, ...], best: set[str], better: int
) -> None:
    seeds = tuple(range(1, len(gaps) + 1))
    made = campaign(studies=("main",), variations=VARIATIONS[:3], seeds=seeds)

    def values(point: Point) -> dict[str, Any]:
        gap = gaps[point.seed - 1] if point.variation == "dpsm-linear" else 0.0
        worst = 10.0 if point.variation == "brier-baseline" else 0.0
        return {"metrics": {"perplexity": 100 + 3.0 * point.seed - better * (gap + worst + 0.01 * point.seed * worst)}}

    results = Results(made, records(made, values))
    column = Column("perplexity", "perplexity", better)
    table = comparison(results, results.settings("main")[0], [column], "x")
    assert {row[0].text for row in table.rows if row[1].state == "best"} == best


def test_gaps_in_a_text_are_counted(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, directory, found = written
    some = next(record for record in found.values() if record.arguments["seed"] == 1)
    texts = [{"prompt": "p", "reference": "r", "output": "one\n\ntwo" + "\n" * 200 + "three\n \n\n\n"}]
    write_record(replace(some, samples=texts), directory / "runs" / some.run_id)
    write_campaign_report(made, directory)
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "one\n\ntwo\n[199 empty lines]\nthree\n[3 empty lines]\n" in page


@pytest.mark.parametrize(
    ("decision", "p_value", "p_fails", "words"),
    [
        ("holds", 0.01, 0.99, "p = 0.01, Holm 0.02"),
        ("fails", 0.99, 0.01, "p of failing = 0.01, Holm 0.02"),
        ("cannot tell", 0.2, 0.8, "p = 0.2, Holm 0.4"),
        ("cannot tell", 0.9, 0.1, "p of failing = 0.1, Holm 0.2"),  # the end that is nearer
        ("cannot tell", None, 0.04, "p of failing = 0.04, Holm 0.08"),
        ("cannot tell", 0.04, None, "p = 0.04, Holm 0.08"),
        ("cannot tell", None, None, "n = 3"),
    ],
)
def test_the_p_value_of_the_claim(decision: str, p_value: float | None, p_fails: float | None, words: str) -> None:
    doubled = [None if p is None else 2 * p for p in (p_value, p_fails)]
    finding = Finding(
        "k", "quality", "w", "v", "s", "main", decision, 1.2, 1.1, None, None, 1.1, "ratio", "", 3,
        p_value, doubled[0], p_fails, doubled[1],
    )  # fmt: skip
    assert claim_line(finding).startswith("1.200 [1.100, ∞); claimed: ratio at most 1.1; n = 3")
    assert claim_line(finding).endswith(words)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0066, 0.02), (0.0034, 0.0061), (0.05, 0.5), (150, 3000), (120.5, 121.2), (1e-5, 3.0), (9, 11)]
)
def test_a_logarithmic_axis_can_be_read(low: float, high: float) -> None:
    figure = empty_figure(5.2, 3.9)
    ax = figure.add_subplot()
    ax.plot([low, high])
    plain_log_axis(ax)
    figure.canvas.draw()
    bottom, top = ax.get_ylim()
    labels = [label for label in ax.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert len(boxes) >= 3 and all(below.y1 < above.y0 for below, above in itertools.pairwise(boxes))
    assert all(float(label.get_text()) == pytest.approx(label.get_position()[1], rel=1e-4) for label in labels)


def test_points_over_a_part_of_the_seeds_make_no_front(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, _, found = written
    setting = Results(made, found).settings("main")[0]

    def legend_and_front(records: dict[str, Record]) -> tuple[list[str], float]:
        figure = pareto(Results(made, records), setting, "perplexity", "perplexity")
        assert figure is not None
        (ax,) = figure.axes
        (front,) = [line for line in ax.get_lines() if line.get_label() == "Pareto front"]
        return [text.get_text() for text in ax.get_legend().get_texts()], float(np.min(front.get_xdata()))

    titles, whole = legend_and_front(found)
    assert "cross-entropy" in titles
    gone = next(i for i, r in found.items() if r.name == "ce-baseline/2" and r.arguments["study"] == "main")
    titles, part = legend_and_front({i: r for i, r in found.items() if i != gone})
    assert "cross-entropy (2 of 3 seeds)" in titles and part > whole + 1


def test_ablations_have_pictures_of_their_own(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, folder, _ = written
    markdown = write_campaign_report(made, folder)[1].read_text()
    section = markdown.partition("### Ablations")[2].partition("###")[0]
    assert "(plots/eval_perplexity-over-step-ablations.png)" in section
    assert (folder / "plots" / "eval_perplexity-over-step-ablations.png").exists()


def test_cost_is_told_without_stars_and_with_what_disturbed_it(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    made, _, found = written
    setting = Results(made, found).settings("main")[0]
    speeds = {"ce-baseline": (5000.0, 5001.0, 5002.0), "dpsm-linear": (1.0, 2.0, 3.0)}

    def told(change: Callable[[Record], Record]) -> Table:
        return cost(Results(made, {i: change(r) for i, r in found.items()}), setting)

    def slow(record: Record) -> Record:
        name, _, seed = record.name.partition("/")
        speed = speeds.get(name, (5000.0,) * 3)[int(seed) - 1]
        return replace(record, efficiency={**record.efficiency, "tokens_per_second": speed})

    table = told(slow)
    assert not any("*" in cell.text or cell.state for row in table.rows for cell in row)
    assert table.notes == [], "how another's speed varies is its own affair"
    speeds["ce-baseline"] = (5000.0, 5001.0, 9000.0)
    assert told(slow).notes[0].startswith("Cross-entropy's own tokens/s vary by 36 % (sd)")
    paused = told(lambda r: replace(r, attempts=[{}, {}]) if r.name == "focal/2" else r)
    assert len(paused.notes) == 1 and paused.notes[0].endswith("the largest counts: focal loss.")


def test_a_spread_is_compared_over_the_same_seeds(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, _, found = written
    levels = {"ce-baseline": (10.0, 11.0, 30.0), "dpsm-linear": (10.0, 12.0, 0.0)}
    kept = {}
    for i, record in found.items():
        name, _, seed = record.name.partition("/")
        if name in levels:
            values = {**record.metrics["last"]["test"], "perplexity": levels[name][int(seed) - 1]}
            record = replace(record, metrics={"last": {"test": values}})
        if record.name != "dpsm-linear/3":
            kept[i] = record
    results = Results(made, kept)
    table = spread(results, results.settings("main")[0], QUALITY["language-modelling"][:1])
    assert table is not None
    cells = {row[0].text: row[1].text for row in table.rows}
    assert cells["DPSM, linear"] == "1.414 (2.00 ×) (2 of 3)" and cells["cross-entropy"].endswith("(1.00 ×)")


def test_the_least_p_value_of_so_many_samples_is_a_bound(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    made, folder, found = written
    results = Results(made, found)
    table = document_table(results, results.settings("main")[0], folder)
    assert table is not None
    shown = [cell.text for row in table.rows for cell in (row[3], row[5])]
    assert any(text == "≤ 0.0005" for text in shown) and "0.0005" not in shown
    assert all(text.startswith("≤") == (text.endswith("0.0005")) for text in shown)


def test_after_temperature_scaling_nobody_is_there_twice(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    made, _, found = written
    results = Results(made, found)
    setting = results.settings("main")[0]
    names = [row[0].text for row in comparison(results, setting, AFTER, "x").rows]
    assert "cross-entropy" in names and "cross-entropy, temperature-scaled" not in names
    names = [row[0].text for row in comparison(results, setting, QUALITY["language-modelling"], "x").rows]
    assert "cross-entropy, temperature-scaled" in names


def test_no_text_and_no_title_leaves_its_place_in_the_markdown_page(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    """A model may write fences of any length, and a campaign's file any title."""
    made, folder, found = written
    for run_id, record in found.items():
        sample = {"prompt": "p", "reference": "r", "output": "before\n`````\n# after"}
        write_record(replace(record, samples=[sample]), folder / "runs" / run_id)
    markdown = write_campaign_report(replace(made, title="<b> [1] `x` | *y*"), folder)[1].read_text()
    assert "``````text\nbefore\n`````\n# after\n``````" in markdown
    assert (
        markdown.startswith("# \\<b> \\[1\\] \\`x\\` \\| \\*y\\*\n")
        or "\n# \\<b> \\[1\\] \\`x\\` \\| \\*y\\*\n" in markdown
    )


def finding(decision: str, estimate: float | None, low: float | None, high: float | None, **limits: Any) -> Finding:
    given = {"at_least": None, "at_most": None, "scale": "difference", **limits}
    return Finding(
        "k", "quality", "w", "v", "s", "main", decision, estimate, low, high, given["at_least"], given["at_most"],
        given["scale"], "", 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (finding("holds", -1.0, -1.2, -0.8, at_most=0.3), "holds"),
        (finding("holds", 0.1, 0.05, 0.2, at_most=0.3), "within the limit"),  # worse, as much as is allowed
        (finding("holds", -0.1, -0.4, 0.2, at_most=0.3), "within the limit"),  # no difference is shown
        (finding("holds", 0.5, 0.4, 0.6, at_least=0.3), "holds"),
        (finding("holds", 1.02, 1.01, 1.04, at_most=1.05, scale="ratio"), "within the limit"),
        (finding("holds", 0.5, None, 0.6, at_most=0.6, scale="ratio"), "holds"),
        (finding("holds", 0.99, 0.985, 1.0, at_least=0.98, scale="ratio"), "within the limit"),
        (finding("holds", 20.0, None, None, at_most=500.0), "within the limit"),
        (finding("holds", -20.0, None, None, at_most=500.0), "holds"),
        (finding("holds", 0.9, 0.7, 1.0, at_least=0.75, scale="share"), "holds"),
        (finding("holds", 1.0, 0.398, 1.0, at_least=0.75, scale="share"), "within the limit"),  # 4 of 4 may be chance
        (finding("fails", -1.0, -1.2, -0.8, at_least=0.3), "fails"),
        (finding("cannot tell", -1.0, -1.2, -0.8, at_most=0.3), "cannot tell"),
    ],
)
def test_holds_is_never_said_of_what_is_worse_or_no_different(made: Finding, word: str) -> None:
    assert shown(made).word == word
    sentence = headline(campaign(variations=(*VARIATIONS[:2], Variation("v", "V"))), [made])[0]
    assert f"{word.capitalize()}: k." in sentence and sentence.startswith(
        f"V: {int(word == 'holds')} of 1 claims hold."
    )


def test_the_page_opens_with_a_matrix_whose_cells_lead_to_their_evidence(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    made, folder, _ = written
    paths = write_campaign_report(made, folder)
    html = paths[0].read_text()
    matrix = html[html.index('<table class="matrix"') : html.index("</table>")]
    assert html.index("<h2") > html.index(matrix), "nothing is said at length before it"
    verdict = json.loads(paths[2].read_text())
    signs = {"holds": "✓≈", "fails": "✗", "cannot tell": "?"}
    columns = re.findall(r"</i>([^<]*)</span></th>", matrix)
    assert columns == ["DPSM, linear", "cross-entropy, temperature-scaled"]
    for column, name in enumerate(("dpsm-linear", "ce+tempscale")):
        cells = [
            re.findall(r"<td.*?</td>", row)[column] for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", matrix)
        ]
        marks = [re.search(r'#(finding-\d+)".*?class="sign">(.)<', cell) for cell in cells]
        expected = verdict["overall"][name]
        assert len([m for m in marks if m]) == len(expected)
        for decision, allowed in signs.items():
            assert sum(m[2] in allowed for m in marks if m) == list(expected.values()).count(decision)
        for mark in filter(None, marks):
            row = re.search(rf'<tr id="{mark[1]}".*?</tr>', html)
            assert row is not None and made.variation(name).title in row[0] and f'class="sign">{mark[2]}<' in row[0]
    ablations = html[html.index("The same for 1 ablation<") :]
    assert "focal loss" in ablations[: ablations.index("</table>")]
    assert "\n| perplexity within 0.3 of cross-entropy's | ✗ +3.00 |" in paths[1].read_text()


def test_seeds_without_a_spread_have_no_stars(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, _, found = written
    same = {}
    for run_id, record in found.items():
        seed = int(record.name[-1])
        value = {"ce-baseline": 50.0, "dpsm-linear": 53.0}.get(record.name.partition("/")[0], 60.0) + 0.3 * seed
        same[run_id] = replace(record, metrics={"last": {"test": {"perplexity": value}}})
    results = Results(made, same)
    table = comparison(results, results.settings("main")[0], QUALITY["language-modelling"], "x")
    cells = {row[0].text: row[1].text for row in table.rows}
    assert cells["DPSM, linear"] == "53.60 ± 0.30"


def test_a_variation_has_one_colour_in_all_pictures(written: tuple[Campaign, Path, dict[str, Record]]) -> None:
    made, folder, found = written
    names = {v.name: v.title for v in made.variations}
    gone = {i for i, r in found.items() if r.name.startswith("brier-baseline")}  # which must not move the others
    for run_id in gone:
        (folder / "runs" / run_id / "record.json").unlink()
    results = Results(made, {i: r for i, r in found.items() if i not in gone})
    setting = results.settings("main")[0]
    figure = learning_curves(results, setting, [v.name for v in made.variations if v.of is None], "eval_nll", "NLL")
    assert figure is not None
    drawn = {str(line.get_label()): line.get_color() for line in figure.axes[0].get_lines()}
    assert set(drawn) == {"cross-entropy", "DPSM, linear", "focal loss"} and len(set(drawn.values())) == 3
    assert {title: colour for title, (colour, _) in colours(results).items() if title in drawn} == drawn
    assert colours(results)["cross-entropy, temperature-scaled"] == (drawn["cross-entropy"], True)
    saved: dict[str, Figure] = {}

    class Kept(Pictures):
        def add(self, name: str, figure: Figure | None, caption: str) -> list[dict[str, str]]:
            assert figure is not None
            saved[name] = figure
            return []

    reliability_pictures(results, setting, ["ce-baseline", "dpsm-linear", "focal"], Kept(folder / "plots"))
    together = {
        str(line.get_label()).partition(" (")[0]: line.get_color()
        for line in saved["reliability-all"].axes[0].get_lines()
    }
    assert {title: together[title] for title in drawn} == drawn
    for name in ("dpsm-linear", "focal"):
        bars = saved[f"reliability-{name}"].axes[0].patches
        assert to_hex(bars[0].get_facecolor()) == drawn[names[name]].lower()
    html = write_campaign_report(made, folder)[0].read_text()
    assert f'<i class="dot" style="--colour:{drawn["DPSM, linear"]}"></i>DPSM, linear' in html


def test_a_wide_table_shows_its_key_columns_first_and_the_others_on_demand(
    written: tuple[Campaign, Path, dict[str, Record]],
) -> None:
    made, folder, found = written
    for run_id, record in found.items():
        more = {f"ece_{bins}": 0.02 for bins in (10, 100)} | {
            "spherical": 0.5,
            "signed_gap": 0.01,
            "expected_depth": 3.0,
        }
        values = {**record.metrics["last"]["test"], **more, "token_accuracy": 0.3}
        write_record(replace(record, metrics={"last": {"test": values}}), folder / "runs" / run_id)
    html = write_campaign_report(made, folder)[0].read_text()
    final = html[html.index('id="results"') :]
    section = final[final.index('<section class="table">') : final.index("</section>")]
    at_once, _, rest = section.partition("<details>")
    heads = [re.findall(r'<th scope="col">([^<]+)</th>', part) for part in (at_once, rest)]
    assert heads[0] == ["perplexity ↓", "accuracy, % ↑", "Brier ↓", "ECE-15 ↓", "signed gap"]
    assert heads[1] == ["NLL ↓", "spherical ↓", "ECE-10 ↓", "ECE-100 ↓", "depth"]
    assert all(f'data-label="{head}"' in section for head in heads[0] + heads[1])  # for narrow screens
