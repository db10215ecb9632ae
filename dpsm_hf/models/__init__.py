"""What has to be known of a language model: its vocabulary, which label a row of logits predicts, its output layer."""
