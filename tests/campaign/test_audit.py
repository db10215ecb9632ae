"""The efficiency audit of a campaign: real steps of real trainers in processes of their own, tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpsm_hf.campaign.audit import audit
from dpsm_hf.campaign.audit import worker as audit_worker
from dpsm_hf.campaign.audit.audit import AuditSettings, audited_runs, run_audit, table
from dpsm_hf.campaign.audit.step import Shape, make_batches, parse_arguments
from dpsm_hf.campaign.spec.design import Campaign, Point, Run, Variation
from dpsm_hf.campaign.spec.loading import SHIPPED, load_campaign
from dpsm_hf.data.python_text import load_python_docs
from dpsm_hf.runtime.ranges import RANGES

VOCABULARY = 300
COMMON: dict[str, Any] = {
    "tokenizer_name": "train-bpe", "tokenizer_vocab_size": VOCABULARY, "do_train": True, "max_steps": 100,
    "per_device_train_batch_size": 2, "use_cpu": True, "learning_rate": 1e-4, "eval_strategy": "steps",
    "eval_steps": 50, "evaluate_best": True, "save_steps": 50, "fit_temperature": True,
    "early_stopping_patience": 5, "sample_outputs": 4, "extra_eval_datasets": ["a=python-docs", "b=python-docs"],
}  # fmt: skip
BASE: dict[str, dict[str, Any]] = {
    "language-modelling": {
        **COMMON, "model_type": "gpt2", "config_overrides": "n_embd=32,n_layer=1,n_head=2,n_positions=32",
        "block_size": 32, "dataset_name": "python-docs",
    },
    "summarization": {
        **COMMON, "model_type": "bart",
        "config_overrides": "d_model=32,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,"
        "decoder_attention_heads=2,encoder_ffn_dim=48,decoder_ffn_dim=48,max_position_embeddings=64",
        "max_source_length": 48, "max_target_length": 16, "dataset_name": "python-docstrings",
    },
}  # fmt: skip
VARIATIONS: dict[str, dict[str, Any]] = {
    "ce": {"scoring_rule": "ce"},
    "dpsm": {"scoring_rule": "dpsm", "fused_head": "on"},
    "dpsm-full": {"scoring_rule": "dpsm", "fused_head": "off"},
}
SMALL = {"tokens": 120, "repeats": 3}
pytestmark = pytest.mark.usefixtures("warm_processes")


def make_campaign(
    task: str = "language-modelling",
    variations: Mapping[str, Mapping[str, Any]] = VARIATIONS,
    settings: Mapping[str, Any] | None = SMALL,
    scale: str = "small",
) -> Campaign:
    """Return a campaign of two sizes and two seeds."""
    known = [Variation(name, f"{name} in words", arguments=arguments) for name, arguments in variations.items()]
    runs, points = {}, []
    for size in ("tiny", "less-tiny"):
        for seed in (1, 2):
            for variation in known:
                run = Run(task, {**BASE[task], **variation.arguments, "seed": seed, "run_name": size})
                runs[run.id] = run
                points.append(Point("main", variation.name, size, "python", seed, run.id))
    scaled = Variation("ce+tempscale", "CE after temperature scaling", of="ce")
    points.append(Point("main", scaled.name, "tiny", "python", 1, points[0].run_id, scaled=True))
    return Campaign(
        "audited", "Audited", scale, task, (*known, scaled), tuple(points), runs, "ce", "ce", audit=settings
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


def processes(directory: Path) -> list[str]:
    """Return what each process was started for, from the log."""
    lines = (directory / "audit" / "log.txt").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("== ") for line in lines if line.startswith("== ")]


# ---- the whole, once -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    directory = tmp_path_factory.mktemp("audited")
    settings = {**SMALL, "steps": 2, "sequences": 4, "length": 24}
    return run_audit(make_campaign(settings=settings), directory), directory


@pytest.mark.slow
def test_an_audit_measures_every_variation(audited: tuple[dict[str, Any], Path]) -> None:
    content, directory = audited
    assert json.loads((directory / "audit.json").read_text(encoding="utf-8")) == content
    assert list(content["variations"]) == list(VARIATIONS)  # what reads another's runs has no step of its own
    assert processes(directory) == [
        "memory ce", "memory dpsm", "memory dpsm-full", "time ce dpsm dpsm-full", "sustain ce dpsm dpsm-full",
    ]  # fmt: skip
    assert content["device"] == "cpu" and content["machine"]["device"].startswith("CPU")
    for name, entry in content["variations"].items():
        assert (entry["status"], entry["message"], entry["title"]) == ("ok", "", f"{name} in words")
        seconds, ratio = entry["seconds_per_step"], entry["ratio"]
        assert seconds["samples"] == ratio["samples"] == 3
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        assert entry["tokens_per_second"] == pytest.approx(120 / seconds["median"])
        assert ratio["p10"] <= ratio["median"] <= ratio["p90"]
        assert set(entry["profile"]) == {"step", *RANGES}
        assert entry["profile"]["step"]["device_ms"] is None  # no kernels on a CPU
        assert entry["batch"] == {"sequences": 4, "source": 30, "target": 0, "tokens": 120, "labels": 120}
        assert entry["alpha"] == (None if name == "ce" else 1.0)
        sustained = entry["sustained"]
        assert (sustained["steps"], sustained["sequences"], sustained["source"]) == (2, 4, 24)
        assert sustained["tokens_per_second"] > 0 and sustained["seconds_per_step"]["samples"] == 2
        # without a GPU there is neither utilisation nor energy, and that is no zero
        assert entry["utilisation_percent"] is None and entry["joules_per_step"] is None
        assert entry["gpu"]["joules"] is None and entry["gpu_note"] == "not measured: no NVIDIA GPU"
    ce, dpsm, full = (content["variations"][name] for name in VARIATIONS)
    assert ce["ratio"]["median"] == ce["ratio"]["p90"] == 1.0
    assert ce["peak_memory_difference_mb"] == 0.0
    assert full["peak_memory_difference_mb"] == full["peak_memory_mb"] - ce["peak_memory_mb"]
    # the fused head leaves out the one token of each row that has no label
    assert full["flops"]["total"] - dpsm["flops"]["total"] == 6 * 4 * 32 * VOCABULARY
    assert ce["flops"] == dpsm["flops"]


@pytest.mark.slow
def test_an_audit_is_not_repeated_and_its_table_has_a_row_each(audited: tuple[dict[str, Any], Path]) -> None:
    content, directory = audited
    before = processes(directory)
    settings = {**SMALL, "steps": 2, "sequences": 4, "length": 24}
    assert run_audit(make_campaign(settings=settings), directory) == content
    assert processes(directory) == before
    rows = table(content)
    assert [row["variation"] for row in rows] == list(VARIATIONS)
    for row in rows:
        entry = content["variations"][row["variation"]]
        assert row["seconds_per_step"] == entry["seconds_per_step"]["median"]
        assert (row["ratio_p10"], row["ratio_p90"]) == (entry["ratio"]["p10"], entry["ratio"]["p90"])
        assert row["gflops_per_step"] == entry["flops"]["total"] / 1e9
        assert 0 < row["head_share"] < 1 and row["joules_per_step"] is None and row["device"].startswith("CPU")


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from pathlib import Path
from dpsm_hf.campaign.audit.audit import run_audit
from tests.campaign.test_audit import make_campaign, VARIATIONS
run_audit(make_campaign(variations={{name: VARIATIONS[name] for name in ("ce", "dpsm")}}), Path({str(tmp_path)!r}))
"""
    path = tmp_path / "audit.json"

    def measured() -> list[str]:
        if not path.exists():
            return []
        entries = json.loads(path.read_text(encoding="utf-8"))["variations"]  # whole at any moment
        return [name for name, entry in entries.items() if "peak_memory_mb" in entry]

    child = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 240
    while not measured():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = json.loads(path.read_text(encoding="utf-8"))["variations"]["ce"]["peak_memory_mb"]
    before = processes(tmp_path)
    subprocess.run([sys.executable, "-c", program], check=True)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["variations"]["ce"]["peak_memory_mb"] == kept
    assert processes(tmp_path)[len(before) :] == ["memory dpsm", "time ce dpsm"]
    assert all(entry["status"] == "ok" for entry in content["variations"].values())


