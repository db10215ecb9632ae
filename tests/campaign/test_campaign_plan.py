"""The plan of a campaign: parameters, tokens, operations and hours, and the command line that prints it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, GPT2Config, LlamaConfig, PegasusConfig, T5Config

from dpsm_hf.__main__ import main
from dpsm_hf.campaign import plan as plan_module
from dpsm_hf.campaign.cost import Cost, measure, run_cost
from dpsm_hf.campaign.plan import Speed, in_hours, in_units, make_plan, measure_speed, render_plan
from dpsm_hf.campaign.runner.records import Record, write_record
from dpsm_hf.campaign.spec.design import Campaign, Run
from dpsm_hf.campaign.spec.loading import SHIPPED, load_campaign
from tests.campaign.files import FILE, edit
from tests.tiny import make_model


def load(tmp_path: Path, text: str = FILE, *args: Any, **options: Any) -> Campaign:
    (tmp_path / "try.yaml").write_text(text, encoding="utf-8")
    return load_campaign(tmp_path / "try.yaml", *args, **options)


# ---- what a model costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # as published with the models
        (GPT2Config(), 124_439_808),
        (GPT2Config(n_embd=1024, n_layer=24, n_head=16), 354_823_168),
        (GPT2Config(n_embd=1280, n_layer=36, n_head=20), 774_030_080),
        (BartConfig(), 406_291_456),
    ],
)
def test_parameters_of_known_models(config: Any, parameters: int) -> None:
    assert measure(config).parameters == parameters


def flops_by_counter(model: Any, **inputs: torch.Tensor) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "pegasus", "t5"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """Forward and backward of a real batch; what the formula leaves out is a few percent at most."""
    model = make_model(name)
    size = measure(model.config)
    source, target, rows = 20, 12, 3
    ids = torch.randint(3, 90, (rows, source))
    labels = torch.randint(3, 90, (rows, target))
    if model.config.is_encoder_decoder:
        counted, expected = flops_by_counter(model, input_ids=ids, labels=labels), size.row_flops(source, target)
    else:
        counted, expected = flops_by_counter(model, input_ids=labels, labels=labels), size.row_flops(0, target)
    # The first layer's input needs no gradient where embeddings end the graph, and T5 adds a bias to its attention.
    assert 0.93 < counted / (rows * expected) < 1.03


def test_a_language_model_by_hand() -> None:
    size = measure(GPT2Config(vocab_size=50, n_embd=8, n_layer=3, n_head=2, n_positions=16))
    matrices = 3 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8) + 8 * 50
    assert size.decoder == matrices and size.encoder == size.cross == 0
    assert size.row_flops(0, 16) == 6 * matrices * 16 + 12 * 3 * 8 * 16**2
    assert size.parameters == matrices + 16 * 8 + 3 * (24 + 8 + 32 + 8 + 4 * 8) + 2 * 8
    # above two frozen layers one is left, and the output layer
    upper = size.above(2)
    assert upper.row_flops(0, 16) == 6 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8 + 8 * 50) * 16 + 12 * 8 * 16**2
    assert upper.parameters == size.parameters


def test_an_encoder_decoder_by_hand() -> None:
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    size = measure(BartConfig(vocab_size=50, d_model=8, encoder_layers=2, decoder_layers=3, **ffn, **heads))
    encoder, cross = 2 * (4 * 64 + 2 * 8 * 16), 3 * 2 * 64
    decoder = 3 * (4 * 64 + 2 * 64 + 2 * 8 * 32) + 8 * 50
    assert (size.encoder, size.cross, size.decoder) == (encoder, cross, decoder)
    assert size.row_flops(20, 5) == (
        6 * (encoder + cross) * 20 + 12 * 2 * 8 * 20**2 + 6 * decoder * 5 + 12 * 3 * 8 * (5**2 + 20 * 5)
    )


def test_other_families_are_measured_too() -> None:
    llama = measure(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    t5 = measure(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2))
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    pegasus = measure(PegasusConfig(vocab_size=64, d_model=16, **layers))
    assert llama.decoder_layers == 2 and llama.encoder == 0 and llama.decoder == 2 * (4 * 256 + 3 * 512) + 1024
    assert (t5.encoder_layers, t5.decoder_layers) == (2, 3) and t5.cross == 3 * 2 * 256
    assert (pegasus.encoder_layers, pegasus.decoder_layers, pegasus.cross) == (1, 2, 2 * 2 * 256)


def cost_of(tmp_path: Path, text: str, **extra: Any) -> Cost:
    campaign = load(tmp_path, text)
    run = next(iter(campaign.runs.values()))
    return run_cost(campaign, Run(run.task, {**run.arguments, **extra}, run.processes), "tiny", "docs")


def test_tokens_of_a_run(tmp_path: Path) -> None:
    text = edit("n_head=2", "n_head=2,n_positions=64").replace(
        "  max_steps: 10\n", "  max_steps: 10\n  block_size: 64\n"
    )
    assert cost_of(tmp_path, text).tokens == 10 * 8 * 64
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    assert cost_of(tmp_path, text, **more).tokens == 10 * 12 * 64
    cost = cost_of(tmp_path, text.replace("  tiny:\n", "  tiny:\n    processes: 2\n"), **more)
    assert cost.tokens == 10 * 24 * 64 and cost.parameters is not None and cost.flops is not None


def test_steps_from_epochs(tmp_path: Path) -> None:
    text = edit("  max_steps: 10\n", "  num_train_epochs: 2\n  block_size: 64\n").replace(
        "n_head=2", "n_head=2,n_positions=64"
    )
    assert cost_of(tmp_path, text) == Cost(cost_of(tmp_path, text).parameters, None, None, None)
    told = text.replace("  docs:\n", "  docs:\n    train_tokens: 6500\n")
    assert cost_of(tmp_path, told).steps == 2 * 13  # 101 rows of 64 tokens, 8 a step
    assert cost_of(tmp_path, told, low_resource=0.1).steps == 2 * 2
    assert cost_of(tmp_path, told, cross_validation_folds=5, cross_validation_fold=0).steps == 2 * 11
    assert cost_of(tmp_path, told, max_train_samples=16).steps == 2 * 2
    examples = text.replace("  docs:\n", "  docs:\n    train_examples: 100\n")
    assert cost_of(tmp_path, examples).steps == 2 * 13


def test_a_model_on_the_hub_is_known_where_the_file_says_what_it_is(tmp_path: Path) -> None:
    text = edit("model_type: gpt2", "model_name_or_path: nobody/nothing")
    text = text.replace("      config_overrides: n_embd=32,n_layer=1,n_head=2\n      tokenizer_name: train-bpe\n", "")
    campaign = load(tmp_path, text)
    plan = make_plan(campaign, flops_per_second=1e9)
    assert plan["total"]["hours"] is None and plan["runs"][0]["parameters"] is None
    assert "unknown" in render_plan(plan)
    told = text.replace("  tiny:\n", "  tiny:\n    architecture: {model_type: gpt2}\n")
    assert make_plan(load(tmp_path, told), flops_per_second=1e9)["runs"][0]["parameters"] == 124_439_808


def test_the_vocabulary_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    def parameters(text: str) -> int:
        found = cost_of(tmp_path, text).parameters
        assert found is not None
        return found

    default = parameters(FILE)
    more = edit(
        "      tokenizer_name: train-bpe\n", "      tokenizer_name: train-bpe\n      tokenizer_vocab_size: 5096\n"
    )
    assert parameters(more) - default == (5096 - 4096) * 32


def test_a_run_that_starts_from_another_has_its_size(tmp_path: Path) -> None:
    start = "      tokenizer_name: train-bpe\n    start_from: {seed: 1}\n"
    plan = make_plan(load(tmp_path, edit("      tokenizer_name: train-bpe\n", start)), flops_per_second=1e9)
    assert len({run["parameters"] for run in plan["runs"]}) == 1 and plan["runs"][0]["parameters"] is not None
    assert len(plan["preparations"]) == 1 and "whose model others start from" in render_plan(plan)


# ---- hours ---------------------------------------------------------------------------------------------------------


def test_hours_at_a_given_speed(tmp_path: Path) -> None:
    campaign = load(tmp_path)
    plan = make_plan(campaign, flops_per_second=1e9, jobs=2)
    runs = plan["runs"]
    assert [run["id"] for run in runs] == campaign.order
    assert runs[0]["hours"] == pytest.approx(runs[0]["flops"] / 1e9 / 3600)
    assert plan["total"]["hours"] == pytest.approx(sum(run["hours"] for run in runs))
    assert plan["total"]["hours_of_wall_clock"] == pytest.approx(plan["total"]["hours"] / 2)
    assert plan["total"]["tokens"] == 10 * 10 * 8 * 1024
    several = load(tmp_path, edit("  tiny:\n", "  tiny:\n    processes: 2\n"))
    # twice the rows, by two processes
    assert make_plan(several, flops_per_second=1e9)["runs"][0]["hours"] == pytest.approx(runs[0]["hours"])


def finished(
    campaign: Campaign, directory: Path, run_id: str, seconds: float, status: str = "ok", **more: Any
) -> None:
    folder = directory / "runs" / run_id
    folder.mkdir(parents=True)
    attempts = [{"seconds": seconds / 2}, {"seconds": seconds / 2}]
    write_record(Record(run_id, "a run", campaign.task, {}, status=status, attempts=attempts, **more), folder)


def test_hours_from_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "measure_speed", lambda dtype: Speed(1.0, "a guess"))
    campaign = load(tmp_path)
    first, second, third = campaign.order[:3]
    finished(campaign, tmp_path, first, 100.0, efficiency={"steps": 10})
    finished(campaign, tmp_path, second, 60.0, efficiency={"steps": 5})  # stopped early, after half the steps
    finished(campaign, tmp_path, third, 5.0, status="failed")
    plan = make_plan(campaign, tmp_path)
    assert plan["speed"]["tiny"]["source"] == "measured: 2 finished run(s)"
    assert plan["runs"][0]["hours"] * 3600 == pytest.approx(160 / 1.5)
    other = load(tmp_path, FILE, overrides=["base.max_steps=20"])  # runs of other ids do not count
    assert make_plan(other, tmp_path)["speed"]["tiny"]["source"] == "a guess"


def test_a_guess_from_this_machine() -> None:
    speed = measure_speed(torch.float32)
    assert speed is not None and 1e7 < speed.flops_per_second < 1e16 and "a guess: 35% of the" in speed.source


def test_the_guess_is_a_share_of_what_the_clock_says() -> None:
    ticks = iter(range(100))
    speed = measure_speed(torch.float32, clock=lambda: float(next(ticks)))
    assert speed is not None and speed.flops_per_second == pytest.approx(0.35 * 2 * 1024**3)


@pytest.mark.parametrize(
    ("hours", "words"), [(None, "unknown"), (0.5, "30.0 min"), (5.0, "5.0 h"), (100.0, "4.2 days")]
)
def test_times_for_people(hours: float | None, words: str) -> None:
    assert in_hours(hours) == words


def test_large_numbers_for_people() -> None:
    assert [in_units(value) for value in (None, 12, 1234, 5.6e9, 7.89e20)] == [
        "unknown",
        "12 ",
        "1.23 k",
        "5.6 G",
        "789 E",
    ]


# ---- the command ---------------------------------------------------------------------------------------------------


def test_plan_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "try.yaml").write_text(FILE)
    words = [
        "campaign",
        "plan",
        str(tmp_path / "try.yaml"),
        "--output_dir",
        str(tmp_path),
        "--flops_per_second",
        "1e9",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "A try (try, scale small): 10 runs" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["main", "tiny", "docs", "-", "5", "2", "8", "0"] in rows
    assert ["sweep", "tiny", "docs", "alpha_warmup_steps=0.1", "1", "2", "0", "2"] in rows
    assert ["sweep", "tiny", "docs", "alpha_warmup_steps=0.2", "1", "2", "2", "0"] in rows
    assert "speed of tiny: 1 GFLOP/s for each process, as given" in text and "in all: 819 ktokens" in text
    assert main([*words, "--json", "--only", "study=main", "--only", "role=main,seed=9", "--scale", "paper"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["scale"] == "paper" and len(plan["runs"]) == 9 and plan["schema"] == 1
    assert {point["study"] for point in plan["points"]} == {"main"}
    assert main([*words, "--runs", "--set", "seeds=[4]"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if "  late  " in line]
    campaign = load(tmp_path, FILE, overrides=["seeds=[4]"])
    assert len(listed) == 1 and listed[0].split()[0] in campaign.runs
    assert not [path for path in tmp_path.iterdir() if path.name != "try.yaml"]  # nothing was started or written


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "try.yaml").write_text(FILE.replace("max_steps: 10\n", "max_stepz: 10\n").replace("[1, 2]", "[1, 1]"))
    for step in ("plan", "run", "status", "report", "audit"):
        assert main(["campaign", step, str(tmp_path / "try.yaml"), "--output_dir", str(tmp_path)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.splitlines()[-1] == "2 mistakes; nothing was started."
        assert "try.yaml:12: base.max_stepz:" in said.err and "try.yaml:38: seeds: the seed 1" in said.err
    assert not [path for path in tmp_path.iterdir() if path.name != "try.yaml"]
    for words in (
        ["campaign"],
        ["campaign", "plan"],
        ["campaign", "plna", "x"],
        ["campaign", "plan", "x", "--scale", "big"],
        ["campaign", "run", "x", "--retry", "ok"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    assert main(["campaign", "plan", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err
    (tmp_path / "try.yaml").write_text(FILE.replace("n_head=2", "n_head=3"))
    assert main(["campaign", "run", str(tmp_path / "try.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "try: size tiny (gpt2 n_embd=32,n_layer=1,n_head=3) is no model that can be built" in said
    assert "divisible" in said and not (tmp_path / "out").exists()


def test_run_does_everything_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpsm_hf.campaign.audit import audit
    from dpsm_hf.campaign.report import report
    from dpsm_hf.campaign.runner import running

    done: list[str] = []
    code = 0

    def run(campaign: Campaign, directory: Path, **options: Any) -> int:
        done.append(f"run {len(campaign.runs)} {sorted(options.items())}")
        assert (directory / "plan.json").exists()
        return code

    def fail(campaign: Campaign, directory: Path) -> None:
        done.append("audit")
        raise ValueError("cannot be audited")

    def write(campaign: Campaign, directory: Path, only: Sequence[str]) -> list[Path]:
        assert only == ["study=main"]
        done.append("report")
        return [directory / "report.html"]

    monkeypatch.setattr(running, "run_campaign", run)
    monkeypatch.setattr(audit, "run_audit", fail)
    monkeypatch.setattr(report, "write_campaign_report", write)
    monkeypatch.setattr(plan_module, "measure_speed", lambda dtype: None)
    (tmp_path / "try.yaml").write_text(edit("budget:\n", "audit: {size: tiny}\nbudget:\n"))
    words = ["campaign", "run", str(tmp_path / "try.yaml"), "--output_dir", str(tmp_path), "--only", "study=main"]
    assert main([*words, "--jobs", "2", "--devices", "0,1", "--retry", "oom"]) == 1
    options = "[('devices', ['0', '1']), ('jobs', 2), ('keep', 'model'), ('retry', ['oom'])]"
    assert done == [f"run 8 {options}", "audit", "report"]
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "try-small" / "report.html")]
    assert "8 runs" in said.err and "error: cannot be audited" in said.err
    plan = json.loads((tmp_path / "try-small" / "plan.json").read_text())
    assert plan["command"].startswith("dpsm campaign run ") and plan["command"].endswith("--devices 0,1 --retry oom")
    done.clear()
    assert main([*words, "--no_audit"]) == 0 and [step.split()[0] for step in done] == ["run", "report"]
    done.clear()
    code = 130
    assert main(words) == 130 and [step.split()[0] for step in done] == ["run"]


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--help"], "campaign"),
        (["campaign", "--help"], "write the report from the records that are there"),
        (["campaign", "run", "--help"], "--only KEY=PATTERN"),
    ):
        try:
            assert main(words) == 0
        except SystemExit as stop:
            assert stop.code == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["exp-1-language-modelling-scaling", "exp-2-seq2seq-finetune-robustness"])
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_plans_of_the_shipped_campaigns(name: str, scale: str) -> None:
    campaign = load_campaign(SHIPPED / f"{name}.yaml", scale)
    plan = make_plan(campaign, flops_per_second=1e14)
    assert all(run[key] for run in plan["runs"] for key in ("parameters", "steps", "tokens", "flops", "hours"))
    assert sum(study["runs"] for study in plan["studies"]) + len(plan["preparations"]) == len(campaign.runs)
    parameters = {run["size"]: run["parameters"] for run in plan["runs"]}
    if (name[:5], scale) == ("exp-1", "paper"):
        assert [round(value / 1e6) for value in parameters.values()] == [124, 355, 774, 1314]
    if (name[:5], scale) == ("exp-2", "paper"):
        assert [round(value / 1e6) for value in parameters.values()] == [139, 406, 571]
