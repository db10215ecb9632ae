"""Runs of run_clm_dpsm.py with frozen lower layers, on small saved models of three layers and real text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.tasks.language_modelling import LanguageModelling
from tests.tasks.clm_run import real_texts, write

#: Names that an upper layer's and a frozen layer's weights have in the saved models.
UPPER = {"llama": "model.layers.2.mlp.up_proj.weight", "gpt2": "transformer.h.2.mlp.c_fc.weight"}
FROZEN = {"llama": "model.layers.1.mlp.up_proj.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}
_MLP: dict[str, Any] = {"llama": LlamaMLP, "gpt2": GPT2MLP}


def save_models(folder: Path) -> None:
    """Save a Llama with a head of its own and a GPT-2 with dropout and a tied head, with a tokenizer, and a text."""
    texts = real_texts()
    tokenizer = train_bpe_tokenizer(texts, 400)
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=2, n_positions=64, **ids)
    for name, model in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write(folder, "txt", texts[:3])


def arguments(base: Path, model: str, out: Path, **options: Any) -> list[str]:
    """A command line: two epochs, shuffled, with an evaluation after each; an option set to None is left out."""
    text = base / "train.txt"
    given: dict[str, Any] = {
        "model_name_or_path": base / model, "train_file": text, "validation_file": text, "output_dir": out,
        "block_size": 24, "max_train_samples": 10, "max_eval_samples": 6, "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2, "num_train_epochs": 2, "learning_rate": 0.01, "logging_steps": 1,
        "eval_strategy": "epoch", "save_strategy": "no", "freeze_layers": 2, "do_train": True, "do_eval": True,
        "reliability_diagrams": "none", "use_cpu": True, "disable_tqdm": True, "log_level": "warning", **options,
    }  # fmt: skip
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(base: Path, model: str, out: Path, **options: Any) -> dict[str, float]:
    return LanguageModelling.main(arguments(base, model, out, **options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run has saved."""
    return load_file(next(folder.glob("*.safetensors")))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@contextmanager
def counted(model: str) -> Iterator[Callable[[], list[int]]]:
    """Count the calls of each layer's MLP: gives a function that returns how often the three layers ran.

    Calls without numbers, by which the operations of a step are counted, are none.
    """
    kind, calls = _MLP[model], dict[int, int]()
    own = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], FakeTensor):
            calls[id(self)] = calls.get(id(self), 0) + 1
        return own(self, *args, **kwargs)

    kind.forward = forward
    try:
        yield lambda: sorted(calls.values())
    finally:
        kind.forward = own
