"""Fine-tune with TRL's SFTTrainer, made to train with a scoring rule: chats, packing, LoRA; a minute on a CPU.

The model is tiny and its weights are random, so that nothing is downloaded. For a pretrained one give the trainer its
name, ``DPSMSFTTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args=...)``, and leave processing_class out.
"""

from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from dpsm_hf.data.python_text import load_python_docstrings
from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.trl import DPSMSFTConfig, DPSMSFTTrainer

text = load_python_docstrings()  # docstrings of the standard library and their first lines
train, held_out = text["train"].select(range(160)), text["validation"].select(range(40))
tokenizer = train_bpe_tokenizer(train["document"], 800)
tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


def chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return a docstring and its summary as a conversation."""
    asked = {"role": "user", "content": f"Summarise:\n{row['document']}"}
    return {"messages": [asked, {"role": "assistant", "content": row["summary"]}]}


args = DPSMSFTConfig(
    output_dir="out/sft-dpsm", alpha_schedule="linear", alpha_end=0.5, alpha_warmup_steps=0.5, packing=True,
    max_length=256, max_steps=10, learning_rate=1e-3, eval_strategy="steps", eval_steps=10, bf16=False, use_cpu=True,
)  # fmt: skip
shape = LlamaConfig(vocab_size=800, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
train, held_out = (part.map(chat, remove_columns=part.column_names) for part in (train, held_out))
trainer = DPSMSFTTrainer(
    LlamaForCausalLM(shape), args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
    peft_config=LoraConfig(r=8),
)  # fmt: skip
trainer.train()
metrics = trainer.state.log_history[-2]  # of the last evaluation; the last entry sums up the training
print({name: round(metrics[name], 4) for name in ("eval_nll", "eval_brier", "eval_ece_15", "eval_entropy")})
