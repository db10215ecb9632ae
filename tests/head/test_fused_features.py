"""What users do with a Trainer, with the head fused: the same numbers as from logits, no trace left in the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, TrainerCallback

from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.models.language_model import core_model
from tests import cases
from tests.tiny import LENGTH, VOCAB, make_data, make_model


def untouched(model: nn.Module) -> bool:
    """Whether no module has a forward of its own."""
    return not any("forward" in vars(module) for module in model.modules())


def train(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def make_trainer(model: nn.Module, tmp_path: Path, **arguments: Any) -> DPSMTrainer:
    defaults: dict[str, Any] = dict(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=3,
        learning_rate=1e-2, optim="sgd", alpha_schedule="constant", alpha_end=0.5, chunk_tokens=7,
    )  # fmt: skip
    data = make_data("gpt2")
    return DPSMTrainer(
        model=model, args=DPSMConfig(**{**defaults, **arguments}), train_dataset=data, eval_dataset=data
    )


def assert_same_training(
    make: Callable[[], nn.Module], tmp_path: Path, tolerance: float = 1e-5, **arguments: Any
) -> Any:
    """Train with the head fused and from logits: equal logs and parameters. Return the fused trainer."""
    start = [p.detach().clone() for p in make().parameters()]
    fused, full = (make_trainer(make(), tmp_path, fused_head=mode, **arguments) for mode in ("on", "off"))
    for mine, theirs in zip(train(fused), train(full), strict=True):
        for key in ("loss", "nll", "brier", "confidence"):
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance), key
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)
    moved = 0
    for before, mine, theirs in zip(start, fused.model.parameters(), full.model.parameters(), strict=True):
        assert (mine - theirs).norm() <= 10 * tolerance * max(float((theirs - before).norm()), 1e-3)
        assert mine.requires_grad or torch.equal(mine, before)
        moved += int(not torch.equal(mine, before))
    assert moved
    assert fused._scorer.head is not None and fused._scorer.head.checked
    mine, theirs = fused.evaluate(), full.evaluate()
    for key in ("eval_loss", "eval_nll", "eval_brier", "eval_entropy", "eval_spherical"):
        if key in theirs:
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance), key
    return fused


# ---- nothing is left behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bart", "llama_lora"])
def test_the_patch_is_undone_after_every_call(name: str) -> None:
    trainer = cases.build(name, max_steps=2, fused_head="on")
    clean: list[bool] = []

    class Look(TrainerCallback):
        def on_substep_end(self, *_: Any, **kwargs: Any) -> None:
            clean.append(untouched(kwargs["model"]))

        on_pre_optimizer_step = on_step_end = on_evaluate = on_train_end = on_substep_end

    trainer.add_callback(Look())
    trainer.train()
    trainer.evaluate()
    assert len(clean) >= 6 and all(clean)
    assert untouched(trainer.model)


def test_the_patch_is_undone_when_the_forward_fails(tmp_path: Path) -> None:
    model = make_model("gpt2")
    trainer = make_trainer(model, tmp_path, fused_head="on")
    batch = {key: torch.tensor(value) for key, value in make_data("gpt2")[:2].items()}
    trainer.compute_loss(model, dict(batch)).backward()  # checked from now on
    layer = model.transformer.h[1]
    for place in (layer, model.lm_head):
        handle = place.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.compute_loss(model, dict(batch))
        handle.remove()
        assert untouched(model)
    bad = {**batch, "labels": batch["labels"].clone().fill_(VOCAB)}
    with pytest.raises(ValueError, match=f"label {VOCAB} at position"):
        trainer.compute_loss(model, bad)
    assert untouched(model)
    trainer.compute_loss(model, dict(batch)).backward()  # and it goes on


def test_a_forward_that_was_there_before_comes_back(tmp_path: Path) -> None:
    model = make_model("gpt2")
    calls: list[str] = []
    for module, name in ((model, "model"), (model.lm_head, "head")):
        original = module.forward
        module.forward = lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1]  # type: ignore
    mine = dict(vars(model)), dict(vars(model.lm_head))
    fused, full = (make_trainer(model, tmp_path, fused_head=mode) for mode in ("on", "off"))
    batch = {key: torch.tensor(value) for key, value in make_data("gpt2")[:2].items()}
    loss = fused.compute_loss(model, dict(batch))
    assert {"model", "head"} <= set(calls)
    assert vars(model)["forward"] is mine[0]["forward"] and vars(model.lm_head)["forward"] is mine[1]["forward"]
    torch.testing.assert_close(loss, full.compute_loss(model, dict(batch)), rtol=1e-6, atol=0)


def test_saving_and_generating_during_training(tmp_path: Path) -> None:
    generated: list[Tensor] = []

    class Generate(TrainerCallback):
        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            was_training = model.training
            model.eval()
            generated.append(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False))
            assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, VOCAB)
            model.train(was_training)

    model = make_model("gpt2")
    trainer = make_trainer(model, tmp_path, fused_head="on", save_strategy="steps", save_steps=1)
    trainer.add_callback(Generate())
    trainer.train()
    assert len(generated) == 3
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert isinstance(loaded, GPT2LMHeadModel)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    model.eval()
    again = loaded.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(again, generated[-1])
    torch.save(model, tmp_path / "pickled.pt")  # a patched forward could not be pickled
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


# ---- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_activation_checkpointing(name: str) -> None:
    runs = [
        cases.build(name, max_steps=3, optim="sgd", fused_head=mode, **{cases.CHECKPOINTING: on})
        for mode, on in (("on", True), ("on", False), ("off", True))
    ]
    logs = [train(run) for run in runs]
    assert runs[0].model.is_gradient_checkpointing and not runs[1].model.is_gradient_checkpointing
    for first, second, third in zip(*logs, strict=True):
        for key in ("loss", "grad_norm"):
            assert first[key] == pytest.approx(second[key], rel=1e-6)
            assert first[key] == pytest.approx(third[key], rel=1e-5)


@pytest.mark.parametrize("frozen", ["nothing", "head", "backbone", "tied"])
def test_frozen_parts(frozen: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = make_model("gpt2" if frozen == "tied" else "llama")
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (frozen == "tied")
        if frozen == "head":
            model.lm_head.requires_grad_(False)
        if frozen == "backbone":
            model.model.requires_grad_(False)
        return model

    assert_same_training(make, tmp_path)


def test_bf16(tmp_path: Path) -> None:
    # the unfused path rounds its logits' gradients to bfloat16 as the fused one does, but sums them in other orders
    trainer = assert_same_training(lambda: make_model("llama"), tmp_path, tolerance=1e-3, bf16=True)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize("kind", ["one device", "layer by layer", "layer by layer, LoRA"])
def test_device_map(kind: str, tmp_path: Path) -> None:
    """Accelerate's hooks replace the forward of every module that is placed, also that of the output layer."""
    if kind == "one device":
        make_model("llama").save_pretrained(tmp_path / "saved")

    def make() -> nn.Module:
        if kind == "one device":
            return AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map={"": "cpu"})
        model = make_model("llama")
        places = [
            "model.embed_tokens",
            "model.rotary_emb",
            "model.layers.0",
            "model.layers.1",
            "model.norm",
            "lm_head",
        ]
        model = dispatch_model(model, dict.fromkeys(places, "cpu"), main_device="cpu", force_hooks=True)
        assert hasattr(model.lm_head, "_hf_hook") and len(set(model.hf_device_map)) == len(places)
        return get_peft_model(model, PEFT["q_proj"]) if "LoRA" in kind else model

    before = {name for name, module in make().named_modules() if "forward" in vars(module)}
    trainer = assert_same_training(make, tmp_path)
    assert {name for name, module in trainer.model.named_modules() if "forward" in vars(module)} == before