# ---- a process, from inside ----------------------------------------------------------------------------------------


def make_spec(task: str, folder: Path, variations: Mapping[str, Mapping[str, Any]] = VARIATIONS) -> dict[str, Any]:
    runs = {name: run.arguments for name, run in audited_runs(make_campaign(task, variations)).items()}
    run = parse_arguments(task, runs["ce"], folder)
    texts = load_python_docs()["train"]["text"][:50]
    tokenizer = run.load_tokenizer(lambda: texts)
    tokenizer.save_pretrained(folder / "saved")
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    np.save(folder / "ids.npy", np.asarray(ids[:2000], dtype=np.int32))
    settings = {**SMALL, "steps": 1, "sequences": 4, "length": 24}
    return {"task": task, "reference": "ce", "runs": runs, "settings": settings, "tokenizer": str(folder / "saved"),
            "ids": str(folder / "ids.npy")}  # fmt: skip


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}

    def get(task: str) -> dict[str, Any]:
        if task not in made:
            made[task] = make_spec(task, tmp_path_factory.mktemp(task))
        return made[task]

    return get


@pytest.mark.parametrize("task", BASE)
def test_times_are_taken_round_by_round_and_profiled(task: str, specs: Callable[[str], dict[str, Any]]) -> None:
    found: list[dict[str, Any]] = []
    audit_worker.Measurement(specs(task), list(VARIATIONS), found.append).time(rounds=2)
    rounds = [finding for finding in found if "round" in finding]
    assert len(rounds) == 2 and all(set(finding["round"]) == set(VARIATIONS) for finding in rounds)
    assert len({finding["steps_per_sample"] for finding in rounds}) == 1
    assert [next(iter(finding["round"])) for finding in rounds] == ["ce", "dpsm"]  # everybody is first once
    profiles = {finding["variation"]: finding["profile"] for finding in found if "profile" in finding}
    assert set(profiles) == set(VARIATIONS)
    for name, profile in profiles.items():
        assert set(profile) == {"step", *RANGES}, name
        assert profile["step"]["calls"] == profile["forward"]["calls"] == profile["optimizer"]["calls"] == 1


