"""LoRA with PEFT: only the adapter is trained and saved, here on other rows of the same text.

The base model is made and trained on the spot so that nothing is downloaded. For a real one take
``AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")`` and its tokenizer.
"""

from pydoc_data.topics import topics  # the language reference that comes with Python

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.data.clm import ClmPreprocessing, prepare_clm_datasets
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

set_seed(0)
text = Dataset.from_dict({"text": list(topics.values())}).train_test_split(0.2, seed=0)
tokenizer = train_bpe_tokenizer(text["train"]["text"], 300)
rows = prepare_clm_datasets(text, tokenizer, ClmPreprocessing(block_size=64, min_remainder=64))
train, test = rows["train"].shuffle(seed=0), rows["test"].select(range(64))
shape = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
common = {"learning_rate": 3e-3, "report_to": "none", "save_strategy": "no", "use_cpu": True}

base = LlamaForCausalLM(shape)
args = DPSMConfig("out/lora/base", scoring_rule="ce", max_steps=40, **common)
DPSMTrainer(base, args, train_dataset=train.select(range(320))).train()
base.save_pretrained("out/lora/base")

model = get_peft_model(LlamaForCausalLM.from_pretrained("out/lora/base"), LoraConfig(r=8, task_type="CAUSAL_LM"))
args = DPSMConfig("out/lora/adapter", alpha_schedule="constant", alpha_end=0.5, max_steps=20, **common)
trainer = DPSMTrainer(model, args, train_dataset=train.select(range(320, 480)), eval_dataset=test)
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model()  # adapter_config.json and adapter_model.safetensors
again = AutoPeftModelForCausalLM.from_pretrained("out/lora/adapter")
print({name: (round(before[name], 4), round(after[name], 4)) for name in ("eval_nll", "eval_brier", "eval_ece_15")})