LORA: dict[str, Any] = dict(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
PEFT: dict[str, Any] = {
    "q_proj": LoraConfig(target_modules=["q_proj"], **LORA),
    "all-linear": LoraConfig(target_modules="all-linear", **LORA),
    "lm_head": LoraConfig(target_modules=["q_proj", "lm_head"], **LORA),
    "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
    "DoRA": LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True, **LORA),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def adapted(kind: str) -> PeftModel:
    """A Llama with an adapter that changes what it says."""
    model = get_peft_model(make_model("llama"), PEFT[kind])
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", PEFT)
def test_peft(kind: str, tmp_path: Path) -> None:
    trainer = assert_same_training(lambda: adapted(kind), tmp_path)
    model = trainer.model
    assert isinstance(model, PeftModel) and untouched(model)
    assert any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad) == (
        kind in ("lm_head", "modules_to_save")
    )
    if kind == "modules_to_save":  # without the adapter it is the base model's own head that scores
        with model.disable_adapter():
            plain = trainer.evaluate()["eval_nll"]
        base = make_trainer(make_model("llama"), tmp_path / "base", fused_head="off").evaluate()["eval_nll"]
        assert plain == pytest.approx(base, rel=1e-6) and plain != trainer.evaluate()["eval_nll"]


@pytest.mark.parametrize("kind", PEFT)
def test_peft_in_bf16(kind: str, tmp_path: Path) -> None:
    # logits are rounded to bfloat16 (eps 8e-3) in both, but their gradients are summed in other orders
    trainer = assert_same_training(lambda: adapted(kind), tmp_path, tolerance=2e-3, bf16=True)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize("kind", PEFT)
def test_a_resumed_adapter_is_bit_equal(kind: str, tmp_path: Path) -> None:
    options = dict(fused_head="on", optim="adamw_torch", max_steps=4, save_strategy="steps", save_steps=2)
    whole, again = (make_trainer(adapted(kind), tmp_path, **options) for _ in range(2))
    whole.train()
    start = {name: p.detach().clone() for name, p in again.model.named_parameters() if p.requires_grad}
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, mine), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert name not in start or not torch.equal(mine, start[name])
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]


