"""Swap Trainer for DPSMTrainer and leave everything else alone, TrainingArguments too; seconds on a CPU.

So few steps of so small a model show that it runs, not whether it helps.
"""

from pydoc_data.topics import topics  # the language reference that comes with Python

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from dpsm_hf import DPSMTrainer  # was: from transformers import Trainer
from dpsm_hf.data.clm import ClmPreprocessing, prepare_clm_datasets
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

text = Dataset.from_dict({"text": list(topics.values())}).train_test_split(0.2, seed=0)
tokenizer = train_bpe_tokenizer(text["train"]["text"], 300)
rows = prepare_clm_datasets(text, tokenizer, ClmPreprocessing(block_size=64, min_remainder=64))
shape = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2)

args = TrainingArguments(
    output_dir="out/swap-trainer", max_steps=30, learning_rate=3e-3, logging_steps=10, report_to="none", use_cpu=True
)
trainer = DPSMTrainer(  # was: Trainer(
    model=GPT2LMHeadModel(shape), args=args, train_dataset=rows["train"], eval_dataset=rows["test"].select(range(64))
)
trainer.train()  # by default alpha goes from 0 to 1 over a tenth of the steps; docs/choose.md has gentler schedules
metrics = trainer.evaluate()  # also writes out/swap-trainer/calibration/: every metric, intervals and the diagram
print({name: round(metrics[f"eval_{name}"], 4) for name in ("nll", "perplexity", "brier", "ece_15", "signed_gap")})
