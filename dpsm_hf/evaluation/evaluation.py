"""`Evaluation`: request and add up the token scores of one evaluation of one data set."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from ..models.language_model import core_model, end_tokens, label_alignment
from ..models.token_bytes import token_bytes
from ..rules.extra_statistics import ExtraStatistics
from ..rules.losses import IGNORE_INDEX, TokenScores
from ..runtime.devices import float64_device
from ..runtime.distributed import sum_over_processes
from .depth import DepthReader
from .forced_tokens import forced_labels, forced_token_ids
from .generation.scoring import FreeRunning
from .panel import EvaluationPanel, check_finite, real_tokens
from .temperature import Moments

# Samples that are counted: the most frequent tokens of a text are so after a few pages.
_SAMPLES = 256


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
        temperature: also report what scaling by it would give.
        classwise_tokens: report the calibration of so many of the most frequent tokens; 0 leaves it out.
        depth: report the expected depth.
        ignore_forced_tokens: keep the labels that a text is made to begin with out of all figures but their own.
        generated: report the calibration of what is generated, if the model is an encoder-decoder.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dataset: Any,
        *,
        byte_lengths: Tensor | None = None,
        temperature: float | None = None,
        classwise_tokens: int = 0,
        depth: bool = False,
        ignore_forced_tokens: bool = False,
        generated: bool = False,
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
            temperature=temperature,
            classes=frequent_labels(dataset, classwise_tokens, unscored=unscored) if classwise_tokens else None,
            layers=None if self._reader is None else self._reader.layers,
            forced_tokens=forced_token_ids(core, tokenizer) if ignore_forced_tokens else None,
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
    """Sum the moments that a temperature is fitted with, in one pass over the data.

    Args:
        temperature: that they are taken at.
        forced_tokens: ids of tokens that a text is made to begin with, which nothing is fitted on.
    """

    def __init__(self, temperature: float, forced_tokens: Sequence[int] = ()) -> None:
        super().__init__()
        self._forced_tokens = torch.tensor(list(forced_tokens), dtype=torch.int64)
        self.extra = ExtraStatistics(moments_at=temperature)
        self._sums: Tensor | None = None

    def add(self, scores: TokenScores, targets: Tensor, inputs: Mapping[str, Any]) -> None:
        batch_size = inputs["labels"].shape[0]
        check_finite(scores, batch_size)
        mask = real_tokens(scores, batch_size)
        if len(self._forced_tokens):
            rows = targets.reshape(batch_size, -1).to(mask.device)
            mask = mask & ~forced_labels(rows, self._forced_tokens).flatten()
        assert scores.extra is not None  # asked for above
        home = float64_device(mask.device)
        columns = scores.extra[mask].to(home).double()
        sums = torch.cat([columns.sum(0), mask.sum().to(home).double()[None]])
        self._sums = sums if self._sums is None else self._sums + sums

    def finish(self, device: torch.device) -> Moments:
        """Return the sums over all processes; all must call this."""
        sums = torch.zeros(4, dtype=torch.float64) if self._sums is None else self._sums
        nll, gradient, curvature, tokens = sum_over_processes(sums.to(float64_device(device))).tolist()
        return Moments(nll, gradient, curvature, int(tokens))


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


def frequent_labels(dataset: Any, number: int, *, unscored: int = 0) -> Tensor:
    """Return the most frequent labels of the first 256 samples, int64 ``[<= number]``, the most frequent first.

    Ties go to the smaller id, so that every process finds the same.

    Args:
        dataset: is read from its start, before the evaluation reads it again.
        number: of labels wanted.
        unscored: labels at the beginning of a sample that no row of the logits predicts: 1 where labels are shifted.

    Raises:
        ValueError: if the samples of the data set have no ``labels``, or can be read only once.
    """
    counts: Counter[int] = Counter()
    number_of_samples = len(dataset) if has_length(dataset) else None
    samples = iter(dataset) if number_of_samples is None else (dataset[i] for i in range(number_of_samples))
    if samples is dataset:
        raise ValueError(
            "classwise_tokens reads the first samples to find the most frequent labels, but this data set can be read "
            "only once: give one that begins anew whenever it is iterated, or leave classwise_tokens at 0."
        )
    for sample in itertools.islice(samples, _SAMPLES):
        labels = sample.get("labels") if hasattr(sample, "get") else None
        if labels is None:
            raise ValueError(
                "classwise_tokens needs to know the most frequent labels before the evaluation, but the samples of "
                "this data set have no 'labels' (they are made by the collator); leave classwise_tokens at 0."
            )
        values, times = np.unique(np.asarray(labels).reshape(-1)[unscored:], return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    counts.pop(IGNORE_INDEX, None)
    if not counts:
        raise ValueError("classwise_tokens: the first samples of this data set have no scored label.")
    chosen = sorted(counts, key=lambda label: (-counts[label], label))[:number]
    return torch.tensor(chosen, dtype=torch.int64)
