"""What a model's own loss is made of: its alignment and what it adds, in every way that Transformers' models have."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import CPTConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss

from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.models.language_model import inputs_without_labels, label_alignment
from dpsm_hf.models.own_loss import OwnLoss, own_loss, replacement_of
from tests import cases
from tests.tiny import make_model

V = 64
SMALL: dict[str, Any] = dict(
    vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BART: dict[str, Any] = dict(
    vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=2, is_encoder_decoder=True,
)  # fmt: skip


def sharpened(model: Any) -> Any:
    """Random weights say nothing of an alignment: make the logits loud."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


def ids(rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(6, V - 4, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(**more: Any) -> dict[str, Any]:
    tokens = ids()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone(), **more}


def mixtral(**more: Any) -> Any:
    options = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=1.0)
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**SMALL, **options, **more}))


def dbrx() -> Any:
    experts = dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, moe_loss_weight=1.0, hidden_size=32)
    return hf.DbrxForCausalLM(
        hf.DbrxConfig(
            d_model=32, n_heads=2, n_layers=2, max_seq_len=64, vocab_size=V, output_router_logits=True,
            tie_word_embeddings=False, attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
            ffn_config=experts,
        )
    )  # fmt: skip


def qwen3_vl() -> Any:
    text = dict(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1,
                head_dim=16, output_router_logits=True, router_aux_loss_coef=1.0,
                rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4))  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32,
                  deepstack_visual_indexes=[0], patch_size=4)  # fmt: skip
    return hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def switch() -> Any:
    return hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(
            vocab_size=V, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0, router_jitter_noise=0.0,
            output_router_logits=True, router_z_loss_coef=0.5, router_aux_loss_coef=0.5, decoder_start_token_id=0,
            expert_capacity=64,
        )
    )  # fmt: skip


def voxtral() -> Any:
    audio = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_mel_bins=8,
                 max_source_positions=10)  # fmt: skip
    text = dict(model_type="llama", **SMALL, head_dim=16)
    return hf.VoxtralForConditionalGeneration(hf.VoxtralConfig(audio_config=audio, text_config=text))


def florence() -> Any:
    vision = dict(depths=(1, 1, 1, 1), embed_dim=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), num_groups=(1, 1, 1, 1),
                  projection_dim=32)  # fmt: skip
    text = dict(model_type="bart", **BART)
    config = hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=5, is_encoder_decoder=True)
    return hf.Florence2ForConditionalGeneration(config)


def blenderbot() -> Any:
    return hf.BlenderbotSmallForConditionalGeneration(hf.BlenderbotSmallConfig(**BART))


def make(kind: Callable[[], Any]) -> Any:
    set_seed(0)
    return kind()


def trainer(model: Any, **arguments: Any) -> Any:
    args = DPSMConfig(
        **{
            "output_dir": cases.FOLDER.name,
            "use_cpu": True,
            "disable_tqdm": True,
            "max_steps": 1,
            "scoring_rule": "ce",
            **arguments,
        }
    )
    return DPSMTrainer(model=model, args=args)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


