"""An encoder-decoder with DPSMSeq2SeqTrainer: headings of the language reference from their text, generated too."""

from pydoc_data.topics import topics  # the language reference that comes with Python
from statistics import fmean

from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq, EvalPrediction, set_seed

from dpsm_hf import DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer
from dpsm_hf.data.summarization import TokenizationSettings, tokenize_split
from dpsm_hf.data.tokenizer import train_bpe_tokenizer

set_seed(0)
parts = (text.partition("\n") for text in topics.values())
pairs = [{"document": body.strip("*=\n"), "summary": heading} for heading, _, body in parts]
split = Dataset.from_list(pairs).train_test_split(0.2, seed=0)
tokenizer = train_bpe_tokenizer(split["train"]["document"], 600, sequence_template=True)
settings = TokenizationSettings("document", "summary", max_source_length=64, max_target_length=16)
rows = {name: tokenize_split(part, tokenizer, settings) for name, part in split.items()}
shape = {f"{part}_{name}": size for part in ("encoder", "decoder")
         for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 128))}  # fmt: skip
model = BartForConditionalGeneration(BartConfig(vocab_size=600, d_model=64, forced_bos_token_id=0, dropout=0, **shape))


def rouge(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean ROUGE-L of the generated headings."""
    texts = zip(*(tokenizer.batch_decode(ids.clip(0), skip_special_tokens=True) for ids in prediction), strict=True)
    return {"rougeL": fmean(RougeScorer(["rougeL"]).score(*pair)["rougeL"].fmeasure for pair in texts)}


args = DPSMSeq2SeqConfig(
    "out/seq2seq", alpha_schedule="late_linear", max_steps=80, learning_rate=5e-3, predict_with_generate=True,
    generation_max_length=16, per_device_train_batch_size=16, report_to="none", save_strategy="no", use_cpu=True,
)  # fmt: skip
collator = DataCollatorForSeq2Seq(tokenizer, model)
trainer = DPSMSeq2SeqTrainer(model, args, collator, *rows.values(), tokenizer, compute_metrics=rouge)
trainer.train()
metrics = trainer.with_all_metrics(trainer.evaluate())  # of the true headings, and generated_... of its own
print({name: round(metrics[f"eval_{name}"], 4) for name in ("nll", "ece_15", "generated_ece_15", "rougeL")})
