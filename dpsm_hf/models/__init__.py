"""Facts about a language model: vocabulary, label alignment, own loss, output layer, bytes of tokens."""

from .language_model import label_alignment

__all__ = ["label_alignment"]
