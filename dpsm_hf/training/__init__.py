"""The trainers: loss, log, evaluation and checkpoints of a Hugging Face Trainer."""
