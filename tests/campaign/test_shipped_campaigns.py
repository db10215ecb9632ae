"""The campaigns that come with the package, and the file in the documentation, as `load_campaign` reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.spec.loading import SHIPPED, SpecError, load_campaign
from tests.campaign.files import load, wrong

ROOT = Path(__file__).resolve().parents[2]
EXP_1, EXP_2 = (
    SHIPPED / "exp-1-language-modelling-scaling.yaml",
    SHIPPED / "exp-2-seq2seq-finetune-robustness.yaml",
)


@pytest.mark.parametrize(
    ("path", "scale", "points", "runs"),
    [
        # main 16 x 3; scaling and flipped-targets 6 x 3; warm-up 3 values. Runs: 15 x 3, 5 x 3, 5 x 3, and 2 values,
        # since 10 % is in main
        (EXP_1, "small", {"main": 48, "scaling": 18, "flipped-targets": 18, "warm-up": 3}, 45 + 15 + 15 + 2),
        # main 16 x 4 sizes x 3; sanity and lower-case 6 x 3; warm-up 2 variations x 2 sizes x 3 values x 3 seeds;
        # flipped-targets 8 x 2 sizes x 2 replacements x 3. Runs: one less of each group for ce+tempscale
        (
            EXP_1,
            "paper",
            {"main": 192, "sanity": 18, "lower-case": 18, "warm-up": 36, "flipped-targets": 96},
            180 + 15 + 15 + 24 + 84,
        ),
        # main 7 x 3; swapped 5 x 3; grid 2 x 8; 5 folds; low-resource 5. Runs: 6 x 3; 4 x 3; of the grid CE has 4 and
        # DPSM 8, of which ce-finetune, label-smoothing and dpsm-warm10 are in main; 5; 4; and the one that all others
        # start from
        (
            EXP_2,
            "small",
            {"main": 21, "swapped-summaries": 15, "grid": 16, "cross-validation": 5, "low-resource": 5},
            18 + 12 + (12 - 3) + 5 + 4 + 1,
        ),
        # main 7 x 3 sizes x 3; swapped 6 x 2 sizes x 3; grid 2 x 18; 3 x 3 rates x 5 folds; low-resource 5 x 2 x 3
        (
            EXP_2,
            "paper",
            {"main": 63, "swapped-summaries": 36, "grid": 36, "cross-validation": 45, "low-resource": 30},
            54 + 30 + (24 - 4) + 45 + 24,
        ),
    ],
)
def test_shipped_campaigns(path: Path, scale: str, points: dict[str, int], runs: int) -> None:
    campaign = load_campaign(path, scale)
    assert Counter(point.study for point in campaign.points) == points
    assert len(campaign.runs) == len(campaign.order) == runs
    assert {run.arguments["scoring_rule"] for run in campaign.runs.values()} >= {"ce", "brier", "dpsm"}
    for run in campaign.runs.values():
        assert run.arguments["fit_temperature"] and run.id in campaign.runs


def test_the_study_takes_its_splits_from_a_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SHIPPED / "study-dialogsum.yaml"
    monkeypatch.delenv("DPSM_STUDIES", raising=False)
    with pytest.raises(SpecError, match="the environment variable DPSM_STUDIES is not set"):
        load_campaign(study)
    monkeypatch.setenv("DPSM_STUDIES", str(tmp_path))
    (tmp_path / "dialogsum").mkdir()
    for split in ("train", "validation", "calibration", "test"):
        (tmp_path / "dialogsum" / f"{split}.jsonl").write_text('{"document": "a", "summary": "b"}\n', encoding="utf-8")
    campaign = load_campaign(study)
    arms = [variation.name for variation in campaign.variations if variation.of is None and variation.role == "main"]
    assert arms == ["ce", "brier", "dpsm", "half", "half-k15"]  # those of docs/protocol.md
    main = [campaign.runs[point.run_id] for point in campaign.points if not point.scaled and point.seed > 10]
    assert Counter(run.arguments["scoring_rule"] for run in main) >= Counter(ce=6, brier=6, dpsm=18)
    # the tuning has the same settings, but for what comes after training
    tuning = load_campaign(SHIPPED / "study-dialogsum-tuning.yaml")
    apart = {"learning_rate", "save_strategy", "save_only_model", "do_predict", "evaluate_best", "fit_temperature",
             "continuation_rouge", "sample_outputs", "calibration_file", "test_file", "seed"}  # fmt: skip
    settings = [
        {frozenset((k, str(v)) for k, v in run.arguments.items() if k not in apart) for run in found}
        for found in (main, tuning.runs.values())
    ]
    assert settings[0] == settings[1] and len(settings[0]) == 5
    assert all(run.arguments["draw_train_samples"] and run.arguments["freeze_layers"] == 26 for run in main)


def test_a_shipped_campaign_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (EXP_1.stem, EXP_1.name):
        assert load_campaign(name).runs == load_campaign(EXP_1).runs
    for name in (f"there/{EXP_1.name}", "exp-3"):
        shipped = f"demo-clm, demo-finetune, demo-summarization, {EXP_1.stem}, {EXP_2.stem}"
        with pytest.raises(SpecError, match=f"come with dpsm are {shipped}"):
            load_campaign(name)
    # a file of that name in the working directory is meant where there is one
    (tmp_path / EXP_1.name).write_text(EXP_2.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_campaign(EXP_1.name).name == EXP_2.stem


def test_variations_of_the_shipped_campaigns() -> None:
    first, second = load_campaign(EXP_1), load_campaign(EXP_2)
    assert {v.name for v in first.variations} == {
        "ce-baseline", "brier-baseline", "dpsm-linear", "dpsm-cosine", "dpsm-fixed-alpha0.5", "dpsm-fixed-alpha0.25",
        "dpsm-fixed-alpha0.75", "spherical", "label-smoothing", "focal", "ce+tempscale", "brier-score-smoothed",
        "dpsm-late", "dpsm-step72", "dpsm-feedback", "dpsm-late-smoothed",
    }  # fmt: skip
    core = {"ce-baseline", "brier-baseline", "dpsm-linear", "dpsm-cosine", "dpsm-fixed-alpha0.5"}
    assert {v.name for v in first.variations if v.role == "main"} == core | {"ce+tempscale"}
    assert {v.name for v in second.variations} == {
        "ce-finetune", "ce+tempscale", "brier-finetune", "dpsm-warm10", "dpsm-warm20", "dpsm-late", "label-smoothing",
    }  # fmt: skip
    core = {"ce-finetune", "ce+tempscale", "brier-finetune", "dpsm-warm10", "dpsm-warm20"}
    assert {v.name for v in second.variations if v.role == "main"} == core
    assert first.quality == ("perplexity", False) and second.quality == ("rougeLsum", True)


def test_runs_of_a_seed_differ_in_the_variation_alone() -> None:
    """Same weights, same order of batches, same optimiser and learning rates for all variations."""
    for path in (EXP_1, EXP_2):
        for scale in ("small", "paper"):
            campaign = load_campaign(path, scale, only=["study=main"])
            groups: dict[Any, set[str]] = {}
            for point in campaign.points:
                names = {name for v in campaign.variations for name in v.arguments} | {"alpha_warmup_steps"}
                rest = {k: v for k, v in campaign.runs[point.run_id].arguments.items() if k not in names}
                groups.setdefault((point.size, point.data, point.seed), set()).add(repr(sorted(rest.items())))
            assert groups and all(len(found) == 1 for found in groups.values())


def test_a_step_has_the_same_tokens_at_every_size_at_paper_scale() -> None:
    for path in (EXP_1, EXP_2):
        campaign = load_campaign(path, "paper", only=["study=main"])
        rows = {
            run.processes * run.arguments["per_device_train_batch_size"] * run.arguments["gradient_accumulation_steps"]
            for run in campaign.runs.values()
        }
        assert rows == {64}


# ---- the documentation ---------------------------------------------------------------------------------------------


def documented() -> str:
    return (ROOT / "docs" / "campaigns.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]


def test_the_documented_file_is_one(tmp_path: Path) -> None:
    small, paper = load(tmp_path, documented()), load(tmp_path, documented(), "paper")
    assert (len(small.points), len(small.runs)) == (15 + 4 + 9, 12 + 3 + 6)
    assert {p.seed for p in paper.points} == {1, 2, 3, 4, 5}
    assert next(iter(paper.runs.values())).arguments["max_steps"] == 20000


def test_the_documented_mistakes_are_what_is_said(tmp_path: Path) -> None:
    first = (
        documented()
        .replace("  max_steps: 400\n", "  max_stepz: 400\n")
        .replace("variations: [dpsm]", "variations: [dspm]")
    )
    text = (ROOT / "docs" / "campaigns.md").read_text(encoding="utf-8")
    shown = [line.replace("mine.yaml", "try.yaml") for line in text.splitlines() if line.startswith("mine.yaml:")]
    second = documented().replace("alpha_hold: 0.8", "alpha_hold: -0.5")
    assert (
        sorted([*wrong(tmp_path, first), *wrong(tmp_path, second)], key=lambda line: int(line.split(":")[1])) == shown
    )
