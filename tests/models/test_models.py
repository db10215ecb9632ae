"""Which label a row of logits is scored against, for known, wrapped and unknown models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpsm_hf.models.language_model import (
    _UNSHIFTED_CAUSAL_LMS,
    align_targets,
    core_model,
    inputs_without_labels,
    label_alignment,
    vocabulary_size,
)
from dpsm_hf.models.own_loss import own_loss
from tests.tiny import LENGTH, VOCAB, make_data, make_model


def tiny_bert(cls: type, **options: Any) -> nn.Module:
    return cls(
        BertConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
        )
    )  # fmt: skip


def tiny_mixtral(**options: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
            router_aux_loss_coef=0.05, **options,
        )
    )  # fmt: skip


class MyGPT2(GPT2LMHeadModel):
    """A user's subclass."""


class Custom(nn.Module):
    """A language model that no library knows, with the given alignment of its loss."""

    def __init__(self, rule: str, returns: str = "mapping", scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.returns = rule, returns
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            self.head.weight.mul_(scale)
            self.head.bias.mul_(scale)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.drop(self.embed(input_ids)))
        loss = None
        if labels is not None:
            shift = self.rule == "shifted"
            rows, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
            loss = F.cross_entropy(rows.reshape(-1, VOCAB), targets.reshape(-1))
            if self.rule == "odd":
                loss = loss * 3 + 1
        if self.returns == "tuple":
            return (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)


def alignment_of(model: nn.Module, inputs: dict[str, Any]) -> str:
    found = own_loss(model, inputs)
    assert found is not None
    return found.alignment


def batch(rows: int = 4, length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


# ---- known models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", "shifted"), ("llama", "shifted"), ("llama_lora", "shifted"), ("bart", "aligned"), ("t5", "aligned"),
     ("pegasus", "aligned")],
)  # fmt: skip
def test_known_models(name: str, expected: str) -> None:
    model = make_model(name)
    assert label_alignment(model) == expected
    assert vocabulary_size(model) == VOCAB


def test_more_known_models() -> None:
    assert label_alignment(tiny_bert(BertForMaskedLM)) == "aligned"
    assert label_alignment(tiny_bert(BertLMHeadModel, is_decoder=True)) == "shifted"
    assert label_alignment(tiny_mixtral()) == "shifted"
    assert label_alignment(MyGPT2(make_model("gpt2").config)) == "shifted"


def test_unknown_models() -> None:
    assert label_alignment(Custom("shifted")) is None
    assert label_alignment(nn.Linear(2, 2)) is None
    assert vocabulary_size(nn.Linear(2, 2)) is None