def test_summaries_have_their_share_of_the_batch(specs: Callable[[str], dict[str, Any]]) -> None:
    found: list[dict[str, Any]] = []
    measurement = audit_worker.Measurement(specs("summarization"), ["dpsm"], found.append)
    shape = measurement.shape
    assert (shape.sequences, shape.source, shape.target, shape.length) == (2, 45, 15, 60)
    measurement.memory()
    measurement.sustain()
    memory, sustained = found
    assert memory["batch"]["labels"] == 30 and memory["flops"]["total"] > 0
    assert (sustained["sustained"]["sequences"], sustained["sustained"]["target"]) == (4, 6)


def test_micro_batches_are_the_run_s_and_the_text_is_real(specs: Callable[[str], dict[str, Any]]) -> None:
    ids = torch.arange(100)
    whole = make_batches(ids, Shape(5, 6, 0, 28), None, torch.device("cpu"))
    parts = make_batches(ids, Shape(5, 6, 0, 28), 2, torch.device("cpu"))
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), whole[0]["labels"])
    assert whole[0]["input_ids"].tolist()[1] == [6, 7, 8, 9, 10, 11]
    assert whole[0]["labels"].tolist()[-1] == [24, 25, 26, 27, -100, -100]  # 28 tokens, the rest is not scored
    pairs = make_batches(ids, Shape(2, 4, 2, 12), None, torch.device("cpu"))
    assert pairs[0]["input_ids"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert pairs[0]["labels"].tolist() == [[4, 5], [10, 11]]
    measurement = audit_worker.Measurement(specs("language-modelling"), ["ce"], lambda _: None)
    text = measurement.steps.tokenizer.decode(measurement.fixed_batch()[0]["input_ids"].reshape(-1))
    assert any(document.startswith(text[:40]) for document in load_python_docs()["train"]["text"])


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_a_step_is_that_of_the_trainer(max_grad_norm: float, specs: Callable[[str], dict[str, Any]]) -> None:
    """The audit's steps leave the parameters where a training run of as many does."""
    from dpsm_hf import DPSMTrainer

    spec = specs("language-modelling")
    # dropout draws other numbers, and Adam's first step is a sign
    still = f"{BASE['language-modelling']['config_overrides']},resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
    arguments = {**spec["runs"]["ce"], "config_overrides": still, "optim": "sgd", "learning_rate": 0.5,
                 "max_grad_norm": max_grad_norm}  # fmt: skip
    spec = {**spec, "runs": {"ce": arguments}}
    finals = []
    for way in ("audit", "trainer"):
        measurement = audit_worker.Measurement(spec, ["ce"], lambda _: None)
        steps = measurement.steps
        rows = make_batches(measurement.ids, Shape(8, 24, 0, 192), None, steps.device)[0]
        rows["labels"][1, 5:] = -100  # the micro-batches of a step have different numbers of tokens
        if way == "audit":
            parts = [{name: value[i : i + 2] for name, value in rows.items()} for i in (0, 2, 4, 6)]
            steps.step("ce", parts[:2])
            steps.step("ce", parts[2:])
        else:
            args = steps.runs["ce"].training_args
            args.max_steps, args.gradient_accumulation_steps = 2, 2
            args.train_sampling_strategy, args.lr_scheduler_type = "sequential", "constant"
            data = [{name: value[i] for name, value in rows.items()} for i in range(8)]
            DPSMTrainer(model=steps.model, args=args, train_dataset=data).train()  # type: ignore[arg-type]
        finals.append([parameter.detach().clone() for parameter in steps.model.parameters()])
    before = audit_worker.Measurement(spec, ["ce"], lambda _: None).steps.model.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, finals[0], strict=True))
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_variation_that_cannot_run_is_told_and_tried_again(tmp_path: Path) -> None:
    broken = {"ce": {"scoring_rule": "ce"}, "broken": {"scoring_rule": "dpsm", "alpha_schedule": "no-such"}}
    content = run_audit(make_campaign(variations=broken, settings={**SMALL, "repeats": 1}), tmp_path)
    assert content["variations"]["ce"]["status"] == "ok"
    entry = content["variations"]["broken"]
    assert entry["status"] == "failed" and "no-such" in entry["message"] and entry["ratio"] is None
    assert [row["status"] for row in table(content)] == ["ok", "failed"]
    before = processes(tmp_path)
    run_audit(make_campaign(variations=broken, settings={**SMALL, "repeats": 1}), tmp_path)
    assert processes(tmp_path)[len(before) :] == ["memory broken"]