MODELS: dict[str, tuple[Callable[[], Any], OwnLoss]] = {
    "mixtral": (mixtral, OwnLoss("shifted", replaceable=True)),
    "dbrx": (dbrx, OwnLoss("shifted", replaceable=True)),
    "qwen3 vl": (qwen3_vl, OwnLoss("shifted", replaceable=True)),
    "voxtral": (voxtral, OwnLoss("shifted", replaceable=True)),
    "florence": (florence, OwnLoss("aligned", replaceable=True)),
    "switch": (switch, OwnLoss("aligned", adds=True)),
    "blenderbot": (blenderbot, OwnLoss("aligned")),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_own_loss_is_made_of(name: str) -> None:
    kind, expected = MODELS[name]
    model = sharpened(make(kind)).train()
    assert label_alignment(model) == expected.alignment  # of its class and configuration, before it is asked
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert own_loss(model, batch()) == expected
    assert label_alignment(model) == expected.alignment
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_the_models_own(name: str, fused: str) -> None:
    model = sharpened(make(MODELS[name][0])).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    own = model(**batch()).loss
    own.backward()
    theirs = gradients(model)
    for _ in range(2):  # the first batch is the one at which the head is checked
        model.zero_grad()
        loss = trainer(model, fused_head=fused).compute_loss(model, batch())
        loss.backward()
        assert float(loss) == pytest.approx(float(own), rel=2e-6)
        mine = gradients(model)
        assert mine.keys() == theirs.keys()
        largest = max(float(gradient.norm()) for gradient in theirs.values())
        for key, gradient in theirs.items():
            limit = 2e-5 * max(float(gradient.norm()), 1e-2 * largest)
            assert float((mine[key] - gradient).norm()) <= limit, key


def test_evaluation_scores_what_the_model_scores() -> None:
    model = sharpened(make(voxtral))
    rows = [{key: value[i] for key, value in batch().items()} for i in range(4)]
    evaluated = DPSMTrainer(
        model=model,
        args=DPSMConfig(
            output_dir=cases.FOLDER.name, use_cpu=True, disable_tqdm=True, report_to="none", calibration_metrics="all"
        ),
        eval_dataset=rows,
    ).evaluate()
    assert evaluated["eval_nll"] == pytest.approx(float(model(**batch()).loss), rel=1e-5)
    assert evaluated["eval_tokens"] == 4 * 11


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_router_losses_of_micro_batches_are_one_mean(fused: str) -> None:
    """Weighted by their tokens: at four micro-batches as much in all as at one, where Trainer adds four times that."""
    model, whole = make(mixtral).train(), batch()
    whole["labels"][0, :8] = -100
    made, count = trainer(model, fused_head=fused), int((whole["labels"][:, 1:] != -100).sum())
    parts = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(4)]
    total = sum(float(made.compute_loss(model, part, num_items_in_batch=torch.tensor(count))) for part in parts)
    expected = 0.0
    for part in parts:
        tokens = int((part["labels"][:, 1:] != -100).sum())
        expected += float(model(**part).loss) * tokens / count
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize(
    "flag", [{"output_router_logits": False}, {"return_dict": False}, {"output_attentions": True}]
)
def test_flags_in_a_batch(flag: dict[str, Any], fused: str) -> None:
    model = make(mixtral).train()
    output = model(**batch(**flag))
    own = output[0] if isinstance(output, tuple) else output.loss
    loss = trainer(model, fused_head=fused).compute_loss(model, batch(**flag))
    assert float(loss) == pytest.approx(float(own), rel=2e-6)


def test_outputs_hold_the_loss_in_the_place_of_the_models_own() -> None:
    for model in (make_model("llama"), mixtral(), make_model("bart")):
        for flags in ({}, {"return_dict": False}):
            model.train()
            theirs = Trainer(model=model, args=TrainingArguments(output_dir=cases.FOLDER.name, use_cpu=True))
            tokens = torch.randint(3, 30, (2, 8))
            inputs = {"input_ids": tokens, "labels": tokens, **flags}
            loss, outputs = trainer(model).compute_loss(model, dict(inputs), return_outputs=True)
            expected = theirs.compute_loss(model, dict(inputs), return_outputs=True)[1]
            if flags:
                assert outputs[0] is loss and len(outputs) == len(expected)
                assert outputs[1].shape == expected[1].shape
            else:
                assert outputs.loss is loss and outputs[0] is loss and list(outputs) == list(expected)


class Bare(nn.Module):
    """Returns the bare logits, and with labels a tuple, as models of Transformers' own tests do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def test_a_bare_tensor_is_the_logits_of_every_sample() -> None:
    set_seed(0)
    model = Bare().train()
    inputs = {"input_ids": ids(), "labels": ids()}
    made = trainer(model, scoring_rule="dpsm", alpha_schedule="constant", alpha_end=0.0)
    loss, outputs = made.compute_loss(model, dict(inputs), return_outputs=True)
    own, logits = model(**inputs)
    assert float(loss) == pytest.approx(float(own), rel=1e-6)
    assert outputs[0] is loss and torch.equal(outputs[1], logits)


def test_labels_shorter_than_the_logits_are_refused() -> None:
    model = make_model("gpt2")
    for fused in ("auto", "off"):
        for length in (3, 5):
            short = {"input_ids": ids(1, 6), "labels": ids(1, 6)[:, :length]}
            with pytest.raises(ValueError, match=f"GPT2LMHeadModel returned logits for 6 .* labels have {length}:"):
                trainer(model, fused_head=fused).compute_loss(model, short)
        # also after a sound batch
        made = trainer(model, fused_head=fused)
        made.compute_loss(model, {"input_ids": ids(1, 6), "labels": ids(1, 6)})
        with pytest.raises(ValueError, match="labels have 5:"):
            made.compute_loss(model, {"input_ids": ids(1, 6), "labels": ids(1, 6)[:, :5]})


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_virtual_tokens_of_prompt_tuning_need_no_labels(fused: str) -> None:
    model = get_peft_model(make_model("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tokens = torch.randint(3, 30, (2, 8))
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    loss = trainer(model, fused_head=fused).compute_loss(model, dict(inputs))
    assert float(loss) == pytest.approx(float(model(**inputs).loss), rel=1e-5)
    with pytest.raises(ValueError, match=r"labels have 6 after 3 virtual tokens"):
        trainer(model, fused_head=fused).compute_loss(model, {**inputs, "labels": tokens[:, 2:]})


class Empty(Bare):
    """Leaves its logits out in training, as a forward that is replaced to save memory does."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        loss, logits = super().forward(input_ids, input_ids if labels is None else labels)
        if self.training:
            logits = torch.zeros(0)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


