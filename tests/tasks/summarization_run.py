"""Command lines of a tiny run of run_summarization_dpsm.py on real docstrings."""

from __future__ import annotations

from pathlib import Path

TINY = (
    "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2,"
    "encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=64"
)
DOCSTRINGS = ["--dataset_name", "python-docstrings"]
FRESH_BART = ["--model_type", "bart", "--config_overrides", TINY]
TRAIN_BPE = ["--tokenizer_name", "train-bpe", "--tokenizer_vocab_size", "300"]


def arguments(output_dir: Path, *more: str) -> list[str]:
    return [
        *("--output_dir", str(output_dir), "--max_source_length", "48", "--max_target_length", "12"),
        *("--max_train_samples", "16", "--max_eval_samples", "5", "--max_predict_samples", "3"),
        *("--per_device_train_batch_size", "4", "--max_steps", "2", "--logging_steps", "1", "--seed", "3"),
        *("--disable_tqdm", "true", "--use_cpu", "--log_level", "warning", "--save_strategy", "no"),
        *more,
    ]
