"""Free-running calibration: how far the probabilities that a model gives to its own output can be believed.

A generated token is *supported* where it lies on a longest common subsequence of generated and reference token ids,
the event that ROUGE-L counts; its probability is the forecast of that. A whole summary has a quality, the ROUGE-L F1
of token ids; ``exp`` of its mean token log-probability is the forecast.

Read both with care: a paraphrase counts as wrong, and a common word may be matched by chance. They compare models on
the same references; they do not say that a text is true.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calibration import Interval, TokenCalibration
from ...rules.losses import IGNORE_INDEX
from ...runtime.distributed import process_index, process_number, real_rows
from ...runtime.files import strict
from .forecasts import forecast_curve, forecast_figures, forecast_intervals

# What a generated token's view is called, by the name of `TokenCalibration`: its event is support, not "the top label
# is right". The scores of the whole distribution are not among them: there is no label.
_OF_TOKENS = {
    "tokens": "tokens", "nll": "nll", "confidence": "confidence", "token_accuracy": "supported",
    "signed_gap": "signed_gap", "ece_10": "ece_10", "ece_15": "ece_15", "ece_100": "ece_100",
    "ece_15_null": "ece_15_null", "adaptive_ece": "adaptive_ece", "debiased_ece": "debiased_ece",
    "smooth_ece": "smooth_ece", "top_label_brier": "brier", "confidence_auroc": "auroc",
}  # fmt: skip

_OF_SUMMARIES = ("confidence", "quality", "signed_gap", "adaptive_ece", "auroc", "rank_correlation")

#: Every name that `GeneratedCalibration.metrics` may report.
GENERATED_METRICS = (
    *(f"generated_{name}" for name in (*_OF_TOKENS.values(), "ece_15_low", "ece_15_high")),
    "summaries", "summaries_empty", "summary_length", "summary_log_probability",
    *(f"{view}_{name}" for view in ("summary", "summary_text")
      for name in (*_OF_SUMMARIES, "rank_correlation_low", "rank_correlation_high")),
)  # fmt: skip

# One row for each summary, float64 (whole numbers are exact below 2**53); text_quality is NaN where it was not given.
_COLUMNS = ("sample", "log_probability", "length", "text_length", "reference_length", "common", "text_quality")

# A float32 logarithm of a softmax may miss zero by as much.
_ROUNDING = 1e-5


class GeneratedCalibration:
    """Accumulate the calibration of generated tokens, in fixed memory, and of whole summaries, seven numbers each.

    Args:
        special_tokens: ids that are no text (start, end, padding). They count in the log-probability of a summary, but
            neither as supported or unsupported nor in ROUGE-L: the end of one text always matches the end of another.

    Example::

        batch = generated_batch(model, inputs, model.generate(**inputs, **options), **options)
        scores = score_tokens(model(**batch).logits, batch["labels"])
        calibration.update(batch["labels"], inputs["labels"], nll=scores.nll)
        calibration.metrics()["generated_ece_15"]
    """

    def __init__(self, *, special_tokens: Iterable[int] = ()) -> None:
        self.tokens = TokenCalibration()
        self.special_tokens = tuple(sorted({int(token) for token in special_tokens}))
        self._rows: list[Tensor] = []
        self._seen: set[int] = set()
        self._numbered = 0
        self._intervals: dict[str, Mapping[str, Interval]] = {}

    def update(
        self,
        generated: Tensor,
        reference: Tensor,
        *,
        nll: Tensor,
        probability: Tensor | None = None,
        mask: Tensor | None = None,
        samples: Tensor | None = None,
        real: Tensor | None = None,
        text_quality: Any = None,
    ) -> None:
        """Add generated sequences. A sequence whose sample number was seen before is left out.

        Args:
            generated: ``[B, T]`` int64, the generated ids, -100 where a token does not count (`generated_batch`).
            reference: ``[B, R]`` int64, the reference ids, -100 for padding.
            nll: ``[B, T]``, or flattened, ``-log p`` in nats that the model gives to each generated token.
            probability: same shape, the probability of it; ``exp(-nll)`` if left out.
            mask: same shape, False for further tokens that do not count.
            samples: ``[B]`` int64, the number of each sample. If left out, its place in the data set, on any number of
                processes that take batches of equal size in turn.
            real: bool ``[B]``, False for rows that only fill up a batch. If both are left out: those that accelerate
                filled the last batch with.
            text_quality: ``[B]`` in [0, 1], another quality of each text, ROUGE of its words say.

        Raises:
            ValueError: if shapes disagree, a probability or a quality lies outside [0, 1], or a sample number is
                negative. Nothing is added then.
            FloatingPointError: if the probability of a token that counts is NaN.
        """
        if generated.dim() != 2 or reference.dim() != 2 or len(generated) != len(reference):
            raise ValueError(
                f"generated has shape {tuple(generated.shape)} and reference {tuple(reference.shape)}; expected "
                "[B, T] and [B, R] with one reference for each generated sequence."
            )
        batch = len(generated)
        ids, wanted = generated.detach().cpu(), reference.detach().cpu()
        counted = ids != IGNORE_INDEX
        if mask is not None:
            counted &= _as_shape(mask, ids, "mask").bool()
        loss = _as_shape(nll, ids, "nll").double()
        p = (-loss).exp() if probability is None else _as_shape(probability, ids, "probability").double()
        number, kept = self._numbers(batch, samples, real, generated.device)
        counted &= kept[:, None]
        _check_tokens(loss, p, counted)
        loss, p = loss.clamp_min(0), p.clamp_max(1)
        other = torch.full((batch,), math.nan).double() if text_quality is None else _qualities(text_quality, batch)

        special = torch.tensor(self.special_tokens, dtype=torch.int64)
        text = counted & ~torch.isin(ids, special)
        in_reference = (wanted != IGNORE_INDEX) & ~torch.isin(wanted, special)
        supported = torch.zeros_like(text)
        for row in kept.nonzero().flatten().tolist():
            of_text, of_reference = ids[row][text[row]].tolist(), wanted[row][in_reference[row]].tolist()
            supported[row, text[row]] = torch.tensor(on_common_subsequence(of_text, of_reference), dtype=torch.bool)
        # the score of a summary: what beam search adds up, the end token included
        total = -torch.where(counted, loss, 0.0).sum(1)
        sizes = (counted.sum(1), text.sum(1), in_reference.sum(1), supported.sum(1))
        rows = torch.stack([number.double(), total, *(size.double() for size in sizes), other], 1)
        document = number[:, None].expand(ids.shape)
        self.tokens.update(confidence=p, correct=supported, nll=loss, mask=text, document=document)
        self._rows.append(rows[kept])
        self._seen.update(number[kept].tolist())
        self._intervals = {}
        if samples is None:
            self._numbered += process_number() * batch

    def _numbers(
        self, batch: int, samples: Tensor | None, real: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the number of each sample, and which of them are real and new."""
        if samples is None:
            number = self._numbered + process_index() * batch + torch.arange(batch)
            real = real_rows(batch, device) if real is None else real
        else:
            number = torch.as_tensor(samples).detach().cpu().to(torch.int64)
        kept = torch.ones(batch, dtype=torch.bool) if real is None else torch.as_tensor(real).detach().cpu().bool()
        if number.shape != (batch,) or kept.shape != (batch,):
            raise ValueError(
                f"samples has shape {tuple(number.shape)} and real {tuple(kept.shape)}; expected [{batch}], a number "
                "and a truth value for each generated sequence."
            )
        if batch and int(number.min()) < 0:
            raise ValueError(f"samples holds {int(number.min())}; samples are numbered from 0 on.")
        known, new = set(self._seen), torch.zeros_like(kept)
        for row in kept.nonzero().flatten().tolist():
            new[row] = int(number[row]) not in known
            known.add(int(number[row]))
        return number, new

    def set_text_quality(self, values: Any) -> None:
        """Give every summary another quality, ROUGE of its words say, once it is known.

        Args:
            values: ``[N]`` in [0, 1], in the order of the sample numbers.

        Raises:
            ValueError: if there are more or fewer values than summaries, or one lies outside [0, 1].
        """
        table = self._table()
        table[:, _COLUMNS.index("text_quality")] = _qualities(values, len(table))
        self._rows, self._intervals = [table], {}

    # ---- several processes -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return everything this accumulator knows as tensors on the CPU, to be gathered (``gather_object``)."""
        tokens = {f"tokens.{name}": tensor.cpu() for name, tensor in self.tokens.state_dict().items()}
        return {"summaries": self._table(), "special_tokens": torch.tensor(self.special_tokens).long(), **tokens}

    @classmethod
    def from_states(cls, states: Sequence[Mapping[str, Tensor]]) -> GeneratedCalibration:
        """Join what `state` of several processes returned; summaries are in the order of their sample numbers.

        Raises:
            ValueError: if there is no state, if they have different special tokens, or if two hold the same sample:
                its tokens would count twice.
        """
        if not states:
            raise ValueError("from_states got no state; pass what state() of each process returned.")
        joined = cls(special_tokens=states[0]["special_tokens"].tolist())
        for state in states:
            if state["special_tokens"].tolist() != list(joined.special_tokens):
                raise ValueError(
                    f"special_tokens are {state['special_tokens'].tolist()} on one process and "
                    f"{list(joined.special_tokens)} on another; construct both with the same."
                )
            numbers = {int(number) for number in state["summaries"][:, 0]}
            if twice := numbers & joined._seen:
                raise ValueError(
                    f"sample {min(twice)} was generated on two processes, and its tokens were counted on both; mark "
                    "the rows that only fill up a batch as not real in update."
                )
            tokens = TokenCalibration()
            tokens.load_state_dict({key[7:]: value for key, value in state.items() if key.startswith("tokens.")})
            joined.tokens.merge(tokens)
            joined._rows.append(state["summaries"].clone())
            joined._seen |= numbers
        joined._numbered = max(joined._seen, default=-1) + 1
        return joined

    def merge(self, other: GeneratedCalibration) -> GeneratedCalibration:
        """Add the sequences of another accumulator to this one and return it.

        Raises:
            ValueError: as `from_states`. Nothing is added then.
        """
        joined = self.from_states([self.state(), other.state()])
        vars(self).update(vars(joined))
        return self

    # ---- what follows from it --------------------------------------------------------------------------------------

    def summaries(self) -> dict[str, np.ndarray]:
        """Return the numbers of each summary, ``[N]`` each, in the order of the sample numbers.

        ``sample``, ``log_probability`` (sum over its tokens), ``length`` (tokens that the model chose, the end
        included), ``text_length`` and ``reference_length`` (without special tokens), ``common`` (length of the longest
        common subsequence), ``text_quality`` (NaN if not given), ``mean_log_probability`` and ``confidence``, its
        ``exp`` (NaN without tokens), ``quality = 2 common / (text_length + reference_length)`` (0 if both are empty).
        """
        found = dict(zip(_COLUMNS, self._table().numpy().T, strict=True))
        with np.errstate(invalid="ignore"):
            length = np.where(found["length"] > 0, found["length"], np.nan)
            found["mean_log_probability"] = found["log_probability"] / length
        found["confidence"] = np.exp(found["mean_log_probability"])
        found["quality"] = 2 * found["common"] / np.maximum(found["text_length"] + found["reference_length"], 1)
        return found

    def _table(self) -> Tensor:
        table = torch.cat([torch.zeros(0, len(_COLUMNS), dtype=torch.float64), *self._rows])
        return table[table[:, 0].argsort()]

    def _forecasts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return confidence and quality of the summaries that have both, by view."""
        found, views = self.summaries(), {}
        for view, name in (("summary", "quality"), ("summary_text", "text_quality")):
            known = ~np.isnan(found["confidence"]) & ~np.isnan(found[name])
            if known.any():
                views[view] = (found["confidence"][known], found[name][known])
        return views

    def metrics(self) -> dict[str, float]:
        """Return what an evaluation reports, without prefix, of `GENERATED_METRICS`; empty if nothing was generated.

        ``generated_…`` is of text tokens: ``supported`` the share that lies on a longest common subsequence with the
        reference, ``confidence`` the mean probability, ``signed_gap`` confidence less support, ``ece_15`` as for
        teacher-forced tokens, ``auroc`` the chance that a supported token is the more probable one. ``summaries`` have
        at least one token that the model chose, ``summaries_empty`` have no text. ``summary_…`` is of ``summaries``:
        ``length`` and ``log_probability`` (mean over a summary's tokens) are means, for the others see
        `forecast_figures`; ``summary_text_…`` is the same with the quality that was given. What is no number (a rank
        correlation where all are of one quality) is left out.
        """
        found: dict[str, float] = {}
        if self.tokens.tokens:
            of_tokens = self.tokens.compute()
            found |= {f"generated_{new}": of_tokens[name] for name, new in _OF_TOKENS.items() if name in of_tokens}
            low, high = self.intervals("tokens")["ece_15"]
            found |= {"generated_ece_15_low": low, "generated_ece_15_high": high}
        numbers = self.summaries()
        if not len(numbers["sample"]):
            return found
        known = numbers["length"] > 0
        found["summaries"] = int(known.sum())
        found["summaries_empty"] = int((numbers["text_length"] == 0).sum())
        if known.any():
            found["summary_length"] = float(numbers["length"][known].mean())
            found["summary_log_probability"] = float(numbers["mean_log_probability"][known].mean())
        for view, (confidence, quality) in self._forecasts().items():
            found |= {f"{view}_{name}": value for name, value in forecast_figures(confidence, quality).items()}
            low, high = self.intervals(view)["rank_correlation"]
            found |= {f"{view}_rank_correlation_low": low, f"{view}_rank_correlation_high": high}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def intervals(self, view: str) -> Mapping[str, Interval]:
        """Return the confidence intervals of a view, by the names of `TokenCalibration` or of `forecast_figures`.

        Raises:
            ValueError: if nothing is known of that view, which is "tokens", "summary" or "summary_text".
        """
        if view not in self._intervals:  # they take a second or so, and are wanted by the log and by the record
            forecasts = self._forecasts()
            if view == "tokens" and self.tokens.tokens:
                self._intervals[view] = self.tokens.intervals()
            elif view in forecasts:
                self._intervals[view] = forecast_intervals(*forecasts[view])
            else:
                raise ValueError(
                    f"there are no intervals of {view!r}: choose tokens, summary or summary_text, once texts (and "
                    "their text_quality) were added."
                )
        return self._intervals[view]

    def record(self, bins: int) -> dict[str, Any]:
        """Return what a calibration file holds: metrics, intervals and curve of each view, as JSON can hold them.

        Raises:
            ValueError: if the grid of 3,000 cannot be cut into that many bins.
        """
        found: dict[str, Any] = {"tokens": self.tokens.tokens}
        if self.tokens.tokens:
            metrics, intervals = self.tokens.compute(), self.intervals("tokens")
            found["metrics"] = strict({new: metrics[name] for name, new in _OF_TOKENS.items() if name in metrics})
            of_metrics = {new: intervals[name] for name, new in _OF_TOKENS.items() if name in intervals}
            found["intervals"] = strict(of_metrics)
            found["curve"] = self.tokens.curve(bins).as_dict()
        for view, (confidence, quality) in self._forecasts().items():
            found[view] = {
                "count": len(confidence),
                "metrics": strict(forecast_figures(confidence, quality)),
                "intervals": strict(self.intervals(view)),
                "curve": forecast_curve(confidence, quality),
            }
        return found


def _as_shape(values: Tensor, like: Tensor, name: str) -> Tensor:
    if values.numel() != like.numel() or values.shape not in (like.shape, (like.numel(),)):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but generated has {tuple(like.shape)}.")
    return values.detach().cpu().reshape(like.shape)


def _check_tokens(nll: Tensor, probability: Tensor, counted: Tensor) -> None:
    """Raise for what no generated token can have, with its place."""
    broken = counted & (torch.isnan(nll) | torch.isnan(probability))
    outside = counted & ((nll < -_ROUNDING) | (probability < 0) | (probability > 1 + _ROUNDING))
    if bool(broken.any()):
        row, place = broken.nonzero()[0].tolist()
        raise FloatingPointError(
            f"the probability of generated token {place} of row {row} is NaN: the model's weights are broken or it "
            "overflows in this dtype."
        )
    if bool(outside.any()):
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"generated token {place} of row {row} has nll {float(nll[row, place])} and probability "
            f"{float(probability[row, place])}; expected -log p from 0 on, in nats, and p in [0, 1]."
        )


def _qualities(values: Any, number: int) -> Tensor:
    found = torch.as_tensor(values).detach().cpu().double()
    if found.shape != (number,):
        raise ValueError(f"the quality of texts has shape {tuple(found.shape)}; expected [{number}], one for each.")
    wrong = found[~((found >= 0) & (found <= 1))]  # NaN too
    if len(wrong):
        raise ValueError(f"quality {float(wrong[0])} lies outside [0, 1]; divide a ROUGE in percent by 100.")
    return found


def on_common_subsequence(sequence: Sequence[int], other: Sequence[int]) -> list[bool]:
    """Return which places of a sequence lie on one longest common subsequence with another.

    Of all longest ones it is the one whose places in ``sequence`` come first, compared from the left. ROUGE-L's F1 is
    ``2 * sum(result) / (len(sequence) + len(other))``.

    A row of the table of lengths is kept as one integer, a bit for each place of ``other``, 0 where the length rises
    there; a row follows from the next in four operations on integers.

    Args:
        sequence: ``[m]`` ids.
        other: ``[n]`` ids.

    Source: Hyyrö, "Bit-Parallel LCS-length Computation Revisited" (2004), section 4.
    """
    places: dict[int, int] = {}  # bit 0 is the last place: rows are of suffixes, so that the walk starts at the left
    for bit, token in enumerate(reversed(other)):
        places[token] = places.get(token, 0) | 1 << bit
    every = (1 << len(other)) - 1
    rows = [every]
    for token in reversed(sequence):
        row = rows[-1]
        hit = row & places.get(token, 0)
        rows.append(((row + hit) | (row - hit)) & every)
    rows.reverse()

    missing = len(other) - rows[0].bit_count()
    left = len(other)  # places of the other sequence behind the last match
    found = [False] * len(sequence)
    for i, token in enumerate(sequence):
        hit = places.get(token, 0) & ((1 << left) - 1)
        if not missing or not hit:
            continue
        behind = hit.bit_length() - 1  # the earliest of the matches leaves the most
        if behind - (rows[i + 1] & ((1 << behind) - 1)).bit_count() == missing - 1:
            found[i] = True
            left, missing = behind, missing - 1
    return found
