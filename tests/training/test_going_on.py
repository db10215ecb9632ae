"""Going on from a checkpoint with `trainer.train`: damaged ones, other data and settings, streams read many times."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.training.checkpoint_files import examine
from dpsm_hf.training.run_facts import RunFacts
from tests import cases
from tests.damage import DAMAGES, cut, exchanged, flipped, lost, without_digests
from tests.tiny import make_data, make_model

COMMON = dict(max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, dropout=0.1)


def build(folder: Path, model: str = "gpt2", **arguments: Any) -> Trainer:
    return cases.build(model, output_dir=str(folder), **{**COMMON, **arguments})


def parameters(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A run of six steps with checkpoints 2, 4, 6, and its last parameters."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder)
    trainer.train()
    return folder, parameters(trainer)


@pytest.fixture
def run(whole: tuple[Path, list[torch.Tensor]], tmp_path: Path) -> Path:
    """A copy of that run's folder, killed after step 4."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    return tmp_path / "run"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged; transformers keeps its loggers from the root's."""
    loggers = [logging.getLogger(name) for name in ("transformers", "dpsm_hf.training.resuming")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def said_before_training(trainer: Any, said: Any) -> str:
    """Go on from the newest checkpoint and return what was logged before the first step."""
    heard: list[str] = []

    class Listen(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(said.text)

    trainer.add_callback(Listen())
    trainer.train(resume_from_checkpoint=True)
    return heard[0]


# ---- damaged checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_taken(
    kind: str, run: Path, whole: tuple[Path, list[torch.Tensor]], said: Any
) -> None:
    damage, name = DAMAGES[kind]
    damage(run / "checkpoint-4")
    trainer = build(run)
    trainer.train(resume_from_checkpoint=True)
    assert f"{run}/checkpoint-4 is incomplete or damaged" in said.text and name in said.text
    assert f"The newest sound one is {run}/checkpoint-2" in said.text
    assert same(parameters(trainer), whole[1])


@pytest.mark.parametrize("kind", ["weights cut", "optimizer empty", "state lost"])
def test_a_damaged_checkpoint_that_is_named_stops_with_the_sound_one(kind: str, run: Path) -> None:
    damage, name = DAMAGES[kind]
    damage(run / "checkpoint-4")
    with pytest.raises(ValueError, match=f"checkpoint-4.*{name}.*take .*checkpoint-2"):
        build(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rng_state.pth", {}, "random state in .*checkpoint-4 holds something else"),
        ("rng_state.pth", torch.zeros(2), "random state in .*checkpoint-4 holds something else"),
        ("optimizer.pt", torch.zeros(2), r"what optimizer\.pt in .*checkpoint-4 holds does not fit torch.*AdamW"),
        ("optimizer.pt", {"state": {}, "param_groups": []}, r"what optimizer\.pt in .*checkpoint-4"),
        ("scheduler.pt", {}, r"what scheduler\.pt in .*checkpoint-4 holds does not fit torch.*LambdaLR"),
        ("scheduler.pt", torch.zeros(2), r"what scheduler\.pt in .*checkpoint-4"),
    ],
)
def test_a_whole_file_that_holds_something_else_is_named(name: str, content: Any, words: str, run: Path) -> None:
    torch.save(content, run / "checkpoint-4" / name)
    without_digests(run / "checkpoint-4")  # with them, the file is not even loaded
    with pytest.raises(ValueError, match=f"{words}.*older checkpoint"):
        build(run).train(resume_from_checkpoint=True)


def test_strict_stops_at_a_damaged_one(run: Path) -> None:
    cut("optimizer.pt")(run / "checkpoint-4")
    trainer = build(run)
    trainer.run_facts.strict = True
    with pytest.raises(ValueError, match=r"checkpoint-4 is incomplete or damaged: optimizer\.pt"):
        trainer.train(resume_from_checkpoint=True)


def test_an_untouched_checkpoint_is_gone_on_from_without_a_word(
    run: Path, whole: tuple[Path, list[torch.Tensor]], said: Any
) -> None:
    trainer = build(run)
    trainer.run_facts.strict = True
    trainer.train(resume_from_checkpoint=True)
    assert same(parameters(trainer), whole[1])
    assert "damaged" not in said.text and "different" not in said.text and "not complete" not in said.text


def test_a_checkpoint_of_weights_alone_is_said_before_training(tmp_path: Path, said: Any) -> None:
    build(tmp_path, save_only_model=True, max_steps=4).train()
    assert "it lacks optimizer.pt, scheduler.pt, rng_state.pth" in said_before_training(build(tmp_path), said)
    trainer = build(tmp_path)
    trainer.run_facts.strict = True
    with pytest.raises(ValueError, match=r"lacks optimizer\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpoints_of_an_older_version_are_gone_on_from(
    run: Path, whole: tuple[Path, list[torch.Tensor]], said: Any
) -> None:
    lost("run_facts.json")(run / "checkpoint-4")
    trainer = build(run)
    trainer.train(resume_from_checkpoint=True)
    assert same(parameters(trainer), whole[1]) and "different" not in said.text


def test_a_checkpoint_without_digests_is_taken_as_ever(run: Path) -> None:
    flipped("model.safetensors")(run / "checkpoint-4")
    assert not examine(run / "checkpoint-4").sound
    without_digests(run / "checkpoint-4")
    assert examine(run / "checkpoint-4").sound


def test_a_part_that_has_no_digest_is_not_compared(run: Path) -> None:
    """An engine or a callback may write a part that the facts do not know."""
    facts = run / "checkpoint-4" / "run_facts.json"
    known = json.loads(facts.read_text(encoding="utf-8"))
    del known["digests"]["scheduler.pt"]
    facts.write_text(json.dumps(known), encoding="utf-8")
    assert examine(run / "checkpoint-4").sound


def test_what_was_exchanged_on_purpose_is_taken_without_the_facts(run: Path) -> None:
    exchanged("model.safetensors")(run / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4.*model\.safetensors is another.*delete run_facts\.json"):
        build(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    lost("run_facts.json")(run / "checkpoint-4")
    trainer = build(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert trainer.state.global_step == 6


class SavesAgain(TrainerCallback):
    """Callbacks for adapters used to save the model into the checkpoint once more."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt", "again": "yes"})


