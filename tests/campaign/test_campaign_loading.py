"""A campaign's file: what it expands to, which ids it gives, and every kind of mistake with its line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.spec.design import Budget, Campaign
from dpsm_hf.campaign.spec.loading import SpecError, load_campaign
from tests.campaign.files import FILE, edit, load, run_at, with_files, wrong
from tests.campaign.mistakes import MISTAKES

#: The first two runs of the file, as records of earlier campaigns have them.
IDS = ["b7b80b4ecc95", "47b114d09270"]

# ---- what it expands to --------------------------------------------------------------------------------------------


def test_points_and_runs_of_a_small_file(tmp_path: Path) -> None:
    campaign = load(tmp_path, FILE)
    assert (campaign.name, campaign.title, campaign.task, campaign.scale) == (
        "try",
        "A try",
        "language-modelling",
        "small",
    )
    assert [v.name for v in campaign.variations] == ["ce", "brier", "dpsm", "late", "scaled"]
    assert campaign.variation("late").role == "ablation" and campaign.variation("scaled").of == "ce"
    # main: 5 variations (one reads another's runs) x 2 seeds; sweep: 2 values x 2 seeds, of which 0.1 is in main
    assert len(campaign.points) == 14 and len(campaign.runs) == 10
    assert campaign.budget == Budget(1.2, "eval_nll", (0.25, 0.5), 0.5)
    # seed by seed, the reference first
    assert [p.seed for p in campaign.points] == [1] * 7 + [2] * 7
    assert [p.variation for p in campaign.points[:5]] == ["ce", "brier", "dpsm", "late", "scaled"]
    ce, scaled = campaign.points[0], campaign.points[4]
    assert scaled.scaled and not ce.scaled and scaled.run_id == ce.run_id
    sweep = [p for p in campaign.points if p.study == "sweep" and p.seed == 1]
    assert [p.settings for p in sweep] == [{"alpha_warmup_steps": 0.1}, {"alpha_warmup_steps": 0.2}]
    assert sweep[0].run_id == campaign.points[2].run_id != sweep[1].run_id
    assert campaign.titles["study"] == {"main": "main", "sweep": "sweep"}


def test_the_former_name_of_scoring_rule_makes_the_same_runs(tmp_path: Path) -> None:
    campaign, former = load(tmp_path, FILE), load(tmp_path, FILE.replace("scoring_rule", "loss_type"))
    ids = [point.run_id for point in campaign.points]
    assert ids == [point.run_id for point in former.points] and former.runs == campaign.runs
    assert ids[:2] == IDS, "records of earlier campaigns would not be found"
    overridden = load_campaign(tmp_path / "try.yaml", overrides=["variations.late.loss_type=focal"])
    assert run_at(overridden, variation="late", seed=1, study="main").arguments["scoring_rule"] == "focal"
    with pytest.raises(SpecError, match="loss_type: this is the former name of scoring_rule, which is given too"):
        load(tmp_path, FILE.replace("{scoring_rule: ce}", "{scoring_rule: ce, loss_type: ce}"))


def test_runs_share_a_cache_of_frozen_layers_in_a_folder_beside_the_file(tmp_path: Path) -> None:
    scratch = FILE[FILE.index("      model_type: gpt2") : FILE.index("data:\n")]
    frozen = "      model_name_or_path: smollm2-135m\n      freeze_layers: 26\n"
    without, beside, off = (
        load(tmp_path, edit(scratch, frozen + more))
        for more in ("", "      frozen_cache: ../kept\n", "      frozen_cache: 'off'\n")
    )
    given = {run.arguments["frozen_cache"] for run in beside.runs.values()}
    assert given == {str(tmp_path.parent / "kept")}
    assert {run.arguments["frozen_cache"] for run in off.runs.values()} == {"off"}
    assert beside.runs.keys() == without.runs.keys() == off.runs.keys(), "where outputs are kept changes no number"
    assert load(tmp_path, edit(scratch, frozen.replace("26", "25"))).runs.keys().isdisjoint(without.runs)


def test_arguments_of_a_run(tmp_path: Path) -> None:
    campaign = load(tmp_path, FILE)
    arguments = dict(run_at(campaign, study="main", variation="dpsm", seed=2).arguments)
    assert arguments == {
        "do_train": True, "do_eval": True, "do_predict": True, "fit_temperature": True, "dataset_name": "python-docs",
        "max_steps": 10, "eval_strategy": "steps", "eval_steps": 5.0, "alpha_warmup_steps": 0.1, "model_type": "gpt2",
        "config_overrides": "n_embd=32,n_layer=1,n_head=2", "tokenizer_name": "train-bpe", "lowercase": False,
        "scoring_rule": "dpsm", "seed": 2,
    }  # fmt: skip
    # what does not move alpha must not make two runs of one
    assert "alpha_warmup_steps" not in run_at(campaign, study="main", variation="ce", seed=2, scaled=False).arguments


def test_a_scale_replaces_lists_and_adds_to_the_base(tmp_path: Path) -> None:
    campaign = load(tmp_path, FILE, "paper")
    assert {p.seed for p in campaign.points} == {1, 2, 3}
    arguments = run_at(campaign, study="main", variation="dpsm", seed=3).arguments
    assert arguments["max_steps"] == 1000 and arguments["eval_steps"] == 5.0
    text = edit("    base: {max_steps: 1000}\n", "    base: {max_steps: null, num_train_epochs: 2}\n")
    arguments = run_at(load(tmp_path, text, "paper"), study="main", variation="dpsm", seed=3).arguments
    assert "max_steps" not in arguments and arguments["num_train_epochs"] == 2.0


def test_schedules_of_any_number_are_an_argument_like_others(tmp_path: Path) -> None:
    schedule = "{label_smoothing_factor: {start: 0, end: 0.1}, z_loss: linear 0 -> 0.01 over 0.2}"
    scaled = "  scaled:\n    of: ce\n"
    text = edit(scaled, f"  moving:\n    arguments: {{scoring_rule: ce, knob_schedules: {schedule}}}\n{scaled}")
    run = run_at(load(tmp_path, text), study="main", variation="moving", seed=1)
    assert run.arguments["knob_schedules"] == {
        "label_smoothing_factor": {"start": 0, "end": 0.1}, "z_loss": "linear 0 -> 0.01 over 0.2",
    }  # fmt: skip
    (said,) = wrong(tmp_path, text.replace("end: 0.1", "end: 1.5"))
    assert "knob_schedules: label_smoothing_factor: end=1.5 lies outside [0, 1)" in said


def test_variations_by_role_and_pattern(tmp_path: Path) -> None:
    for given, expected in (
        ("main", {"ce", "brier", "dpsm", "scaled"}),
        ("[ablation, ce]", {"ce", "late"}),
        ("'d*'", {"dpsm"}),
        ("[all]", {"ce", "brier", "dpsm", "late", "scaled"}),
    ):
        campaign = load(tmp_path, edit("variations: all", f"variations: {given}"))
        assert {p.variation for p in campaign.points if p.study == "main"} == expected


def test_a_run_that_starts_from_another(tmp_path: Path) -> None:
    start = "      tokenizer_name: train-bpe\n    start_from:\n      seed: 7\n      arguments: {max_steps: 99}\n"
    campaign = load(tmp_path, edit("      tokenizer_name: train-bpe\n", start))
    (prepared,) = campaign.preparations
    run = campaign.runs[prepared]
    assert run.arguments["scoring_rule"] == "ce" and run.arguments["max_steps"] == 99 and run.arguments["seed"] == 7
    assert run.arguments["model_type"] == "gpt2" and run.needs == ()
    assert campaign.order[0] == prepared and len(campaign.runs) == 11 and set(campaign.order) == set(campaign.runs)
    dependent = run_at(campaign, study="main", variation="dpsm", seed=1)
    assert dependent.arguments["model_name_or_path"] == f"{{run:{prepared}}}" and dependent.needs == (prepared,)
    assert not {"model_type", "config_overrides", "tokenizer_name"} & dependent.arguments.keys()
    # the model it starts from is part of what it is
    other = load(tmp_path, edit("      tokenizer_name: train-bpe\n", start.replace("99", "98")))
    assert run_at(other, study="main", variation="dpsm", seed=1).id != dependent.id
    # without a seed of its own there is one for each seed
    each = load(tmp_path, edit("      tokenizer_name: train-bpe\n", start.replace("      seed: 7\n", "")))
    assert len(each.preparations) == 2 and sorted(each.runs[i].arguments["seed"] for i in each.preparations) == [1, 2]


def test_only_selects_points_and_what_they_need(tmp_path: Path) -> None:
    def left(*only: str) -> list[str]:
        campaign = load(tmp_path, FILE, only=only)
        assert set(campaign.order) == set(campaign.runs)
        return [f"{p.study}/{p.variation}/{p.seed}" for p in campaign.points]

    assert left("study=main", "seed=1", "role=main") == ["main/ce/1", "main/brier/1", "main/dpsm/1", "main/scaled/1"]
    assert left("variation=l*,scaled", "seed=2") == ["main/late/2", "main/scaled/2"]
    assert left("study=sweep,variation=brier", "seed=1") == ["main/brier/1", "sweep/dpsm/1", "sweep/dpsm/1"]
    assert len(load(tmp_path, FILE, only=["variation=scaled"]).runs) == 2  # the runs it reads
    start = "      tokenizer_name: train-bpe\n    start_from: {seed: 7}\n"
    chosen = load(tmp_path, edit("      tokenizer_name: train-bpe\n", start), only=["variation=dpsm", "study=main"])
    assert len(chosen.runs) == 3 and len(chosen.preparations) == 1


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("variaton=dpsm", "--only: variaton=dpsm: 'variaton' is not a key; did you mean variation?"),
        ("dpsm", "--only: dpsm: write KEY=PATTERN, with a key of study, variation, role, size, data, seed"),
        ("seed=9", "--only: seed=9: nothing in the plan matches it; seed is one of 1, 2"),
        ("seed=", "--only: seed=: there is nothing behind seed=; give a name or a pattern"),
    ],
)
def test_only_that_selects_nothing(tmp_path: Path, only: str, said: str) -> None:
    assert wrong(tmp_path, FILE, only=["study=main", only]) == (said,)


# ---- ids -----------------------------------------------------------------------------------------------------------


def ids(campaign: Campaign) -> list[str]:
    return [point.run_id for point in campaign.points]


def test_ids_are_stable(tmp_path: Path) -> None:
    """A golden value: if it changes, every finished campaign of every user would be run again."""
    assert ids(load(tmp_path, FILE))[:4] == ["b7b80b4ecc95", "47b114d09270", "fa920286fcf7", "e222d86f1a5e"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    title: Cross-entropy\n", "    title: Another title # and a comment\n"),
        (
            "arguments: {scoring_rule: dpsm, alpha_schedule: late_linear}",
            "arguments: {alpha_schedule: late_linear, scoring_rule: dpsm}",
        ),
        ("  do_eval: true\n  do_predict: true\n", "  do_predict: true\n  do_eval: true\n"),
        ("  max_steps: 10\n", "  max_steps: 1e1\n"),
        ("alpha_warmup_steps: 0.1\n", "alpha_warmup_steps: 1e-1\n"),
        ("  eval_steps: 5\n", "  eval_steps: 5\n  logging_steps: 1\n  log_level: error\n  disable_tqdm: true\n"),
        ("  eval_steps: 5\n", "  eval_steps: 5\n  gradient_accumulation_steps: 1\n  lr_scheduler_type: linear\n"),
        (
            "arguments: {scoring_rule: dpsm}\n",
            "arguments: {scoring_rule: dpsm, alpha_schedule: linear, alpha_end: 1}\n",
        ),
        ("name: try\n", "name: other\n"),
        ("  limit: 1.2\n", "  limit: 2\n"),
        ("  tiny:\n", "  another-name:\n"),
    ],
)
def test_what_decides_no_number_leaves_the_ids_alone(tmp_path: Path, old: str, new: str) -> None:
    assert ids(load(tmp_path, edit(old, new))) == ids(load(tmp_path, FILE))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  max_steps: 10\n", "  max_steps: 11\n"),
        ("n_embd=32", "n_embd=64"),
        ("{lowercase: false}", "{lowercase: true}"),
        ("seeds: [1, 2]\n", "seeds: [3, 4]\n"),
        ("  tiny:\n", "  tiny:\n    processes: 2\n"),
    ],
)
def test_what_decides_numbers_changes_every_id(tmp_path: Path, old: str, new: str) -> None:
    assert not set(ids(load(tmp_path, edit(old, new)))) & set(ids(load(tmp_path, FILE)))


def test_local_files_are_found_from_the_file_and_known_by_their_content(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first = load(here, with_files(here))
    assert run_at(first, variation="late", seed=1).arguments["train_file"] == str(here / "a.txt")
    assert run_at(first, variation="late", seed=1).arguments["test_file"] == str(here / "b.txt")
    assert ids(load(there, with_files(there))) == ids(first)
    assert not set(ids(load(there, with_files(there, "other\n")))) & set(ids(first))


def test_variables_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = with_files(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("two\n")
    monkeypatch.setenv("DPSM_TRY", str(tmp_path / "deep"))
    campaign = load(tmp_path, text)
    assert run_at(campaign, variation="late", seed=1).arguments["test_file"] == str(tmp_path / "deep" / "b.txt")
    monkeypatch.delenv("DPSM_TRY")
    said = wrong(tmp_path, text.replace(":-.", ""))
    assert said == (
        "try.yaml:36: data.docs.arguments.test_file: the environment variable DPSM_TRY is not set; set it, or write "
        "${DPSM_TRY:-A_DEFAULT}",
    )


def test_a_missing_file_is_found_before_anything_runs(tmp_path: Path) -> None:
    text = with_files(tmp_path)
    (tmp_path / "a.txt").unlink()
    (said,) = wrong(tmp_path, text)
    assert said.startswith(
        f"try.yaml:36: data.docs.arguments.train_file: there is no file or folder {tmp_path / 'a.txt'};"
    )


def test_further_sets_may_be_files_too(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It is a truth\n")
    text = edit("{lowercase: false}", "{extra_eval_datasets: ['books=./book.txt', 'docs=python-docs,split=test']}")
    run = run_at(load(tmp_path, text), variation="late", seed=1)
    assert run.arguments["extra_eval_datasets"] == [f"books={tmp_path / 'book.txt'}", "docs=python-docs,split=test"]
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "book.txt", other)
    assert ids(load(other, text)) == ids(load(tmp_path, text))
    # a name that begins like another's
    (other / "book.txt.more.txt").write_text("a man in want\n")
    two = text.replace("'books=./book.txt'", "'books=./book.txt', 'more=./book.txt.more.txt'")
    before = ids(load(other, two))
    (other / "book.txt.more.txt").write_text("of a fortune\n")
    assert ids(load(other, two)) != before
    (other / "book.txt").unlink()
    assert "extra_eval_datasets: there is no file or folder" in wrong(other, text)[0]


# ---- the command line's changes ------------------------------------------------------------------------------------


def test_set_changes_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*overrides: str, scale: str = "small") -> dict[str, Any]:
        campaign = load(tmp_path, FILE, scale, overrides=overrides)
        return dict(run_at(campaign, study="main", variation="late", seed=1).arguments)

    assert late("base.max_steps=7")["max_steps"] == 7
    assert late("base.max_steps=7", scale="paper")["max_steps"] == 7  # what is typed wins over the scale
    assert late("sizes.tiny.block_size=64")["block_size"] == 64
    assert late("variations.late.arguments.alpha_hold=0.7")["alpha_hold"] == 0.7
    assert "alpha_warmup_steps" not in late("base.alpha_warmup_steps=null")
    assert {p.seed for p in load(tmp_path, FILE, overrides=["seeds=[5]"]).points} == {5}
    without = load(tmp_path, FILE, overrides=["variations.scaled=null", "base.fit_temperature=false"])
    assert {p.variation for p in without.points} == {"ce", "brier", "dpsm", "late"}
    assert load(tmp_path, FILE, overrides=["budget.limit=3"]).budget.limit == 3.0
    (tmp_path / "x.txt").write_text("x\n")
    monkeypatch.chdir(tmp_path)
    files = [f"data.docs.{split}_file=x.txt" for split in ("train", "validation", "test")]
    given = late("base.dataset_name=null", *files)
    assert given["train_file"] == str(tmp_path / "x.txt") and "dataset_name" not in given


def test_set_with_dots_in_a_name(tmp_path: Path) -> None:
    text = FILE.replace("  late:", "  late0.5:").replace("  dpsm:", "  late0:").replace("[dpsm]", "[late0]")
    campaign = load(tmp_path, text, overrides=["variations.late0.5.alpha_hold=0.6"])
    assert run_at(campaign, variation="late0.5", seed=1).arguments["alpha_hold"] == 0.6


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("base.max_steps", "--set: base.max_steps: write KEY=VALUE, for instance base.max_steps=100"),
        (
            "base.max_step=3",
            "--set: base.max_step: 'max_step' is not an argument of the script; did you mean max_steps?",
        ),
        ("bas.max_steps=3", "--set: bas.max_steps: 'bas' is not a key of a campaign; did you mean base?"),
        ("data.doc.train_file=x", "--set: data.doc.train_file: there is no 'doc' in data; did you mean docs?"),
        (
            "base.max_steps=[",
            "--set: base.max_steps: '[' is no value; write a number, a word or a list as in the file",
        ),
        ("base.max_steps=many", "--set: base.max_steps: text ('many') where the script takes a whole number"),
        ("variations.late=1", "--set: variations.late: write variations.late.KEY=VALUE, or"),
        ("seeds.first=1", "--set: seeds.first: seeds has no keys of its own; write seeds=VALUE"),
    ],
)
def test_set_that_makes_no_sense(tmp_path: Path, override: str, said: str) -> None:
    assert any(line.startswith(said) for line in wrong(tmp_path, FILE, overrides=[override]))


def test_data_swaps_the_data_of_every_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = edit("  dataset_name: python-docs\n", "").replace("{lowercase: false}", "{dataset_name: python-docs}")
    text = text.replace("    variations: all\n", "    variations: all\n    data: [docs]\n")

    def data_of(given: str) -> tuple[str, dict[str, Any]]:
        campaign = load(tmp_path, text, overrides=[f"data={given}"])
        (name,) = {p.data for p in campaign.points}
        names = ("dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
        run = run_at(campaign, variation="late", seed=1)
        return name, {key: run.arguments[key] for key in names if key in run.arguments}

    assert data_of("docs") == ("docs", {"dataset_name": "python-docs"})
    assert data_of("python-docstrings") == ("python-docstrings", {"dataset_name": "python-docstrings"})
    hub = {"dataset_name": "Salesforce/wikitext", "dataset_config_name": "wikitext-2-raw-v1"}
    assert data_of("Salesforce/wikitext:wikitext-2-raw-v1") == ("wikitext-2-raw-v1", hub)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    assert data_of("mine") == ("mine", {"dataset_name": str(folder)})
    files = {f"{split}_file": str(folder / "a.txt") for split in ("train", "validation", "test")}
    assert data_of("train=mine/a.txt,validation=mine/a.txt,test=mine/a.txt") == ("mine", files)
    assert "--data: 'nowhere' is not a data set of this file" in wrong(tmp_path, text, overrides=["data=nowhere"])[0]
    said = wrong(tmp_path, text, overrides=["data=train=mine/none.txt,test=mine/a.txt"])
    assert any(f"there is no file or folder {folder / 'none.txt'}" in line for line in said)
    assert any("'tset=x' is not SPLIT=FILE" in line for line in wrong(tmp_path, text, overrides=["data=tset=x"]))


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "line", "said"), MISTAKES, ids=[mistake[3][:60] for mistake in MISTAKES])
def test_every_kind_of_mistake_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, line: str, said: str
) -> None:
    text = edit(old, new)
    found = wrong(tmp_path, text)
    wanted = [problem for problem in found if said in problem]
    assert wanted, "\n".join(found)
    number, key = re.fullmatch(r"try\.yaml:(\d+): (.*)", wanted[0]).groups()  # type: ignore[union-attr]
    assert text.splitlines()[int(number) - 1].strip() == line and key.startswith(said)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = edit("title: A try", "titel: A try").replace("max_steps: 10\n", "max_stepz: 10\n")
    text = text.replace("seeds: [1, 2]\n", "seeds: [1, x]\n").replace("variations: [dpsm]", "variations: [none]")
    found = wrong(tmp_path, text)
    assert [problem.split(":")[1] for problem in found] == ["2", "12", "38", "43"]
    assert str(SpecError(found)) == "\n".join(found)


def test_a_refused_value_is_reported_once_for_all_its_runs(tmp_path: Path) -> None:
    assert len(wrong(tmp_path, edit("  max_steps: 10\n", "  max_steps: 10\n  calibration_bins: 7\n"))) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    for text, said in (("", "a campaign is keys with values"), ("- a\n", "a campaign is keys with values")):
        assert said in wrong(tmp_path, text)[0]
    with pytest.raises(SpecError, match="there is no such file"):
        load_campaign(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="this is a folder"):
        load_campaign(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(SpecError, match="not UTF-8"):
        load_campaign(tmp_path / "latin.yaml")
    with pytest.raises(SpecError, match="'medium' is not a scale; choose one of small, paper"):
        load(tmp_path, FILE, "medium")
    assert "this alias contains itself" in wrong(tmp_path, edit("seeds: [1, 2]\n", "seeds: &s [*s]\n"))[0]


def test_nothing_looks_for_a_device_or_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan must not touch this")

    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    text = edit("model_type: gpt2", "model_name_or_path: someone/something").replace(
        "  max_steps: 10\n", "  bf16: true\n"
    )
    text = text.replace("      config_overrides: n_embd=32,n_layer=1,n_head=2\n      tokenizer_name: train-bpe\n", "")
    assert len(load(tmp_path, text).runs) == 10