def test_a_variation_that_fails_among_others_is_left_out(specs: Callable[[str], dict[str, Any]]) -> None:
    found: list[dict[str, Any]] = []
    measurement = audit_worker.Measurement(specs("language-modelling"), ["ce", "dpsm"], found.append)
    step = measurement.steps.step

    def sometimes(name: str, batches: Any) -> None:
        if name == "dpsm":
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        step(name, batches)

    measurement.steps.step = sometimes  # type: ignore[method-assign]
    measurement.time(rounds=1)
    assert found[0] == {"variation": "dpsm", "failed": "OutOfMemoryError: CUDA out of memory"}
    assert [set(finding["round"]) for finding in found if "round" in finding] == [{"ce"}]


def test_a_process_that_dies_is_a_failure_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit._Audit, "_spec", tmp_path / "no-spec.json")
    content = run_audit(make_campaign(variations={"ce": VARIATIONS["ce"]}), tmp_path)
    entry = content["variations"]["ce"]
    assert entry["status"] == "failed" and "no-spec.json" in entry["message"]
    assert entry["seconds_per_step"] is None and entry["joules_per_step"] is None


def test_another_commit_machine_or_batch_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = make_campaign(variations={"ce": VARIATIONS["ce"]})
    first = audit._Audit(campaign, tmp_path)
    first._take({"variation": "ce", "peak_memory_mb": 5.0})
    first._take({"round": {"ce": 0.5}, "steps_per_sample": 4})
    first._save()
    assert audit._Audit(campaign, tmp_path).entries["ce"]["peak_memory_mb"] == 5.0
    more = make_campaign(variations={"ce": VARIATIONS["ce"]}, settings={**SMALL, "repeats": 7})
    assert len(audit._Audit(more, tmp_path).entries["ce"]["samples"]) == 1  # goes on from what there is
    other = make_campaign(variations={"ce": {"scoring_rule": "ce", "learning_rate": 0.5}})
    larger = make_campaign(variations={"ce": VARIATIONS["ce"]}, settings={**SMALL, "tokens": 121})
    for changed in (other, larger):
        assert "peak_memory_mb" not in audit._Audit(changed, tmp_path).entries["ce"]
    machine = {**first.content["machine"], "commit": "another"}
    monkeypatch.setattr(audit, "describe_machine", lambda device: machine)
    assert "peak_memory_mb" not in audit._Audit(campaign, tmp_path).entries["ce"]
    monkeypatch.undo()
    (tmp_path / "audit.json").write_text('{"torn', encoding="utf-8")
    assert audit._Audit(campaign, tmp_path).entries["ce"]["samples"] == []