@pytest.mark.slow
def test_torch_compile_trains_and_compiles_once(tmp_path: Path) -> None:
    compiled: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = make_trainer(
        make_model("gpt2"), tmp_path, fused_head="on", torch_compile=True, max_steps=5, optim="sgd",
        alpha_schedule="linear", alpha_warmup_steps=4, torch_compile_backend="aot_eager",
    )  # fmt: skip
    trainer.add_callback(Count())
    mine = train(trainer)
    # the first step is the check of the head; the second compiles what all others run
    assert 0 < compiled[1] == compiled[2] == compiled[3] == compiled[4]
    full = make_trainer(
        make_model("gpt2"), tmp_path, fused_head="off", max_steps=5, optim="sgd", alpha_schedule="linear",
        alpha_warmup_steps=4,
    )  # fmt: skip
    for a, b in zip(mine, train(full), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["alpha"] == b["alpha"]
    assert untouched(core_model(trainer.model))


# ---- evaluation ----------------------------------------------------------------------------------------------------


class Shapes:
    """Watch the shape of what the model returns for logits."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[int, ...] | None] = []
        model.register_forward_hook(self._look)

    def _look(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        self.seen.append(None if logits is None else tuple(logits.shape))


def test_evaluation_makes_logits_only_for_those_who_read_them() -> None:
    trainer = cases.build("gpt2", rows=6, fused_head="on", per_device_eval_batch_size=3)
    trainer.evaluate()  # the first batch of a class asks the model for its own loss
    shapes = Shapes(trainer.model)
    without = trainer.evaluate()
    assert shapes.seen == [None, None]

    handed: list[tuple[int, ...]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        handed.append(prediction.predictions.shape)
        logits, labels = torch.tensor(prediction.predictions)[:, :-1], torch.tensor(prediction.label_ids)[:, 1:]
        return {"own_nll": float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))}

    trainer.compute_metrics = compute_metrics
    with_metrics = trainer.evaluate()
    assert handed == [(6, LENGTH, VOCAB)] and shapes.seen[2:] == [(3, LENGTH, VOCAB)] * 2
    assert with_metrics["eval_own_nll"] == pytest.approx(without["eval_nll"], rel=1e-5)
    for key, value in without.items():
        if isinstance(value, float) and not any(
            part in key for part in ("runtime", "second", "time", "scaled", "ece")
        ):
            assert with_metrics[key] == pytest.approx(value, rel=1e-6, abs=rounding(key, without)), key

    output = trainer.predict(trainer.eval_dataset)
    assert np.shape(output.predictions) == (6, LENGTH, VOCAB)
    trainer.compute_metrics = None
    assert np.shape(trainer.predict(trainer.eval_dataset).predictions) == (6, LENGTH, VOCAB)


def rounding(key: str, metrics: dict[str, float]) -> float:
    """How far apart a difference of two figures may be that are equal to 1e-6 each, absolutely; else 0."""
    part = key.partition("eval_")[2]
    if part.startswith("nll_entropy_gap"):
        return 1e-6 * metrics["eval_nll"]
    if part.startswith("first_order_log_temperature"):
        return 1e-6 * metrics["eval_nll"] / metrics["eval_varentropy"]
    return 0.0


def assert_same_metrics(mine: dict[str, float], theirs: dict[str, float]) -> None:
    assert mine.keys() == theirs.keys()
    for key in theirs:
        if not any(part in key for part in ("runtime", "second", "preparation")):
            apart = max(1e-7, rounding(key, theirs))
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6, abs=apart), key


@pytest.mark.parametrize("name", ["gpt2", "llama_lora", "bart", "t5"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_is_that_from_logits(name: str, smoothing: float) -> None:
    fused, full = (
        cases.build(name, rows=7, fused_head=mode, per_device_eval_batch_size=3, label_smoothing_factor=smoothing)
        for mode in ("on", "off")
    )
    assert_same_metrics(fused.evaluate(), full.evaluate())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_predict_with_generate(name: str, smoothing: float) -> None:
    seen: list[Any] = []
    results = []
    for mode in ("on", "off"):
        trainer = cases.build(
            name, rows=5, fused_head=mode, predict_with_generate=True, generation_max_length=6,
            per_device_eval_batch_size=2, label_smoothing_factor=smoothing,
        )  # fmt: skip
        trainer.compute_metrics = lambda prediction: (seen.append(prediction.predictions), {"length": 1.0})[1]
        results.append(trainer.evaluate())
        assert untouched(trainer.model)
        assert trainer.label_smoother is None or smoothing
    assert np.array_equal(seen[0], seen[1]) and seen[0].shape[0] == 5
    assert_same_metrics(*results)
