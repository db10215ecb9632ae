"""A training loop of your own: DPSMLoss in place of torch.nn.CrossEntropyLoss, and scoring without logits."""

from pydoc_data.topics import topics  # the language reference that comes with Python

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpsm_hf import DPSMLoss, TokenCalibration, linear_scoring_loss
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

torch.manual_seed(0)
train, test = list(topics.values())[:60], list(topics.values())[60:]
tokenizer = train_bpe_tokenizer(train, 300)
ids, held_out = (torch.tensor(tokenizer("\n".join(part))["input_ids"]) for part in (train, test))
shape = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(shape)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# cross-entropy for half of the 40 steps, then a ramp to half and half
criterion = DPSMLoss(300, warmup_steps=10, schedule="late_linear", hold=20, alpha_end=0.5, total_steps=40)
for rows in ids[: 40 * 8 * 64].view(40, 8, 64):
    loss = criterion(model(rows).logits[:, :-1], rows[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# the same score from hidden states: no logits of all tokens at once; .loss.backward() would train with it
calibration = TokenCalibration()
with torch.no_grad():
    for number, row in enumerate(held_out[: 64 * 64].view(64, 1, 64)):
        hidden = model.model(row).last_hidden_state[:, :-1]
        scores = linear_scoring_loss(hidden, model.lm_head.weight, row[:, 1:], alpha=0.5)
        # intervals resample rows, since tokens of one row are alike
        found = {name: getattr(scores, name) for name in ("confidence", "correct", "nll", "brier")}
        calibration.update(document=torch.full((63,), number), **found)
metrics = calibration.compute()
print({name: round(metrics[name], 4) for name in ("nll", "brier", "ece_15", "ece_15_null")})
