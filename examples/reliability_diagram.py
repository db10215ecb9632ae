"""Draw reliability diagrams from the files that evaluations leave behind: one model, two models, and their numbers.

    python examples/reliability_diagram.py out/*/calibration/eval-step-*.json

Without files it makes two: a small model before its training and after.
"""

import sys
from pydoc_data.topics import topics  # the language reference that comes with Python

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from dpsm_hf import DPSMConfig, DPSMTrainer, ReliabilityDisplay
from dpsm_hf.data.clm import ClmPreprocessing, prepare_clm_datasets
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

files = sys.argv[1:]
if not files:
    set_seed(0)
    text = Dataset.from_dict({"text": list(topics.values())}).train_test_split(0.2, seed=0)
    tokenizer = train_bpe_tokenizer(text["train"]["text"], 300)
    rows = prepare_clm_datasets(text, tokenizer, ClmPreprocessing(block_size=64, min_remainder=64))
    args = DPSMConfig(
        "out/diagram", scoring_rule="ce", max_steps=40, learning_rate=3e-3, report_to="none", save_strategy="no",
        eval_strategy="steps", eval_steps=20, reliability_diagrams="none", use_cpu=True,
    )  # fmt: skip
    shape = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2)
    test = rows["test"].select(range(64))
    DPSMTrainer(GPT2LMHeadModel(shape), args, train_dataset=rows["train"], eval_dataset=test).train()
    files = [f"out/diagram/calibration/eval-step-{step:06d}.json" for step in (20, 40)]

one = ReliabilityDisplay.from_json(files[-1], name="the last one")
print(one.title())
one.save("out/one.png")
both = ReliabilityDisplay.overlay(files)  # named by folder and file; from_json(path, name=...) gives other names
both.save("out/both.svg")  # the ending names the format
both.save_data("out/both.csv")  # a line for each bin
print({name: round(value, 4) for name, value in both.ece.items()})
