"""`Evaluation`: request and add up the token scores of one evaluation of one data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.language_model import core_model, end_tokens, label_alignment
from ..models.token_bytes import token_bytes
from ..rules.extra_statistics import ExtraStatistics
from ..rules.losses import TokenScores
from ..runtime.distributed import sum_over_processes
from .depth import DepthReader
from .forced_tokens import forced_labels, forced_token_ids
from .generation.scoring import FreeRunning
from .panel import EvaluationPanel, check_finite, real_tokens
from .temperature import TemperatureScaler
from .temperature_search import MomentSums, Sums
from .token_frequency import TokenFrequency, frequent_labels


class Collector:
    """Receive the scores of batches while they are evaluated; this one keeps no more than the last."""

    #: What the scorer is to compute of each token beside the usual statistics.
    extra: ExtraStatistics | None = None
    #: Scores what is generated; None where that is not wanted.
    generated: FreeRunning | None = None
    #: Whether `add` needs the whole batch on the device, not its labels alone.
    reads_inputs: bool = False

    def __init__(self) -> None:
        #: Whether somebody reads the logits of the batch in progress.
        self.logits_needed = True
        self._last: tuple[TokenScores, Tensor] | None = None

    @contextmanager
    def batch(self, *, logits_needed: bool) -> Iterator[None]:
        """Wait for the scores of a batch, for the length of a context."""
        self._last, self.logits_needed = None, logits_needed
        try:
            yield
        finally:
            self.logits_needed = True

    def receive(self, scores: TokenScores, targets: Tensor) -> None:
        """Take the scores of the batch; those of a second pass over it replace those of the first."""
        self._last = scores, targets

    def take(self) -> tuple[TokenScores, Tensor] | None:
        """Return the scores of the batch and the labels they were scored against, once; None if it was not scored."""
        last, self._last = self._last, None
        return last

    def add(self, scores: TokenScores, targets: Tensor, inputs: Mapping[str, Any]) -> None:
        """Add the flattened scores of this process's batch; its inputs are on the device where `reads_inputs` says so.

        Raises:
            FloatingPointError: if the logits of a scored token are NaN or infinite.
        """


class Evaluation(Collector):
    """Add up everything that is reported of a set; made for one evaluation of it.

    Args:
        model: the language model, possibly wrapped.
        tokenizer: for the end tokens, and for the words of generated texts.
        dataset: that is evaluated.
        byte_lengths: of each token, see `EvaluationPanel`.
        scaler: also report what scaling by its temperatures would give.
        classwise_tokens: report the calibration of so many of the most frequent tokens; 0 leaves it out.
        depth: report the expected depth.
        ignore_forced_tokens: keep the labels that a text is made to begin with out of all figures but their own.
        generated: report the calibration of what is generated, if the model is an encoder-decoder.
        frequency: of the tokens, to report predicted mass and labels by.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dataset: Any,
        *,
        byte_lengths: Tensor | None = None,
        scaler: TemperatureScaler | None = None,
        classwise_tokens: int = 0,
        depth: bool = False,
        ignore_forced_tokens: bool = False,
        generated: bool = False,
        frequency: TokenFrequency | None = None,
    ) -> None:
        super().__init__()
        core = core_model(model)
        self._reader = DepthReader(model) if depth else None
        if generated and getattr(getattr(core, "config", None), "is_encoder_decoder", False):
            self.generated = FreeRunning(model, tokenizer)
        self.reads_inputs = self._reader is not None or self.generated is not None
        unscored = 1 if label_alignment(model) == "shifted" else 0
        self._panel = EvaluationPanel(
            eos_tokens=end_tokens(core, tokenizer),
            byte_lengths=byte_lengths,
            temperature=None if scaler is None else scaler.temperature,
            other_temperatures={} if scaler is None else scaler.others,
            left_out="" if scaler is None else scaler.left_out,
            classes=frequent_labels(dataset, classwise_tokens, unscored=unscored) if classwise_tokens else None,
            layers=None if self._reader is None else self._reader.layers,
            forced_tokens=forced_token_ids(core, tokenizer) if ignore_forced_tokens else None,
            frequency=frequency,
        )
        self.extra = self._panel.extra

    def add(self, scores: TokenScores, targets: Tensor, inputs: Mapping[str, Any]) -> None:
        """Add the scores of a batch; with the depth of its tokens, which is one more forward."""
        depths = None if self._reader is None else self._reader.depths(inputs, targets)
        self._panel.add(scores, targets, inputs["labels"].shape[0], depths)

    def finish(self, device: torch.device) -> EvaluationPanel:
        """Return what all processes saw; all must call this."""
        panel = self._panel.reduce(sum_over_processes, device)
        if self.generated is not None:
            panel.generated = self.generated.joined()
        return panel


class MomentPass(Collector):
    """Sum the moments that temperatures are fitted with, in one pass over the data.

    Args:
        wanted: the temperature of each search, see `MomentSums`.
        forced_tokens: ids of tokens that a text is made to begin with, which nothing is fitted on.
    """

    def __init__(self, wanted: Mapping[str, float], forced_tokens: Sequence[int] = ()) -> None:
        super().__init__()
        self._forced_tokens = torch.tensor(list(forced_tokens), dtype=torch.int64)
        self._sums = MomentSums(wanted)
        self.extra = self._sums.extra

    def add(self, scores: TokenScores, targets: Tensor, inputs: Mapping[str, Any]) -> None:
        batch_size = inputs["labels"].shape[0]
        check_finite(scores, batch_size)
        mask = real_tokens(scores, batch_size)
        if len(self._forced_tokens):
            rows = targets.reshape(batch_size, -1).to(mask.device)
            mask = mask & ~forced_labels(rows, self._forced_tokens).flatten()
        assert scores.extra is not None  # asked for above
        self._sums.add(scores.extra[mask])

    def finish(self, device: torch.device) -> Sums:
        """Return the sums over all processes; all must call this."""
        return self._sums.finish(device, sum_over_processes)


class TokenBytes:
    """Look up the bytes of each token of a tokenizer, once for as long as it stays the same."""

    def __init__(self) -> None:
        self._known: tuple[Any, int, Tensor | None] | None = None

    def of(self, tokenizer: Any) -> Tensor | None:
        """Return the bytes of each token, ``[V]``, of the tokenizer as it is now; None where they cannot be told."""
        size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0  # grows with added tokens
        if self._known is None or self._known[0] is not tokenizer or self._known[1] != size:
            self._known = (tokenizer, size, token_bytes(tokenizer))
        return self._known[2]