def model_and_batch(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "bert":
        return tiny_bert(BertForMaskedLM), batch()
    if name == "bart-decoder":
        config = BartConfig(vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2,
                            decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=1)  # fmt: skip
        return BartForCausalLM(config), batch()
    rows = make_data(name, 4)
    return make_model(name), {key: torch.tensor(rows[key]) for key in rows.column_names}


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_lora", "bart", "t5", "pegasus", "bert", "bart-decoder"])
def test_the_alignment_reproduces_the_models_own_loss(name: str) -> None:
    model, inputs = model_and_batch(name)
    alignment = label_alignment(model.eval())
    assert alignment is not None
    own = model(**inputs)
    logits = model(**inputs_without_labels(model, inputs)).logits
    targets = align_targets(inputs["labels"], logits.shape[-2], alignment)
    ours = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    assert ours.item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert alignment_of(model, inputs) == alignment


def test_every_causal_lm_that_says_it_does_not_shift_is_listed() -> None:
    """The list follows the installed Transformers: its documentation says which decoders do not shift."""
    found = set()
    names = {n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in ([v] if isinstance(v, str) else v)}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        classes = re.split(r"^class (?=\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        found |= {c.split("(")[0].split(":")[0] for c in classes if "labels are **not shifted**" in c} & names
    if not found:
        pytest.skip(f"Transformers {transformers.__version__} does not say which decoders do not shift")
    assert "BartForCausalLM" in found
    assert found <= _UNSHIFTED_CAUSAL_LMS
    assert names >= _UNSHIFTED_CAUSAL_LMS


# ---- wrappers ------------------------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """A wrapper like DataParallel and DDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models() -> None:
    model = make_model("gpt2")
    lora = get_peft_model(make_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    compiled = torch.compile(model)  # never run here
    data_parallel = [Parallel(model), nn.DataParallel(model), Parallel(compiled), torch.compile(Parallel(model))]
    peft = [lora, Parallel(lora), torch.compile(lora), Parallel(torch.compile(lora))]
    for wrapped in (compiled, *data_parallel, *peft):
        assert isinstance(core_model(wrapped), GPT2LMHeadModel), type(wrapped)
        assert label_alignment(wrapped) == "shifted" and vocabulary_size(wrapped) == VOCAB
    assert core_model(compiled) is model and core_model(Parallel(compiled)) is model


def test_vocabulary_is_that_of_the_head() -> None:
    model = make_model("gpt2")
    model.resize_token_embeddings(VOCAB + 7)
    assert vocabulary_size(model) == VOCAB + 7

    class Padded(nn.Module):
        config = type("Config", (), {"vocab_size": 12})()

    assert vocabulary_size(Padded()) == 12


# ---- probing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["mapping", "tuple"])
@pytest.mark.parametrize("rule", ["shifted", "aligned"])
def test_probe_finds_the_alignment(rule: str, returns: str) -> None:
    model = Custom(rule, returns).train()
    state = torch.get_rng_state()
    assert alignment_of(model, batch()) == rule
    assert model.training, "the probe left the model in evaluation mode"
    assert torch.equal(torch.get_rng_state(), state), "the probe drew random numbers"
    assert alignment_of(model.eval(), batch()) == rule and not model.training
    assert alignment_of(Parallel2(model), batch()) == rule


class Parallel2(Parallel):
    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("rule", ["shifted", "aligned"])
def test_probe_of_an_untrained_model(rule: str, scale: float) -> None:
    """Both alignments give a loss near log V, so the value alone does not distinguish them."""
    inputs = batch()
    inputs["labels"][:, :3] = -100
    assert alignment_of(Custom(rule, scale=scale), inputs) == rule


def test_probe_gives_up_with_a_reason() -> None:
    with pytest.raises(
        ValueError, match=r"Custom is not a language model that DPSM knows.*scoring_rule='ce'"
    ) as caught:
        alignment_of(Custom("odd"), batch())
    own = Custom("odd").eval()(**batch()).loss.item()
    assert f"{own:.4f}"[:5] in str(caught.value)

    class Classifier(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": torch.tensor(1.0), "logits": torch.zeros(len(input_ids), 2)}

    with pytest.raises(ValueError, match="Classifier is not a language model"):
        alignment_of(Classifier(), batch())

    class Silent(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"logits": torch.zeros(*input_ids.shape, VOCAB)}

    with pytest.raises(ValueError, match=r"own loss on the first batch \(None\)"):
        alignment_of(Silent(), batch())


# ---- targets -------------------------------------------------------------------------------------------------------


def test_align_targets() -> None:
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    logits = torch.zeros(2, 3, VOCAB)
    assert align_targets(labels, logits.shape[-2], "aligned").tolist() == labels.tolist()
    shifted = align_targets(labels, logits.shape[-2], "shifted")
    assert shifted.tolist() == [[6, 7, -100], [-100, 9, -100]] and shifted.is_contiguous()


def test_align_targets_of_virtual_tokens() -> None:
    labels = torch.tensor([[5, 6, 7]])
    logits = torch.zeros(1, 5, VOCAB)
    # the last virtual token predicts the first label of the text
    assert align_targets(labels, logits.shape[-2], "shifted").tolist() == [[-100, 5, 6, 7, -100]]
    assert align_targets(labels, logits.shape[-2], "aligned").tolist() == [[-100, -100, 5, 6, 7]]


def test_prompt_tuning_scores_what_peft_scores() -> None:
    model = get_peft_model(make_model("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"]).logits
    assert logits.shape[1] == LENGTH + 3
    targets = align_targets(inputs["labels"], logits.shape[-2], "shifted")
    ours = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    assert ours.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)


def test_too_few_logits() -> None:
    with pytest.raises(ValueError, match="logits for 2 positions but the labels have 3; .*logits_to_keep"):
        align_targets(torch.zeros(1, 3, dtype=torch.int64), 2, "shifted")


# ---- inputs --------------------------------------------------------------------------------------------------------


def test_inputs_of_a_decoder() -> None:
    inputs = {**batch(), "attention_mask": torch.ones(4, LENGTH), "shift_labels": torch.zeros(4, LENGTH)}
    rest = inputs_without_labels(make_model("gpt2"), inputs)
    assert set(rest) == {"input_ids", "attention_mask"} and "labels" in inputs


@pytest.mark.parametrize("name", ["bart", "t5", "pegasus"])
def test_inputs_of_an_encoder_decoder(name: str) -> None:
    model = make_model(name)
    rows = make_data(name, 3)
    inputs = {key: torch.tensor(rows[key]) for key in rows.column_names}
    made = inputs_without_labels(model, inputs)
    start = model.config.decoder_start_token_id
    assert (made["decoder_input_ids"][:, 0] == start).all()
    expected = inputs["labels"][:, :-1].where(inputs["labels"][:, :-1] != -100, model.config.pad_token_id)
    assert torch.equal(made["decoder_input_ids"][:, 1:], expected)
    given = torch.full((3, LENGTH), 7)
    kept = inputs_without_labels(torch.compile(model), {**inputs, "decoder_input_ids": given})
    assert kept["decoder_input_ids"] is given
    embedded = torch.zeros(3, LENGTH, 32)
    assert "decoder_input_ids" not in inputs_without_labels(model, {**inputs, "decoder_inputs_embeds": embedded})
    assert "decoder_input_ids" not in inputs


def test_an_encoder_decoder_that_cannot_make_them() -> None:
    class Strange(nn.Module):
        config = type("Config", (), {"is_encoder_decoder": True})()

    assert label_alignment(Strange()) is None  # no class that Transformers knows: it is probed
    with pytest.raises(ValueError, match=r"Strange cannot make decoder_input_ids .*DataCollatorForSeq2Seq"):
        inputs_without_labels(Strange(), batch())
