"""Loading text, training a tokenizer, and turning text into rows of tokens."""