def test_empty_logits_are_refused_with_a_remedy() -> None:
    model = Empty().train()
    with pytest.raises(ValueError, match=r"Empty returned logits of shape \(0,\).*UNSLOTH_RETURN_LOGITS=1"):
        trainer(model, scoring_rule="brier").compute_loss(model, {"input_ids": ids(), "labels": ids()})


def test_a_known_class_with_another_loss_is_refused() -> None:
    """The table knows the class and not what was done to it."""
    model = make(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)))
    model.loss_function = lambda logits, labels, vocab_size, **_: (
        3 * F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))
    )
    own = float(model.eval()(**batch()).loss)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM computes another loss .*transformers\.Trainer") as caught:
        trainer(model).compute_loss(model, batch())
    assert str(own)[:6] in str(caught.value) and str(own / 3)[:6] in str(caught.value)


class InOneKernel(hf.LlamaForCausalLM):
    """Given labels in training, computes its loss from its hidden states alone, as Liger's forward does."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        if labels is None or not self.training:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = F.linear(hidden, self.lm_head.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return hf.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=None)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_forward_that_takes_another_way_in_training_is_not_given_labels(fused: str) -> None:
    model = make(lambda: InOneKernel(hf.LlamaConfig(**SMALL))).train()
    made = trainer(model, scoring_rule="dpsm", alpha_schedule="constant", alpha_end=0.0, fused_head=fused)
    for _ in range(2):
        loss = made.compute_loss(model, batch())
        assert float(loss) == pytest.approx(float(model(**batch()).loss), rel=1e-5)
        assert not made._scorer.fell_back


class AddsOfLogits(hf.LlamaForCausalLM):
    """Adds to its loss what it makes of its logits, in training alone."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None and self.training:
            output.loss = output.loss + 0.5 * output.logits.logsumexp(-1).square().mean()
        return output


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_what_is_made_of_logits_is_not_lost_in_the_head(fused: str) -> None:
    model = make(lambda: AddsOfLogits(hf.LlamaConfig(**SMALL))).train()
    loss = trainer(
        model, scoring_rule="dpsm", alpha_schedule="constant", alpha_end=0.0, fused_head=fused
    ).compute_loss(model, batch())
    assert float(loss) == pytest.approx(float(model(**batch()).loss), rel=1e-5)


def test_somebody_elses_call_keeps_the_models_own_loss() -> None:
    import threading

    model, losses = make_model("llama"), []
    inputs = {"input_ids": ids() % 30, "labels": ids() % 30}
    expected = float(model(**inputs).loss)
    with replacement_of(model).active(model):
        assert float(model(**inputs).loss) == 0.0
        thread = threading.Thread(target=lambda: losses.append(float(model(**inputs).loss)))
        thread.start()
        thread.join()
    assert losses == [expected] and float(model(**inputs).loss) == expected


def test_a_loss_function_of_the_user_is_put_back() -> None:
    model = make_model("llama")
    own = model.loss_function = lambda **_: torch.tensor(1.0)
    with replacement_of(model).active(model):
        assert model.loss_function is not own
    assert model.loss_function is own


