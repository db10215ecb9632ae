"""The named ranges of a training step: where they begin and end, what they cost, and that they change no result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import profile
from transformers import Trainer

from dpsm_hf import DPSMConfig, DPSMLoss, DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer, DPSMTrainer, linear_scoring_loss
from dpsm_hf.measuring.profiling import profile_by_range, times_by_range
from dpsm_hf.models.language_model import is_compiled
from dpsm_hf.runtime import ranges
from tests.tiny import make_data, make_model

STEPS = 2


def make_trainer(name: str, folder: Path, **arguments: Any) -> Any:
    seq2seq = name == "bart"
    config = DPSMSeq2SeqConfig if seq2seq else DPSMConfig
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", per_device_train_batch_size=4, alpha_schedule="constant", alpha_end=0.5,
    )  # fmt: skip
    trainer = DPSMSeq2SeqTrainer if seq2seq else DPSMTrainer
    return trainer(model=make_model(name), args=config(**{**settings, **arguments}), train_dataset=make_data(name))


def intervals(profiler: Any) -> list[tuple[str, float, float]]:
    events = [e for e in profiler.events() if e.name in ranges.RANGES and e.device_type == DeviceType.CPU]
    return sorted(((e.name, e.time_range.start, e.time_range.end) for e in events), key=lambda found: found[1:])


def inside(found: list[tuple[str, float, float]], inner: str, outer: str) -> int:
    """Count the ranges of one name that lie in one of another."""
    around = [(start, end) for name, start, end in found if name == outer]
    mine = [(start, end) for name, start, end in found if name == inner]
    return sum(any(a <= start and end <= b for a, b in around) for start, end in mine)


@pytest.mark.parametrize("scoring_rule", ["dpsm", "ce"])
@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_a_profile_has_all_ranges_where_they_belong(
    name: str, fused_head: str, scoring_rule: str, tmp_path: Path
) -> None:
    trainer = make_trainer(
        name, tmp_path, fused_head=fused_head, scoring_rule=scoring_rule, gradient_accumulation_steps=2
    )
    with profile(acc_events=True) as profiler:
        trainer.train()
    found = intervals(profiler)
    count = Counter(name for name, _, _ in found)
    batches = 2 * STEPS
    assert count["forward"] == count["backward"] == batches and count["optimizer"] == STEPS
    # fused: scored in the forward pass, scaled in the backward pass; full logits: layer, loss, and their backward
    assert count["head"] == (2 if fused_head == "on" else 3) * batches
    assert inside(found, "head", "backward") == batches
    assert inside(found, "head", "forward") == count["head"] - batches
    assert inside(found, "row pass", "head") == count["row pass"] >= batches
    assert inside(found, "backward", "forward") == inside(found, "optimizer", "backward") == 0
    # from full logits the gradient by the logits is a second pass over the rows, or cross-entropy's own
    assert inside(found, "row pass", "backward") == (batches if (fused_head, scoring_rule) == ("off", "dpsm") else 0)
    assert vars(trainer.accelerator).get("backward") is None
    layer = trainer.model.get_output_embeddings()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_the_head_is_the_output_layer_and_the_loss(tmp_path: Path) -> None:
    """What belongs to the head runs in it, and what belongs to the blocks does not."""
    trainer = make_trainer("gpt2", tmp_path, fused_head="off", scoring_rule="ce", max_steps=1)
    with profile(acc_events=True) as profiler:
        trainer.train()
    heads = [(start, end) for name, start, end in intervals(profiler) if name == "head"]

    def in_head(name: str) -> list[bool]:
        found = [event for event in profiler.events() if event.name == name]
        assert found, name
        return [any(a <= e.time_range.start and e.time_range.end <= b for a, b in heads) for e in found]

    assert all(in_head("aten::nll_loss_forward")) and all(in_head("NllLossBackward0"))
    # GPT-2's blocks multiply with addmm; its output layer alone has no bias
    assert sum(in_head("MmBackward0")) == len(in_head("MmBackward0")) == 1
    assert not any(in_head("AddmmBackward0")) and not any(in_head("NativeLayerNormBackward0"))
    assert sum(in_head("aten::_log_softmax")) > 0


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_a_profile_changes_no_bit(name: str, fused_head: str, tmp_path: Path) -> None:
    finals = []
    for profiled in (False, True):
        trainer = make_trainer(name, tmp_path, fused_head=fused_head)
        if profiled:
            with profile():
                trainer.train()
        else:
            trainer.train()
        finals.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_without_a_profiler_nothing_is_recorded_hooked_or_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a range was recorded although nobody looks")

    monkeypatch.setattr(ranges, "record_function", refuse)
    monkeypatch.setattr(torch.cuda.nvtx, "range", refuse)
    trainer = make_trainer("gpt2", tmp_path, fused_head="off")
    trainer.train()
    assert not ranges.active()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    stock = Trainer(model=make_model("gpt2"), args=trainer.args, train_dataset=make_data("gpt2"))
    ours = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    theirs = [type(callback).__name__ for callback in stock.callback_handler.callbacks]
    assert set(ours) - set(theirs) == {"AlphaScheduleCallback", "CalibrationCallback"}  # of DPSMConfig, as ever


def test_an_error_closes_its_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("gpt2", tmp_path, fused_head="off")
    layer = trainer.model.get_output_embeddings()

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(layer, "forward", broken)
    with profile(acc_events=True) as profiler:
        with pytest.raises(RuntimeError, match="no such layer"):
            trainer.train()
    found = intervals(profiler)
    assert [name for name, _, _ in found] == ["forward", "head"]
    assert all(end > start for _, start, end in found)
    assert not layer._forward_hooks and vars(trainer.accelerator).get("backward") is None


# ---- NVTX -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls to NVTX with CUDA in use: a name opens a range, "end" closes it."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    yield seen


@pytest.mark.parametrize(
    ("fused_head", "expected"),
    [
        ("on", "forward(head(row pass())) backward(head()) optimizer()"),
        ("off", "forward(head() head(row pass())) backward(head(row pass())) optimizer()"),
    ],
)
def test_on_cuda_the_ranges_are_nvtx(fused_head: str, expected: str, nvtx: list[str], tmp_path: Path) -> None:
    trainer = make_trainer("gpt2", tmp_path, fused_head=fused_head, max_steps=1)
    trainer.train()
    text = ""
    for word in nvtx:
        text += ")" if word == "end" else ("" if text[-1:] in ("", "(") else " ") + word + "("
    assert text == expected


def test_a_profiler_of_torch_takes_the_ranges_alone(nvtx: list[str]) -> None:
    with profile(acc_events=True) as profiler:
        with ranges.named("head"):
            pass
    assert not nvtx and [name for name, _, _ in intervals(profiler)] == ["head"]
    with ranges.named("head"):  # and whoever started listening while a range was open does not see its end
        with profile(acc_events=True):
            pass
    assert nvtx == ["head", "end"]


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profiled", [False, True])
def test_a_compiled_loss_breaks_nowhere_new(profiled: bool) -> None:
    criterion, weight = DPSMLoss(50, 100), torch.randn(50, 8, requires_grad=True)
    calls = (
        lambda x, y: criterion(x @ weight.t(), y),
        lambda x, y: linear_scoring_loss(x, weight, y, alpha=0.3, impl="reference").loss,
    )
    for call in calls:
        torch._dynamo.reset()
        x, y = torch.randn(6, 8, requires_grad=True), torch.randint(50, (6,))
        if profiled:
            with profile():
                found = torch._dynamo.explain(call)(x, y)
        else:
            found = torch._dynamo.explain(call)(x, y)
        reasons = " ".join(str(reason.reason) for reason in found.break_reasons)
        assert "context manager" not in reasons and "profiler" not in reasons


def test_a_profile_of_a_compiled_model_compiles_nothing_again(tmp_path: Path) -> None:
    graphs = []
    for profiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make_trainer(
            "gpt2", tmp_path, fused_head="off", torch_compile=True, torch_compile_backend="aot_eager"
        )
        if profiled:
            with profile(acc_events=True) as profiler:
                trainer.train()
            # the output layer is part of the program, so its share of the forward pass has no name of its own
            assert {name for name, _, _ in intervals(profiler)} == set(ranges.RANGES)
        else:
            trainer.train()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] >= 1


def test_a_compiled_model_is_known_through_its_wrappers() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = make_model("gpt2")
    assert not is_compiled(model) and not is_compiled(Wrapper(model))
    assert is_compiled(torch.compile(model)) and is_compiled(Wrapper(torch.compile(model)))
    model.compile(backend="eager")
    assert is_compiled(model) and is_compiled(Wrapper(model))


# ---- adding up ------------------------------------------------------------------------------------------------------


def event(name: str, start: float, end: float, kernels: float = 0.0, thread: int = 1) -> Any:
    launched = [SimpleNamespace(duration=kernels)] if kernels else []
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), device_type=DeviceType.CPU, kernels=launched,
        thread=thread,
    )  # fmt: skip


def test_times_are_added_up_by_range() -> None:
    events = [
        event("step", 0, 1000),
        event("forward", 0, 400), event("aten::mm", 10, 20, kernels=70), event("head", 100, 300),
        event("head", 110, 290),  # one in the other is counted once
        event("row pass", 150, 200), event("row_kernel", 160, 170, kernels=50),
        event("backward", 400, 900), event("head", 410, 500, thread=2), event("aten::mm", 420, 430, 200, thread=2),
        event("aten::mm", 600, 610, kernels=300, thread=2), event("aten::add", 950, 960, kernels=11),
        SimpleNamespace(**{**vars(event("head", 0, 5000)), "device_type": DeviceType.CUDA}),  # its shadow on the GPU
    ]  # fmt: skip
    found = times_by_range(events, kernels=True)
    cpu = {name: (time.calls, time.cpu_ms, time.own_cpu_ms) for name, time in found.items()}
    assert cpu == {
        "step": (1, 1.0, pytest.approx(0.1)), "forward": (1, 0.4, pytest.approx(0.2)),
        "head": (2, pytest.approx(0.29), pytest.approx(0.02 + 0.13 + 0.09)), "row pass": (1, 0.05, 0.05),
        "backward": (1, 0.5, pytest.approx(0.41)),
    }  # fmt: skip
    device = {name: (time.device_ms, time.own_device_ms) for name, time in found.items()}
    assert device == {
        "step": (pytest.approx(0.631), pytest.approx(0.011)), "forward": (pytest.approx(0.12), pytest.approx(0.07)),
        "head": (pytest.approx(0.25), pytest.approx(0.2)), "row pass": (pytest.approx(0.05), pytest.approx(0.05)),
        "backward": (pytest.approx(0.5), pytest.approx(0.3)),
    }  # fmt: skip
    without = times_by_range(events, kernels=False)
    assert all(time.device_ms is None and time.own_device_ms is None for time in without.values())


def test_the_parts_of_a_profiled_step_are_no_more_than_the_whole(tmp_path: Path) -> None:
    trainer = make_trainer("gpt2", tmp_path, max_steps=1)

    def step() -> None:
        trainer.train()

    found = profile_by_range(step, torch.device("cpu"))
    assert set(found) == {"step", *ranges.RANGES}
    parts = sum(found[name].cpu_ms for name in ("forward", "backward", "optimizer"))
    assert 0 < parts < found["step"].cpu_ms
    own = sum(time.own_cpu_ms for time in found.values())
    assert own == pytest.approx(found["step"].cpu_ms, rel=1e-6)
    assert found["head"].cpu_ms < found["forward"].cpu_ms + found["backward"].cpu_ms
