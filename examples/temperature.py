"""Fit a temperature on a split of its own, keep it beside the model, and sample text at it: the baseline to beat."""

from pydoc_data.topics import topics  # the language reference that comes with Python

import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from dpsm_hf import DPSMConfig, DPSMTrainer, TemperatureScaler
from dpsm_hf.data.clm import ClmPreprocessing, prepare_clm_datasets
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

set_seed(0)
parts = {"train": slice(0, 60), "calibration": slice(60, 68), "test": slice(68, None)}  # no topic is in two of them
text = DatasetDict({name: Dataset.from_dict({"text": list(topics.values())[part]}) for name, part in parts.items()})
tokenizer = train_bpe_tokenizer(text["train"]["text"], 300)
rows = prepare_clm_datasets(text, tokenizer, ClmPreprocessing(block_size=64, min_remainder=64))
shape = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2)
model = GPT2LMHeadModel(shape)

args = DPSMConfig(
    "out/temperature", scoring_rule="ce", num_train_epochs=20, learning_rate=1e-2, report_to="none", use_cpu=True,
    save_strategy="no", per_device_train_batch_size=8,
)  # fmt: skip
few = rows["train"].select(range(24))  # few rows, many times: the model becomes over-confident
trainer = DPSMTrainer(model, args, train_dataset=few, eval_dataset=rows["test"].select(range(64)))
trainer.train()
trainer.fit_temperature(rows["calibration"].select(range(64)))  # keeps no logits; writes temperature.json
metrics = trainer.evaluate()  # now with every metric after scaling too, as eval_..._scaled
trainer.save_model()
shown = [name for name in metrics if name.startswith(("eval_nll", "eval_ece_15"))]
print({name: round(metrics[name], 4) for name in shown})

scaler = TemperatureScaler.load("out/temperature")  # what another program does with the folder
model = GPT2LMHeadModel.from_pretrained("out/temperature")
scaler.apply_to_generation_config(model)  # do_sample=True, temperature=T; save_pretrained keeps it with the model
prompt = torch.tensor([tokenizer("The assert statement")["input_ids"]])
print(scaler.temperature, tokenizer.decode(model.generate(prompt, max_new_tokens=20, pad_token_id=1)[0]))