class LossAsMethod(hf.LlamaForCausalLM):
    """Has a method where Transformers' models have a property, and adds to its loss."""

    router = 0.25

    def loss_function(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + self.router
        return output


class LossAsReadOnlyProperty(LossAsMethod):
    router = 0.0  # without a replacement a constant cannot be told from the tokens' loss in evaluation mode

    @property
    def loss_function(self) -> Any:  # type: ignore[override]
        return ForCausalLMLoss


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("kind", [LossAsMethod, LossAsReadOnlyProperty])
def test_a_class_with_a_loss_function_of_its_own(kind: Any, fused: str) -> None:
    model = make(lambda: kind(hf.LlamaConfig(**SMALL))).train()
    before = dict(vars(model))
    loss = trainer(model, scoring_rule="ce", fused_head=fused).compute_loss(model, batch())
    assert float(loss) == pytest.approx(float(model(**batch()).loss), rel=1e-5)
    assert vars(model).keys() == before.keys(), "nothing of the replacement is left on the model"
    alive = weakref.ref(model)
    del model, loss
    gc.collect()
    assert alive() is None, "what is remembered of a class holds no model of it"


def test_a_loss_with_weights_of_peft_is_refused_with_what_fits() -> None:
    config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4])
    model = get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match=r"CPT\) weighs tokens.*Take PromptTuningConfig or LoraConfig"):
        own_loss(model, {"input_ids": ids() % 30, "labels": ids() % 30})


@pytest.mark.parametrize("kind", [florence, blenderbot])
def test_decoder_inputs_of_models_without_a_method_for_them(kind: Callable[[], Any]) -> None:
    model = sharpened(make(kind))
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    labels = ids()
    labels[1, 7:] = -100
    made = inputs_without_labels(model, batch(labels=labels))["decoder_input_ids"]
    assert (made[:, 0] == 2).all() and torch.equal(made[0, 1:], labels[0, :-1]) and (made[1, 8:] == 0).all()
    own, given = model(**batch(labels=labels)), model(**batch(labels=labels, decoder_input_ids=made))
    assert float(own.loss) == pytest.approx(float(given.loss), rel=1e-6)


def test_a_decoder_without_a_start_token_names_what_is_missing() -> None:
    model = make(blenderbot)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"decoder_start_token_id or pad_token_id. Set both in model.config"):
        inputs_without_labels(model, batch())


def test_a_batch_of_ignored_labels_says_nothing() -> None:
    model = make_model("llama")
    model.config.rms_norm_eps = 3e-6  # not asked yet
    nothing = {"input_ids": ids() % 30, "labels": torch.full((4, 12), -100)}
    assert own_loss(model, nothing) is None
    something = {"input_ids": ids() % 30, "labels": ids() % 30}
    assert own_loss(model, something) == OwnLoss("shifted", replaceable=True)


def test_a_model_is_asked_once_for_its_class_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = hf.LlamaForCausalLM.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", counted)
    inputs = {"input_ids": ids() % 30, "labels": ids() % 30}
    own_loss(make_model("llama"), inputs)
    asked = len(calls)
    own_loss(make_model("llama"), inputs)
    assert 0 < asked == len(calls)
    other = make_model("llama")
    other.config.hidden_act = "gelu"
    own_loss(other, inputs)
    assert len(calls) == 2 * asked


def test_a_long_batch_is_asked_with_a_part_of_it() -> None:
    seen: list[tuple[int, ...]] = []
    model = make_model("llama")
    model.config.rms_norm_eps = 2e-6  # not asked yet
    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    tokens = torch.randint(3, 30, (8, 512))
    labels = tokens.clone()
    labels[:7, 20:] = -100
    assert own_loss(model, {"input_ids": tokens, "labels": labels}) is not None
    assert set(seen) == {(1, 128)}


def test_codes_of_answers() -> None:
    for code in range(1, 17):
        assert OwnLoss.decoded(code).code() == code


def test_processes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpsm_hf.models import own_loss as module

    others = SimpleNamespace(code=0)

    def summed(mine: Tensor) -> Tensor:
        total = mine.clone()
        total[others.code] += 1
        return total

    monkeypatch.setattr(module, "process_number", lambda: 2)
    monkeypatch.setattr(module, "sum_over_processes", summed)
    inputs = {"input_ids": ids() % 30, "labels": ids() % 30}
    nothing = {**inputs, "labels": torch.full((4, 12), -100)}
    mine = OwnLoss("shifted", replaceable=True)
    assert module._measure_on_all_processes(make_model("llama"), inputs) == mine
    others.code = mine.code()
    assert module._measure_on_all_processes(make_model("llama"), nothing) == mine
    others.code = OwnLoss("aligned").code()
    with pytest.raises(ValueError, match="processes find different losses in LlamaForCausalLM"):
        module._measure_on_all_processes(make_model("llama"), inputs)
    others.code = 17
    with pytest.raises(ValueError, match="could not be determined on another process"):
        module._measure_on_all_processes(make_model("llama"), inputs)
