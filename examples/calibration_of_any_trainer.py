"""Measure calibration in a stock Trainer: its loss and everything else stay as they are, one callback is added."""

from pydoc_data.topics import topics  # the language reference that comes with Python

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from dpsm_hf import CalibrationCallback
from dpsm_hf.data.clm import ClmPreprocessing, prepare_clm_datasets
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

set_seed(0)
text = Dataset.from_dict({"text": list(topics.values())}).train_test_split(0.2, seed=0)
tokenizer = train_bpe_tokenizer(text["train"]["text"], 300)
rows = prepare_clm_datasets(text, tokenizer, ClmPreprocessing(block_size=64, min_remainder=64))
shape = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2)

args = TrainingArguments(
    output_dir="out/any-trainer", max_steps=30, learning_rate=3e-3, eval_strategy="steps", eval_steps=15,
    report_to="none", save_strategy="no", use_cpu=True,
)  # fmt: skip
trainer = Trainer(
    model=GPT2LMHeadModel(shape), args=args, train_dataset=rows["train"], eval_dataset=rows["test"].select(range(64)),
    callbacks=[CalibrationCallback()],
)  # fmt: skip
trainer.train()
metrics = trainer.evaluate()
# out/any-trainer/calibration/ has a file with all metrics for each evaluation, and the diagram of the last ones
print({name: round(metrics[f"eval_{name}"], 4) for name in ("loss", "nll", "brier", "ece_15", "signed_gap")})
