"""Facts about a language model: vocabulary, which label a row of logits predicts, output layer, bytes of tokens."""