def test_settings_are_checked() -> None:
    assert AuditSettings.of(make_campaign(settings=None)) == AuditSettings()
    assert AuditSettings.of(make_campaign(settings={}, scale="paper")).steps == 1000
    with pytest.raises(ValueError, match="audit: token is unknown; there are tokens, repeats"):
        AuditSettings.of(make_campaign(settings={"token": 5}))
    with pytest.raises(ValueError, match="repeats=0 must be a whole number from 1 on"):
        AuditSettings.of(make_campaign(settings={"repeats": 0}))


def test_the_runs_differ_in_the_variation_alone() -> None:
    campaign = make_campaign()
    runs = audited_runs(campaign)
    assert list(runs) == list(VARIATIONS) and {run.arguments["seed"] for run in runs.values()} == {1}
    assert {run.arguments["run_name"] for run in audited_runs(campaign, "less-tiny").values()} == {"less-tiny"}
    with pytest.raises(ValueError, match="no run of size 'huge'; the plan has the sizes less-tiny, tiny"):
        audited_runs(campaign, "huge")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("exp-*.yaml")), ids=str)
def test_the_shipped_campaigns_can_be_audited(path: Path, tmp_path: Path) -> None:
    campaign = load_campaign(path, "small", only=["study=main", "seed=1"])
    runs = audited_runs(campaign)
    assert list(runs) == [v.name for v in campaign.variations if v.of is None]
    for run in runs.values():
        model = parse_arguments(campaign.task, run.arguments, tmp_path).model_args
        assert model.model_name_or_path is None and model.model_type in ("gpt2", "bart")
        assert model.tokenizer_name == "train-bpe"


def test_variations_of_different_models_are_refused(specs: Callable[[str], dict[str, Any]]) -> None:
    spec = specs("language-modelling")
    wider = {**spec["runs"]["dpsm"], "config_overrides": "n_embd=64,n_layer=1,n_head=2,n_positions=32"}
    with pytest.raises(ValueError, match="ce, dpsm differ in their model"):
        audit_worker.Measurement({**spec, "runs": {**spec["runs"], "dpsm": wider}}, ["ce", "dpsm"], print)