def test_what_a_callback_writes_into_a_checkpoint_is_part_of_it(tmp_path: Path) -> None:
    trainer = build(tmp_path, "llama", max_steps=2)
    trainer.add_callback(SavesAgain())
    trainer.train()
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert file.metadata()["again"] == "yes"
    assert examine(tmp_path / "checkpoint-2").sound


def test_weights_alone_and_adapters_have_digests(tmp_path: Path) -> None:
    for model, name in (("gpt2", "model.safetensors"), ("llama_lora", "adapter_model.safetensors")):
        build(tmp_path / model, model, max_steps=2, save_only_model=model == "gpt2").train()
        assert examine(tmp_path / model / "checkpoint-2").damaged == ()
        flipped(name)(tmp_path / model / "checkpoint-2")
        assert f"{name} is another than was saved" in examine(tmp_path / model / "checkpoint-2").describe()


def test_shards_are_looked_at(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    trainer.model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    build(tmp_path).train(resume_from_checkpoint=str(folder))
    for damage in (cut(shards[-1].name), lost(shards[-1].name)):
        damage(folder)
        with pytest.raises(ValueError, match=shards[-1].name):
            build(tmp_path).train(resume_from_checkpoint=str(folder))


def test_adapters_are_looked_at(tmp_path: Path) -> None:
    build(tmp_path, "llama_lora", max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    build(tmp_path, "llama_lora", max_steps=4).train(resume_from_checkpoint=str(folder))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        broken = shutil.copytree(folder, tmp_path / name / "checkpoint-2")
        cut(name)(broken)
        with pytest.raises(ValueError, match=name):
            build(tmp_path, "llama_lora").train(resume_from_checkpoint=str(broken))


def test_random_states_of_all_processes_are_looked_at(run: Path, said: Any) -> None:
    folder = run / "checkpoint-4"
    for rank in range(2):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    lost("rng_state.pth")(folder)
    facts = json.loads((folder / "run_facts.json").read_text())
    facts["facts"]["processes"] = 2
    (folder / "run_facts.json").write_text(json.dumps(facts))
    build(run).train(resume_from_checkpoint=str(folder))
    assert "processes was 2 and is 1" in said.text
    lost("rng_state_1.pth")(folder)
    trainer = build(run)
    trainer.run_facts.strict = True
    with pytest.raises(ValueError, match=r"lacks rng_state_1\.pth"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_kill_while_an_old_checkpoint_is_written_over_leaves_no_mixture(run: Path) -> None:
    """An older run in the same folder has left a whole checkpoint of the same step."""

    class Killed(BaseException):
        pass

    class KillsWhileSaving(DPSMTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            raise Killed

    trainer = build(run, seed=7)
    trainer.__class__ = KillsWhileSaving
    with pytest.raises(Killed):
        trainer.train()
    assert not (run / "checkpoint-2" / "trainer_state.json").exists()  # new weights, old optimizer


# ---- another run's checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01 and is 0.001 (the checkpoint's stays in force)"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was linear and is cosine"),
        ({"alpha_schedule": "cosine"}, "alpha_schedule was linear and is cosine"),
        ({"alpha_end": 0.5}, "alpha_end was 1.0 and is 0.5"),
        ({"scoring_rule": "brier"}, "scoring_rule was dpsm and is brier"),
        ({"max_steps": 8}, "max_steps was 6 and is 8"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2 and is 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"rows": 14}, "train_data was 16 rows"),
    ],
)
def test_what_has_changed_is_said_before_training(changes: dict[str, Any], words: str, run: Path, said: Any) -> None:
    assert words in said_before_training(build(run, **changes), said)
    strict = build(run, **changes)
    strict.run_facts.strict = True
    with pytest.raises(ValueError, match="different from this one"):
        strict.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_another_text_of_the_same_length_is_noticed(run: Path, said: Any) -> None:
    trainer = build(run)
    trainer.train_dataset = make_data("gpt2", rows=16, seed=1)
    trainer.train(resume_from_checkpoint=True)
    assert "train_data was 16 rows, sha256" in said.text


def test_what_changes_no_weight_is_not_said(run: Path, said: Any) -> None:
    build(run, fused_head="on", logging_steps=2, calibration_bins=10).train(resume_from_checkpoint=True)
    assert "different from this one" not in said.text


def test_looking_at_the_data_draws_no_random_number(tmp_path: Path) -> None:
    class Drawing(torch.utils.data.Dataset):
        rows = make_data("gpt2")

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> dict[str, Any]:
            raise AssertionError("its own code may draw random numbers")

    trainer = build(tmp_path)
    assert RunFacts().of(trainer, trainer.dpsm)["train_data"].startswith("16 rows")
    trainer.train_dataset = Drawing()
    assert RunFacts().of(trainer, trainer.dpsm)["train_data"] == "16 rows"


@pytest.mark.parametrize("noted", [True, False])
def test_another_optimizer_is_refused(noted: bool, run: Path) -> None:
    if not noted:
        lost("run_facts.json")(run / "checkpoint-4")
    with pytest.raises(ValueError, match=r"of another optimizer.*SGD"):
        build(run, optim="sgd").train(resume_from_checkpoint=True)


def test_another_kind_of_schedule_is_refused(run: Path) -> None:
    changed = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match="of another scheduler: it was .*LambdaLR and is .*ReduceLROnPlateau"):
        build(run, **changed).train(resume_from_checkpoint=True)


