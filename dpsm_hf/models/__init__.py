"""Facts about a language model: vocabulary, which label a row of logits predicts, output layer, bytes of tokens."""

from .language_model import label_alignment

__all__ = ["label_alignment"]
