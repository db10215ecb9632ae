"""Every kind of model scored inside its head and from its logits: loss, statistics of each token, every gradient."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_outputs import CausalLMOutputWithPast

from dpsm_hf import DPSMSeq2SeqTrainer, DPSMTrainer
from dpsm_hf.head.model_head import FusedHead, ScoringRequest
from dpsm_hf.models.language_model import align_targets, inputs_without_labels
from dpsm_hf.rules.losses import score_tokens
from dpsm_hf.rules.scoring_rules import Objective
from tests import cases

V, D = 97, 32
SPECIAL: dict[str, Any] = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
DECODER: dict[str, Any] = dict(
    vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.0, **SPECIAL,
)  # fmt: skip
BART: dict[str, Any] = dict(
    vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
    activation_dropout=0.0, forced_eos_token_id=None, decoder_start_token_id=2, **SPECIAL,
)  # fmt: skip
T5: dict[str, Any] = dict(
    vocab_size=V, d_model=D, d_kv=16, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=1,
    eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
             attn_pdrop=0.0, bos_token_id=0, eos_token_id=2),
    ),
    "llama": ("LlamaConfig", DECODER),
    "qwen2": ("Qwen2Config", DECODER),
    "qwen2 tied": ("Qwen2Config", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**DECODER, "head_dim": 16}),
    "mistral": ("MistralConfig", DECODER),
    "gemma2": ("Gemma2Config", {**DECODER, "head_dim": 16, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3TextConfig", {**DECODER, "head_dim": 16, "final_logit_softcapping": 4.0}),
    "vault gemma": ("VaultGemmaConfig", {**DECODER, "head_dim": 16, "final_logit_softcapping": 4.0}),
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        dict(vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
             lru_width=D, logits_soft_cap=4.0, attention_window_size=16, **SPECIAL),
    ),
    "minicpm3": (
        "MiniCPM3Config",
        {**DECODER, "dim_model_base": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 16},
    ),
    "granite": ("GraniteConfig", {**DECODER, "logits_scaling": 3.0}),
    "hyperclovax": ("HyperCLOVAXConfig", {**DECODER, "logits_scaling": 3.0}),
    "cohere": ("CohereConfig", {**DECODER, "logit_scale": 0.25}),
    "falcon h1": (
        "FalconH1Config",
        {**DECODER, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
         "mamba_chunk_size": 8, "lm_head_multiplier": 0.4},
    ),
    "phi": ("PhiConfig", DECODER),
    "opt": ("OPTConfig", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": D, "dropout": 0.0}),
    "neox": ("GPTNeoXConfig", {**DECODER, "hidden_dropout": 0.0}),
}  # fmt: skip
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartConfig", BART),
    "mbart": ("MBartConfig", BART),
    "pegasus": ("PegasusConfig", BART),
    "t5": ("T5Config", T5),
    "t5 untied": ("T5Config", {**T5, "tie_word_embeddings": False}),
}


def build(name: str) -> PreTrainedModel:
    """Return a model whose head makes logits of some size, with whatever it does to them switched on."""
    set_seed(3)
    config, options = {**CAUSAL, **SEQ2SEQ}[name]
    auto = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
    return loud(auto.from_config(getattr(hf, config)(**options)))


def loud(model: Any) -> Any:
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(0.0, 0.5)
        if head.bias is not None:
            head.bias.normal_()
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (3, 12), generator=g)
    labels = torch.randint(3, V, (3, 12), generator=g)
    labels[0, 8:] = -100
    labels[2, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make_trainer(model: nn.Module, **arguments: Any) -> Any:
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    config = cases.DPSMSeq2SeqConfig if seq2seq else cases.DPSMConfig
    defaults: dict[str, Any] = dict(
        output_dir=cases.FOLDER.name, use_cpu=True, disable_tqdm=True, save_strategy="no", chunk_tokens=7,
        alpha_schedule="constant", alpha_end=0.4, max_steps=1,
    )  # fmt: skip
    args = config(**{**defaults, **arguments})
    return (DPSMSeq2SeqTrainer if seq2seq else DPSMTrainer)(model=model, args=args)


def step(trainer: Any, batch: dict[str, Tensor], count: int | None = 30) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and every gradient of one training batch."""
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_equal(mine: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=0.0)
    assert mine[1].keys() == theirs[1].keys()
    largest = max(float(g.norm()) for g in theirs[1].values())
    for name, gradient in theirs[1].items():
        # float32 sums: what cancels in one parameter (a key's bias) is the noise of all
        limit = 1e-5 * max(float(gradient.norm()), 1e-3 * largest)
        assert float((mine[1][name] - gradient).norm()) <= limit, name


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_loss_and_gradients(name: str) -> None:
    model = build(name)
    fused, full = make_trainer(model, fused_head="on"), make_trainer(model, fused_head="off")
    for seed in range(2):  # the first batch is the one that is checked
        batch = make_batch(seed)
        mine, theirs = step(fused, batch), step(full, batch)
        assert_equal(mine, theirs)
        assert all(float(g.norm()) > 0 for n, g in theirs[1].items() if "lm_head" in n)
    assert fused._scorer.head.checked


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_statistics_of_every_token(name: str) -> None:
    model = build(name)
    model.eval()
    head = FusedHead(model)
    for seed in range(2):
        batch = make_batch(seed)
        inputs, labels = inputs_without_labels(model, batch), batch["labels"]
        alignment: Any = "aligned" if name in SEQ2SEQ else "shifted"
        request = ScoringRequest(labels, alignment, Objective("brier"), 30, entropy=True, chunk_tokens=7)
        with torch.no_grad():
            found = head(model, inputs, request)
            logits = model(**inputs).logits
        targets = align_targets(labels, logits.shape[-2], alignment)
        expected = score_tokens(logits.float(), targets, Objective("brier"))
        assert expected.loss is not None
        torch.testing.assert_close(found.loss, expected.loss.sum() / 30, rtol=1e-6, atol=0.0)
        assert torch.equal(found.targets, targets) and torch.equal(found.scored, expected.scored)
        assert logits.std() > 0.2  # of nearly uniform rows every post-op would look right
        for key in ("nll", "brier", "spherical", "confidence", "correct", "entropy"):
            torch.testing.assert_close(getattr(found, key), getattr(expected, key), rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma2", "final_logit_softcapping", 5.0),
        ("granite", "logits_scaling", 2.0),
        ("cohere", "logit_scale", 0.5),
        ("falcon h1", "lm_head_multiplier", 0.5),
        ("bart", "final_logits_bias", 1.0),
        ("phi", "bias", 1.0),
    ],
)
def test_what_follows_the_head_does_something_here(name: str, field: str, value: float) -> None:
    """The matrix would not notice a wrong post-op if it hardly changed the numbers."""
    losses = []
    for changed in (False, True):
        model: Any = build(name)
        if changed and field in ("bias", "final_logits_bias"):
            owner = model.get_output_embeddings() if field == "bias" else model
            with torch.no_grad():
                getattr(owner, field).flatten()[::2].add_(value)
        elif changed:
            setattr(model.config, field, value)
            for owner in (model, model.base_model):  # some keep a copy
                if hasattr(owner, field):
                    setattr(owner, field, value)
        losses.append(step(make_trainer(model, fused_head="on"), make_batch())[0])
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