def test_another_model_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="of another model: it was GPT2LMHeadModel with .* and is Llama"):
        build(run, "llama").train(resume_from_checkpoint=True)


# ---- streams -------------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def stream(rows: int = 10) -> IterableDataset:
    data = make_data("gpt2", rows)

    def generate() -> Iterator[dict[str, Any]]:
        yield from data

    return IterableDataset.from_generator(generate)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_is_gone_on_with_in_the_right_pass(shuffled: bool, accumulation: int, tmp_path: Path) -> None:
    """Five micro-batches a pass: with accumulation of 2 the fifth waits for the first of the next pass."""

    def train(stop: int | None = None, resume: str | None = None) -> list[torch.Tensor]:
        args = DPSMConfig(output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=2, use_cpu=True,
                          disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
                          gradient_accumulation_steps=accumulation)  # fmt: skip
        data = stream().shuffle(seed=5, buffer_size=4) if shuffled else stream()
        trainer = DPSMTrainer(model=make_model("gpt2", 0.1), args=args, train_dataset=data,
                              callbacks=[] if stop is None else [StopAt(stop)])  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer)

    straight = train()
    for stop in (2, 5, 7, 10, 11):
        train(stop=stop)
        assert same(train(resume=str(tmp_path / f"checkpoint-{stop}")), straight), stop


