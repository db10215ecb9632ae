"""Scoring what an encoder-decoder generated in an evaluation, and joining the processes that did."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from ...models.language_model import core_model
from ...rules.losses import IGNORE_INDEX, TokenScores
from ..text_metrics import text_qualities
from .accumulator import GeneratedCalibration
from .batch import generated_batch

logger = logging.get_logger(__name__)


class FreeRunning:
    """What one evaluation generates, by this process; `joined` is what all of them did.

    Where a generated batch cannot be scored (a ``generate`` of the user's own that returns something else, say) a
    warning says why, once, and the evaluation goes on without.

    Args:
        model: the encoder-decoder.
        tokenizer: decodes texts, for ROUGE of their words; None leaves that out.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        special = _special(model, tokenizer)
        self._calibration: GeneratedCalibration | None = GeneratedCalibration(special_tokens=special)

    def batch(self, inputs: dict[str, Any], generated: Tensor, options: dict[str, Any]) -> dict[str, Any] | None:
        """Return the batch that scores the generated tokens, or None where they cannot be scored."""
        if self._calibration is None:
            return None
        try:
            return generated_batch(self._model, inputs, generated, **options)
        except ValueError as error:
            self._calibration = None
            logger.warning(f"the calibration of generated tokens is left out: {error}")
            return None

    def add(self, batch: dict[str, Any], reference: Tensor, scores: TokenScores) -> None:
        """Add the scores of that batch, with the labels that the texts are judged by."""
        if self._calibration is not None:
            quality = None
            if self._tokenizer is not None:
                texts, references = (self._decode(ids) for ids in (batch["labels"], reference))
                quality = text_qualities(texts, references)
            self._calibration.update(batch["labels"], reference, nll=scores.nll, text_quality=quality)

    def _decode(self, ids: Tensor) -> list[str]:
        rows = [[token for token in row if token != IGNORE_INDEX] for row in ids.tolist()]
        return [text.strip() for text in self._tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def joined(self) -> GeneratedCalibration | None:
        """Return what all processes generated, None if nothing or if one could not score it; all must call this."""
        states = gather_object([None if self._calibration is None else self._calibration.state()])
        if any(state is None for state in states) or not sum(len(state["summaries"]) for state in states):
            return None
        return GeneratedCalibration.from_states(states)


def _special(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the ids that are no text."""
    found: set[int] = set(getattr(tokenizer, "all_special_ids", None) or ())
    core = core_model(model)
    for source in (getattr(core, "generation_config", None), getattr(core, "config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            ids = getattr(source, name, None)
            found |= set(ids) if isinstance(ids, (list, tuple)) else set() if ids is None else {int(ids)}
    return found