# ---- models that nobody has heard of -------------------------------------------------------------------------------


class OwnConfig(PreTrainedConfig):
    model_type = "own-of-the-tests"

    def __init__(self, vocab_size: int = V, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class Own(PreTrainedModel):
    """A language model of no table, whose forward goes on after its head as `after` says."""

    config_class = OwnConfig
    after: Callable[[Any, Tensor], Tensor] | None = None

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(V, D)
        self.mix = nn.GRU(D, D, batch_first=True)
        self.lm_head = nn.Linear(D, V)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **_: Any) -> Any:
        hidden, _state = self.mix(self.embed(input_ids))
        logits = self.logits(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Plain(nn.Module):
    """No PreTrainedModel at all: an `lm_head`, and a dict for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=V, to_json_string=lambda: "{}")
        self.embed, self.mix, self.lm_head = nn.Embedding(V, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, V)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Any = None) -> dict[str, Any]:
        logits = self.lm_head(self.mix(self.embed(input_ids))[0])
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


class Ramp(Own):
    def logits(self, hidden: Tensor) -> Tensor:
        z = super().logits(hidden)
        return z * 1.01 + 0.1 * torch.arange(z.shape[-1]) * (1 + torch.arange(z.shape[1])).view(-1, 1) / V


class Cube(Own):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden) ** 3


class NearlyOne(Own):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden) * 1.001


class Sliced(Own):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden)[..., : V - 1]


class Twice(Own):
    def logits(self, hidden: Tensor) -> Tensor:
        return (super().logits(hidden) + super().logits(hidden.flip(-1))) / 2


class Direct(Own):
    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.lm_head.weight, self.lm_head.bias)


class Flat(Own):
    """Calls its head with packed hidden states."""

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], V)


def own(kind: type[nn.Module]) -> Any:
    set_seed(3)
    model: Any = kind(OwnConfig()) if issubclass(kind, Own) else kind()
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.5)
    return model


class Warnings:
    """What the package's logger warned of."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __enter__(self) -> list[str]:
        self.handler = python_logging.Handler(python_logging.WARNING)
        self.handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        python_logging.getLogger("dpsm_hf.training.scorer").addHandler(self.handler)
        return self.messages

    def __exit__(self, *_: object) -> None:
        python_logging.getLogger("dpsm_hf.training.scorer").removeHandler(self.handler)


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize("kind", [Own, Plain])
def test_an_unknown_model_passes_the_check(kind: type[nn.Module], mode: str) -> None:
    model = own(kind)
    fused, full = make_trainer(model, fused_head=mode), make_trainer(model, fused_head="off")
    with Warnings() as warned:
        for seed in range(2):
            assert_equal(step(fused, make_batch(seed)), step(full, make_batch(seed)))
    assert not warned and fused._scorer.head.checked


STRANGE: dict[type[Own], str] = {
    Ramp: "does something to its logits that is not known here: they differ by up to",
    Cube: "does something to its logits that is not known here: they differ by up to",
    NearlyOne: "does something to its logits that is not known here: they differ by up to",
    Sliced: "turns the output of its head",
    Twice: "uses its output layer more than once",
    Direct: "makes its logits without calling its output layer",
    Flat: "hidden states of shape",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_model_falls_back_once_with_the_right_numbers(kind: type[Own]) -> None:
    model = own(kind)
    if kind is Sliced:  # its last token has no logit
        model.config.vocab_size = V - 1
    auto, full = make_trainer(model, fused_head="auto"), make_trainer(model, fused_head="off")
    with Warnings() as warned:
        for seed in range(3):
            batch = make_batch(seed)
            batch["labels"] = batch["labels"].clamp(max=V - 2)
            mine, theirs = step(auto, batch), step(full, batch)
            assert torch.equal(mine[0], theirs[0])
            assert all(torch.equal(mine[1][n], g) for n, g in theirs[1].items())
            assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert len(warned) == 1 and STRANGE[kind] in warned[0] and "fused_head='off'" in warned[0]


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_model_is_refused_with_on(kind: type[Own]) -> None:
    trainer, batch = make_trainer(own(kind), fused_head="on"), make_batch()
    batch["labels"] = batch["labels"].clamp(max=V - 2)
    with pytest.raises(ValueError, match=f"(?s)fused_head='on'.*{STRANGE[kind]}.*fused_head='auto'"):
        step(trainer, batch)


def test_a_model_without_an_output_layer_falls_back() -> None:
    class Headless(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.projection = self.lm_head
            del self.lm_head

        def forward(self, input_ids: Tensor, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
            logits = self.projection(self.mix(self.embed(input_ids))[0])
            loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return {"loss": loss, "logits": logits}

    model = Headless()
    with Warnings() as warned:
        mine = step(make_trainer(model), make_batch())
    assert len(warned) == 1 and "Headless has no output layer" in warned[0]
    assert_equal(mine, step(make_trainer(model, fused_head="off"), make_batch()))
