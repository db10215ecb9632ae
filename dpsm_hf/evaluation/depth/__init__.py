"""The expected depth of a decoder: after how many layers its most likely next token no longer changes."""

from .reader import DepthReader, DepthReaderError
from .tally import DepthTally

__all__ = ["DepthReader", "DepthReaderError", "DepthTally"]