# ---- gradients and weights that are not finite ---------------------------------------------------------------------


class BadGradient(nn.Module):
    """Leave what passes as it is; on the n-th backward pass its gradient gets a value of choice."""

    def __init__(self, inner: nn.Module, call: int, value: float) -> None:
        super().__init__()
        self.inner, self.call, self.value, self.calls = inner, call, value, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(hidden)
        if hidden.requires_grad:
            hidden.register_hook(self.changed)
        return hidden

    def changed(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls != self.call:
            return gradient
        gradient = gradient.clone()
        gradient[0, 1, 2] = self.value
        return gradient


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(
    value: float, accumulation: int, max_grad_norm: float, tmp_path: Path
) -> None:
    trainer = build(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=max_grad_norm, save_steps=1)
    trainer.model.transformer.ln_f = BadGradient(trainer.model.transformer.ln_f, 2 * accumulation + 1, value)
    with pytest.raises(FloatingPointError, match=r"gradient is (nan|inf) at optimizer step 3.*checkpoint is sound"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_gradient_scaler_leaves_such_a_step_out_and_goes_on(tmp_path: Path) -> None:
    """With fp16 an infinite gradient is how the scaler finds its scale."""
    trainer = build(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.model.transformer.ln_f = BadGradient(trainer.model.transformer.ln_f, 3, float("inf"))
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.accelerator.scaler.get_scale() < 2**16
    lost("scaler.pt")(tmp_path / "checkpoint-6")
    assert examine(tmp_path / "checkpoint-4").sound and examine(tmp_path / "checkpoint-6").missing == ("scaler.pt",)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_without_waiting_for_the_device_nothing_of_it_is_saved(tmp_path: Path) -> None:
    trainer = build(tmp_path, logging_nan_inf_filter=False, logging_steps=50, save_steps=1)
    trainer.model.transformer.ln_f = BadGradient(trainer.model.transformer.ln_f, 3, float("nan"))
    with pytest.raises(FloatingPointError, match="not saved: the last checkpoint is sound") as error:
        trainer.train()
    assert "Nothing was updated" not in str(error.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                kwargs["model"].transformer.wpe.weight.data[3, 1] = float("inf")

    trainer = build(tmp_path)
    trainer.add_callback(Overflow())
    with pytest.raises(
        FloatingPointError, match=r"transformer\.wpe\.weight is NaN or infinite after optimizer step 4"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


# ---- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_what_cannot_be_written_leaves_the_checkpoint_before(failing: str, tmp_path: Path, monkeypatch: Any) -> None:
    trainer = build(tmp_path, save_total_limit=1)
    original = getattr(Trainer, failing)

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, failing, full)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written: .*No space left.*checkpoint-2 is whole"):
        trainer.train()
    monkeypatch.undo()
    again = build(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_an_error_that_is_not_of_writing_stays_what_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "_save_rng_state", broken)
    with pytest.raises(RuntimeError, match="^something else$"):
        build(tmp_path).train()


def test_the_hubs_token_is_in_no_file(tmp_path: Path) -> None:
    secret = "hf_" + "aBcDeFgHiJ" * 3
    trainer = build(tmp_path, hub_token=secret, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == secret
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_the_facts_hold_names_and_digests_alone(run: Path) -> None:
    facts = json.loads((run / "checkpoint-4" / "run_facts.json").read_text())
    assert facts["schema"] == 1 and facts["facts"]["processes"] == 1
    assert os.sep not in facts["facts"]["train_data"]
