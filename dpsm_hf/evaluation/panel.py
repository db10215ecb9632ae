"""From the scores of evaluation batches to everything that is reported of a set: metrics, intervals, curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration import (
    METRICS,
    ClassCalibration,
    FrequencyCalibration,
    TokenCalibration,
    bare_name,
    lower_is_better,
)
from ..rules.extra_statistics import ExtraStatistics
from ..rules.losses import TokenScores
from ..runtime.distributed import process_index, process_number, real_rows
from ..runtime.files import strict
from .depth import DepthTally
from .forced_tokens import forced_labels
from .generation import GENERATED_METRICS, GeneratedCalibration
from .token_frequency import BUCKETS, TokenFrequency

#: What a row of the head's statistics tells of a token, beside confidence and correct.
ROW_SCORES = ("nll", "brier", "spherical", "entropy", "varentropy")

#: Metrics whose confidence interval is reported among the metrics too, as ``<name>_low`` and ``<name>_high``.
WITH_INTERVAL = ("nll", "perplexity", "brier", "ece_15")

#: Metrics that a log shows unless all are asked for; after temperature scaling also as ``<name>_scaled``.
CORE_METRICS = ("nll", "perplexity", "brier", "ece_15", "signed_gap", "token_accuracy")

#: Figures of options that are off by default: who turns them on wants to see them.
_ASKED_FOR = ("temperature", "classwise_ece", "expected_depth")

#: Metrics of the tokens whose label ends a text (``eos_<name>``), and of those it is made to begin with (``forced_``).
OF_EOS = ("tokens", "nll", "brier", "label_probability", "token_accuracy", "confidence", "signed_gap", "ece_15")

# Ends of the names of metrics of which more is better; of the others either less is, or neither.
_MORE_IS_BETTER = ("accuracy", "label_probability", "resolution", "auroc", "supported", "quality", "rank_correlation")

#: Not reported a second time after temperature scaling, which leaves them as they are.
_UNSCALED = ("tokens", "token_accuracy", "uncertainty", "label_bytes")

#: What temperatures are fitted by beside NLL, and what is reported after scaling by them, ``<name>_scaled_by_<it>``.
OTHER_FITS = ("brier", "gap")
OF_OTHER_FITS = ("nll", "brier", "ece_15")

_CONFLICT = (
    "No temperature can help both: confidence is {confidence} the accuracy (signed_gap {gap:+.4f}, 95 % interval "
    "{gap_low:+.4f} to {gap_high:+.4f}), which asks for a temperature {asks} 1, while the labels are {labels} likely "
    "than the model expects (nll_entropy_gap {excess:+.4f}, {excess_low:+.4f} to {excess_high:+.4f}), which asks for "
    "one {wants} 1. The head of the distribution and its tail are wrong in opposite ways."
)


class EvaluationPanel:
    """Collect what one evaluation sees, in fixed memory: all scored tokens, and apart from them some views of them.

    Args:
        eos_tokens: ids of the tokens that end a text; those labels are counted among all and once more alone.
        byte_lengths: int64 ``[V]``, bytes of text of each token (`token_bytes`), for bits per byte.
        temperature: also score every token from its logits divided by this.
        other_temperatures: those that were fitted by something else than NLL, by its name of `OTHER_FITS`.
        left_out: why one of these is missing, in a sentence.
        classes: ids of the tokens whose class-wise calibration is wanted.
        layers: of the decoder, where the depth of its tokens is to be counted.
        forced_tokens: ids of the tokens that a text is made to begin with; those labels are counted alone and not
            among all. None counts them like any other.
        frequency: buckets of tokens, to compare the probability that they get with how often they are labels.
    """

    def __init__(
        self,
        *,
        eos_tokens: Sequence[int] = (),
        byte_lengths: Tensor | None = None,
        temperature: float | None = None,
        classes: Tensor | None = None,
        layers: int | None = None,
        forced_tokens: Sequence[int] | None = None,
        other_temperatures: Mapping[str, float] | None = None,
        left_out: str = "",
        frequency: TokenFrequency | None = None,
    ) -> None:
        self.tokens = TokenCalibration()
        self.forced = None if forced_tokens is None else TokenCalibration()
        self.eos = TokenCalibration() if eos_tokens else None
        self.scaled = None if temperature is None else TokenCalibration()
        self.other_temperatures = dict(other_temperatures or {})
        self.left_out = left_out
        #: After scaling by each of the other temperatures.
        self.rescaled = {name: TokenCalibration() for name in self.other_temperatures}
        self.frequency = None if frequency is None else FrequencyCalibration(BUCKETS)
        self._buckets = frequency
        self.classwise = None if classes is None else ClassCalibration(classes)
        self.depth = None if layers is None else DepthTally(layers)
        #: What was generated, over all processes; set when the evaluation ends.
        self.generated: GeneratedCalibration | None = None
        self.temperature = temperature
        self._eos_tokens = torch.tensor(list(eos_tokens), dtype=torch.int64)
        self._forced_tokens = torch.tensor(list(forced_tokens or ()), dtype=torch.int64)
        self._byte_lengths = byte_lengths
        temperatures = (() if temperature is None else (temperature,)) + tuple(self.other_temperatures.values())
        wanted = bool(temperatures) or classes is not None or frequency is not None
        #: What the head is to compute of each token beside the usual statistics.
        self.extra = (
            ExtraStatistics(
                temperatures=temperatures,
                classes=classes,
                groups=None if frequency is None else frequency.buckets,
                number_of_groups=0 if frequency is None else BUCKETS,
            )
            if wanted
            else None
        )
        #: How many samples were seen, with and without a scored token, those that fill up a batch too.
        self.samples = 0
        self._intervals: Mapping[str, tuple[float, float]] | None = None
        self._metrics: dict[str, float] | None = None
        self._computed: dict[str, dict[str, float]] = {}

    def add(self, scores: TokenScores, targets: Tensor, batch_size: int, depths: Tensor | None = None) -> None:
        """Add the scored tokens of this process's batch, without the rows that only fill up the last batch.

        A sample is a document. Its number is its place in the data set, on any number of processes.

        Args:
            scores: of the batch, flattened to ``[batch_size * length]``.
            targets: the labels they were scored against, with as many elements.
            batch_size: rows of this process's batch.
            depths: of the scored tokens, in their order, where they are counted.

        Raises:
            FloatingPointError: if the logits of a scored token are NaN or infinite, with its place in the batch.
        """
        check_finite(scores, batch_size)
        self._forget()
        device = scores.scored.device
        first = self.samples + process_index() * batch_size
        self.samples += process_number() * batch_size
        numbers = torch.arange(first, first + batch_size, device=device)
        document = numbers.repeat_interleave(scores.scored.numel() // max(1, batch_size))
        mask = real_tokens(scores, batch_size)
        targets = targets.reshape(-1).to(device)
        rows: dict[str, Any] = {name: getattr(scores, name) for name in ("confidence", "correct", *ROW_SCORES)}
        rows = {name: column for name, column in rows.items() if column is not None}
        if self._byte_lengths is not None:
            rows["label_bytes"] = self._bytes_of(targets)
        if self.forced is not None:
            forced = mask & forced_labels(targets.view(batch_size, -1), self._forced_tokens).flatten()
            self.forced.update(**rows, mask=forced, document=document)
            mask = mask & ~forced
        self.tokens.update(**rows, mask=mask, document=document)
        if self.eos is not None:
            ends = mask & torch.isin(targets, self._eos_tokens.to(device))
            self.eos.update(**rows, mask=ends, document=document)
        if self.extra is not None and scores.extra is not None:
            columns = self.extra.split(scores.extra)
            scaled = list(columns.scaled)
            if self.scaled is not None:
                of_nll = scaled.pop(0)
                if "label_bytes" in rows:
                    of_nll["label_bytes"] = rows["label_bytes"]
                self.scaled.update(**of_nll, mask=mask, document=document)
            for view, figures in zip(self.rescaled.values(), scaled, strict=True):
                view.update(**figures, mask=mask, document=document)
            if self.classwise is not None and columns.classes is not None:
                self.classwise.update(columns.classes[mask], targets[mask], document[mask])
            if self.frequency is not None and self._buckets is not None and columns.groups is not None:
                self.frequency.update(
                    columns.groups[mask], self._buckets.of(targets[mask]), (-scores.nll[mask]).exp(), document[mask]
                )
        if self.depth is not None and depths is not None:
            real = mask[scores.scored]
            self.depth.update(depths.to(device)[real], document[scores.scored][real])

    def _bytes_of(self, targets: Tensor) -> Tensor:
        assert self._byte_lengths is not None
        lengths = self._byte_lengths = self._byte_lengths.to(targets.device)
        known = (targets >= 0) & (targets < len(lengths))  # a model may have more rows than its tokenizer has tokens
        return torch.where(known, lengths[targets.clamp(0, len(lengths) - 1)], 0)

    def reduce(self, function: Callable[[Tensor], Tensor], device: torch.device) -> EvaluationPanel:
        """Join the panels of all processes: replace every tensor by ``function`` of it, on that device."""
        self._forget()
        for name in ("tokens", "eos", "forced", "scaled", "classwise", "depth", "frequency"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part.to(device).reduce(function))
        self.rescaled = {name: part.to(device).reduce(function) for name, part in self.rescaled.items()}
        return self

    def metrics(self) -> dict[str, float]:
        """Return every metric of the evaluation, without prefix; empty if no token was scored.

        The intervals among them take a tenth of a second at the first call.
        """
        if self._metrics is None:
            self._metrics = self._figures(intervals=True) if self.tokens.tokens else {}
        return dict(self._metrics)

    def core_metrics(self, also: Collection[str] = ()) -> dict[str, float]:
        """Return those of `metrics` that a log shows: `CORE_METRICS` and their scaled forms, and what was asked for.

        Nothing is resampled unless a bound of an interval is wanted.

        Args:
            also: names of further metrics.
        """
        if not self.tokens.tokens:
            return {}
        wanted = {*CORE_METRICS, *(f"{name}_scaled" for name in CORE_METRICS), *_ASKED_FOR, *also}
        resampled = any(name.endswith(("_low", "_high")) or name in GENERATED_METRICS for name in also)
        found = self.metrics() if resampled else self._figures(intervals=False)
        return {name: value for name, value in found.items() if name in wanted}

    def _forget(self) -> None:
        self._intervals = self._metrics = None
        self._computed = {}

    def _of(self, view: str) -> dict[str, float]:
        """Return the metrics of ``tokens``, ``eos``, ``forced`` or ``scaled``; the log and the file share them."""
        if view not in self._computed:
            self._computed[view] = getattr(self, view).compute()
        return self._computed[view]

    def _figures(self, *, intervals: bool) -> dict[str, float]:
        found = dict(self._of("tokens"))
        for name in WITH_INTERVAL if intervals else ():
            low, high = self.intervals.get(name, (math.nan, math.nan))
            if math.isfinite(low) and math.isfinite(high):
                found |= {f"{name}_low": low, f"{name}_high": high}
        if intervals and (conflict := self._conflict()) is not None:
            found["temperature_conflict"] = float(bool(conflict))
        for part, view in (("eos", self.eos), ("forced", self.forced)):
            if view is not None and view.tokens:
                figures = self._of(part)
                found |= {f"{part}_{name}": figures[name] for name in OF_EOS if name in figures}
        if self.temperature is not None and self.scaled is not None:
            found["temperature"] = self.temperature
            scaled = self._of("scaled")
            found |= {f"{name}_scaled": value for name, value in scaled.items() if name not in _UNSCALED}
        for name, at in self.other_temperatures.items():
            found[f"temperature_{name}"] = at
            found |= {f"{metric}_scaled_by_{name}": value for metric, value in self._after(name).items()}
        if self.classwise is not None:
            found["classwise_ece"] = self.classwise.ece
        if self.depth is not None:
            found["expected_depth"] = self.depth.mean
            if intervals:
                found["expected_depth_low"], found["expected_depth_high"] = self.depth.interval()
        if self.generated is not None and intervals:  # those have intervals of their own
            found |= self.generated.metrics()
        # where nothing can be ranked there is no AUROC: better no entry than a NaN in every log
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _after(self, fit: str) -> dict[str, float]:
        """Return the metrics after scaling by the temperature that was fitted so."""
        if fit not in self._computed:
            self._computed[fit] = self.rescaled[fit].compute()
        return {name: self._computed[fit][name] for name in OF_OTHER_FITS if name in self._computed[fit]}

    def _conflict(self) -> str | None:
        """Return in a sentence why no temperature helps both confidence and NLL; empty where one may.

        The signed gap and the NLL less the entropy then have opposite signs, each beyond its interval. None where an
        interval is missing.
        """
        bounds = [self.intervals.get(name, (math.nan, math.nan)) for name in ("signed_gap", "nll_entropy_gap")]
        if not all(math.isfinite(bound) for interval in bounds for bound in interval):
            return None
        (gap_low, gap_high), (low, high) = bounds
        over = gap_low > 0 and high < 0
        if not (over or (gap_high < 0 and low > 0)):
            return ""
        figures = self._of("tokens")
        return _CONFLICT.format(
            confidence="above" if over else "below", asks="above" if over else "below",
            labels="more" if over else "less", wants="below" if over else "above", gap=figures["signed_gap"],
            gap_low=gap_low, gap_high=gap_high, excess=figures["nll_entropy_gap"], excess_low=low, excess_high=high,
        )  # fmt: skip

    @property
    def temperature_conflict(self) -> str:
        """Return in a sentence why no temperature helps both confidence and NLL; empty where that cannot be said."""
        return self._conflict() or ""

    @property
    def intervals(self) -> Mapping[str, tuple[float, float]]:
        """Return the confidence intervals of the metrics of all tokens."""
        if self._intervals is None:  # a second or so: it is asked for by the log and by the record
            self._intervals = self.tokens.intervals()
        return self._intervals

    def record(self, bins: int) -> dict[str, Any]:
        """Return what a calibration file holds: metrics, intervals and curves of every view, as JSON can hold them.

        ``reported`` has all of `metrics` by name. Of the tokens that end or begin a text there are no intervals; those
        are few, and `TokenCalibration.intervals` of ``eos`` or ``forced`` has them.
        """
        found: dict[str, Any] = {"tokens": self.tokens.tokens, **self._view("tokens", bins, self.intervals)}
        found["reported"] = strict(self.metrics())
        if conflict := self.temperature_conflict:
            found["temperature_conflict"] = conflict
        for part, view in (("eos", self.eos), ("forced", self.forced)):
            if view is not None and view.tokens:
                found[part] = self._view(part, bins)
        if self.scaled is not None and self.temperature is not None:
            found["temperature"] = self.temperature
            found["scaled"] = self._view("scaled", bins, self.scaled.intervals())
        if self.other_temperatures or self.left_out:
            others: dict[str, Any] = {
                name: {"temperature": at, **strict(self._after(name))} for name, at in self.other_temperatures.items()
            }
            found["other_temperatures"] = {**others, **({"left_out": self.left_out} if self.left_out else {})}
        if self.classwise is not None:
            found["classwise"] = self.classwise.as_dict()
        if self.depth is not None:
            found["expected_depth"] = self.depth.as_dict()
        if self.frequency is not None and self._buckets is not None:
            found["frequency"] = self._buckets.record(self.frequency.as_list())
        if self.generated is not None:
            found["generated"] = self.generated.record(bins)
        return found

    def _view(
        self, view: str, bins: int, intervals: Mapping[str, tuple[float, float]] | None = None
    ) -> dict[str, Any]:
        figures: dict[str, Any] = {"metrics": self._of(view)}
        if intervals is not None:
            figures["intervals"] = intervals
        return {**strict(figures), "curve": getattr(self, view).curve(bins).as_dict()}  # a perplexity may be infinite


def names_in(metric: str) -> set[str]:
    """Return the metrics that a name with a prefix may mean: of ``eval_wiki_debiased_ece`` ``{"debiased_ece"}``."""
    return {name for name in reported_names() if f"_{metric}".endswith(f"_{name}")}


def reported_names() -> tuple[str, ...]:
    """Return every name that `EvaluationPanel.metrics` may report."""
    return (
        *METRICS,
        *(f"{name}_{end}" for name in WITH_INTERVAL for end in ("low", "high")),
        *(f"{part}_{name}" for part in ("eos", "forced") for name in OF_EOS),
        *(f"{name}_scaled" for name in METRICS),
        "temperature",
        "temperature_conflict",
        *(f"temperature_{fit}" for fit in OTHER_FITS),
        *(f"{name}_scaled_by_{fit}" for fit in OTHER_FITS for name in OF_OTHER_FITS),
        "classwise_ece",
        *(f"expected_depth{end}" for end in ("", "_low", "_high")),
        *GENERATED_METRICS,
    )


def better_direction(name: str) -> str | None:
    """Return which is better of a metric, ``"lower"`` or ``"higher"``; None where neither is (`signed_gap`, say)."""
    if lower_is_better(name):
        return "lower"
    return "higher" if bare_name(name).endswith(_MORE_IS_BETTER) else None


def real_tokens(scores: TokenScores, batch_size: int) -> Tensor:
    """Return which tokens are scored and not of a row that only fills up the last batch, bool ``[N]``."""
    length = scores.scored.numel() // max(1, batch_size)
    return scores.scored & real_rows(batch_size, scores.scored.device).repeat_interleave(length)


def check_finite(scores: TokenScores, batch_size: int) -> None:
    """Raise unless every scored token has finite logits.

    Raises:
        FloatingPointError: with the place of the first in the batch.
    """
    broken = (scores.scored & torch.isnan(scores.confidence)).nonzero()
    if len(broken):
        sample, position = divmod(int(broken[0]), scores.scored.numel() // batch_size)
        raise FloatingPointError(
            f"the logits of {len(broken)} scored tokens are NaN or infinite, first in sample {sample} of the "
            f"evaluation batch at position {position}. The model's weights are broken or it overflows in this dtype."
        )
