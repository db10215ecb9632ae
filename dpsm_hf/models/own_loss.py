"""What a model's own loss consists of, measured by calling the model on a few rows of the first batch.

`own_loss` finds out two things: which label a row of logits predicts, and whether the model adds something to the
cross-entropy of its tokens, such as the load balancing of experts. Models of Transformers 5 compute cross-entropy by
``self.loss_function``; if that returns zero during one call, the loss is exactly what the forward adds.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..rules.losses import IGNORE_INDEX
from ..runtime.distributed import process_number, sum_over_processes
from .language_model import (
    Alignment,
    align_targets,
    check_positions,
    core_model,
    inputs_without_labels,
    is_compiled,
    label_alignment,
    logits_in,
    loss_in,
    own_weights,
    remember_alignment,
    virtual_tokens,
    vocabulary_size,
)

logger = logging.get_logger(__name__)

# A batch with no other keys is text only and can be cut to a part of its length.
_TEXT = frozenset({"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"})
# Full logits are computed for at most this many tokens, if the batch can be cut.
_POSITIONS = 128

# Threads that replace something in one model take turns: each has to restore what it found.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def turn(core: nn.Module) -> threading.RLock:
    """Return the lock of a model, to be held while a function or method of it is replaced."""
    return _LOCKS.setdefault(core, threading.RLock())


# ---- the loss function of a model, replaced ------------------------------------------------------------------------


# where an instance keeps a loss function that was set: behind the property of PreTrainedModel, or in front of a method
_LOSS_ATTRIBUTES = ("_loss_function", "loss_function")


class LossReplacement:
    """A stand-in for a model's loss function that returns zero and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.keeps_logits = False  #: whether the logits of the last call are kept
        self.logits: Tensor | None = None
        self._thread: int | None = None
        self._original: Callable[..., Any] | None = None
        # made once: torch.compile would recompile for a new function object
        self._function = self._make()

    def _make(self) -> Callable[..., Any]:
        def no_loss(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                if self._thread not in (None, threading.get_ident()) and self._original is not None:
                    return self._original(*args, **kwargs)  # a call from another thread, which is to get its loss
                self.calls += 1
            given = (*args, *kwargs.values())
            like = next(value for value in given if isinstance(value, Tensor) and value.is_floating_point())
            if self.keeps_logits:
                self.logits = like
            return like.new_zeros((), dtype=torch.float32)

        return no_loss

    @contextlib.contextmanager
    def active(self, core: nn.Module, *, any_thread: bool = False) -> Iterator[LossReplacement]:
        """Replace the loss function of one model during a context, and restore it afterwards.

        Args:
            core: the language model without wrappers.
            any_thread: also replace it for calls from other threads, such as those of data parallelism.
        """
        with turn(core):
            own = vars(core)
            before = {name: own[name] for name in _LOSS_ATTRIBUTES if name in own}
            self.calls, self._thread = 0, None if any_thread else threading.get_ident()
            self._original = cast("Callable[..., Any]", core.loss_function)
            if isinstance(inspect.getattr_static(type(core), "loss_function", None), property):
                with contextlib.suppress(AttributeError):  # without a setter it stays, and no call is counted
                    core.loss_function = self._function  # type: ignore[assignment]
            else:  # a class with a method of this name
                own["loss_function"] = self._function
            try:
                yield self
            finally:
                self._original = None
                for name in _LOSS_ATTRIBUTES:
                    own.pop(name, None)
                own.update(before)


_REPLACEMENTS: weakref.WeakKeyDictionary[nn.Module, LossReplacement] = weakref.WeakKeyDictionary()


def replacement_of(core: nn.Module) -> LossReplacement:
    """Return the replacement for a model's loss function, the same object at every call."""
    return _REPLACEMENTS.setdefault(core, LossReplacement())


# ---- the result ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnLoss:
    """What a model's own loss consists of."""

    alignment: Alignment  #: which label a row of its logits predicts
    #: The forward calls ``self.loss_function`` exactly once; with that replaced, the model may be given labels.
    replaceable: bool = False
    #: The loss is more than the cross-entropy of the tokens, and that part cannot be had by the replacement.
    adds: bool = False
    #: The logits begin with positions that have no label, such as those of an image.
    leads: bool = False

    def code(self) -> int:
        """Return the number of this result, from 1 on, to send it to other processes."""
        return 1 + get_args(Alignment).index(self.alignment) + 2 * self.replaceable + 4 * self.adds + 8 * self.leads

    @classmethod
    def decoded(cls, code: int) -> OwnLoss:
        """Return the result with this number."""
        bits = code - 1
        return cls(get_args(Alignment)[bits & 1], bool(bits & 2), bool(bits & 4), bool(bits & 8))


_CODES = 17
_FAILED = 17

_KNOWN: dict[tuple[Any, ...], OwnLoss] = {}
_OF_INSTANCE: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], OwnLoss]] = weakref.WeakKeyDictionary()


def own_loss(model: nn.Module, inputs: Mapping[str, Any]) -> OwnLoss | None:
    """Return what a model's own loss consists of; measured on its first scored batch, then remembered.

    It is remembered by model class, configuration and the flags in the batch. Every process must call this, and all
    get the same result.

    Args:
        model: the trainer's; called without gradient and in evaluation mode, so that no random number is drawn.
        inputs: a batch with ``labels``.

    Returns:
        The result; None if no process has a scored label, or the logits are not finite.

    Raises:
        ValueError: if the model's loss is not the cross-entropy of its logits plus something that does not depend on
            the labels, or if processes get different results.
    """
    core = core_model(model)
    flags = tuple(sorted((key, value) for key, value in inputs.items() if isinstance(value, (bool, str))))
    kept = _OF_INSTANCE.setdefault(core, {})
    if flags in kept:
        return kept[flags]
    key = _class_key(model, core, flags)
    found = None if key is None else _KNOWN.get(key)
    if found is None:
        found = _measure_on_all_processes(model, inputs)
        if found is None:
            return None
        if key is not None:
            _KNOWN[key] = found
    kept[flags] = found
    remember_alignment(core, found.alignment)
    return found


def correct_own_loss(core: nn.Module, found: OwnLoss) -> None:
    """Replace what is remembered of a model whose loss in training turned out to differ from evaluation mode."""
    kept = _OF_INSTANCE.setdefault(core, {})
    for flags in kept:
        kept[flags] = found


def _class_key(model: nn.Module, core: nn.Module, flags: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the key by which models share a result; None if class and configuration do not determine the loss."""
    if not isinstance(core, PreTrainedModel):
        return None
    try:
        config = core.config.to_json_string(use_diff=False)
    except (TypeError, ValueError):  # a configuration that is not serialisable
        return None
    forward = vars(core).get("forward")
    own = getattr(forward, "__qualname__", type(forward).__name__)
    function = getattr(core.loss_function, "__func__", core.loss_function)  # a bound method would keep the model alive
    return type(core), type(core).forward, own, function, config, virtual_tokens(model), own_weights(model), flags


def _measure_on_all_processes(model: nn.Module, inputs: Mapping[str, Any]) -> OwnLoss | None:
    """Measure on every process and compare; a process without a scored label takes the result of the others."""
    found: OwnLoss | None = None
    failure: Exception | None = None
    try:
        found = _measure(model, inputs)
    except Exception as error:
        failure = error
    if process_number() > 1:
        mine = torch.zeros(_CODES + 1, device=inputs["labels"].device)
        mine[_FAILED if failure is not None else 0 if found is None else found.code()] = 1
        counts = sum_over_processes(mine)
        codes = [code for code in range(1, _CODES) if float(counts[code])]
        if failure is None and float(counts[_FAILED]):
            failure = ValueError(
                f"the loss of {type(core_model(model)).__name__} could not be determined on another process; see the "
                "error of that process."
            )
        if failure is None and len(codes) > 1:
            failure = ValueError(
                f"processes find different losses in {type(core_model(model)).__name__}: "
                f"{[OwnLoss.decoded(code) for code in codes]}. Give all of them the same model and kind of batch."
            )
        found = OwnLoss.decoded(codes[0]) if codes else None
    if failure is not None:
        raise failure
    return found


# ---- the measurement -----------------------------------------------------------------------------------------------


def _measure(model: nn.Module, inputs: Mapping[str, Any]) -> OwnLoss | None:
    core = core_model(model)
    vocabulary = vocabulary_size(model)
    labels = inputs["labels"]
    if vocabulary is not None:  # an invalid label is reported by the scorer; on a GPU it would crash the process here
        labels = labels.masked_fill((labels < 0) | (labels >= vocabulary), IGNORE_INDEX)
    kept = {key: value for key, value in inputs.items() if key not in ("shift_labels", "skip_logits")}
    whole = {**kept, "labels": labels}
    with _in_evaluation_mode(model):
        small = _part(core, whole)
        if small is not whole:
            try:
                return _LossMeasurement(model, core, small).result()
            except _UnlikeOwnLossError:
                raise
            except Exception as error:
                if _out_of_memory(error):
                    raise
                # cutting may break a batch: which row an image belongs to, for example, cannot be seen from its tensor
        return _LossMeasurement(model, core, whole).result()


class _UnlikeOwnLossError(ValueError):
    """The model's loss is not the cross-entropy of its logits."""


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


class _LossMeasurement:
    """The calls of a model that show what its loss consists of.

    Its loss is compared with the cross-entropy of its logits in both alignments, for all labels and for every other
    one: in the right alignment the difference is the same for both, since what the model adds does not depend on the
    labels. An untrained model's losses are all near log V, so both alignments can fit; then a batch whose only label
    is at the first position decides, for which an aligned model has a loss and a shifted one has none.
    """

    def __init__(self, model: nn.Module, core: nn.Module, batch: dict[str, Any]) -> None:
        self.model, self.core, self.batch, self.labels = model, core, batch, batch["labels"]

    def result(self) -> OwnLoss | None:
        labels, core = self.labels, self.core
        try:
            output = self.model(**self.batch)
            own, logits = loss_in(output), logits_in(output)
        except Exception as error:
            if not _out_of_memory(error):
                self._check_shapes()
            raise
        # made once, since the labels change below and the decoder inputs must not
        fed = inputs_without_labels(self.model, self.batch)
        replaceable, added = False, 0.0
        loss = None
        if isinstance(core, PreTrainedModel):
            replacement = LossReplacement()
            replacement.keeps_logits = True
            with replacement.active(core):
                output = self.model(**fed, labels=labels)
                loss, logits = loss_in(output), logits_in(output)
            replaceable = replacement.calls == 1
            scored_logits = replacement.logits
            if replaceable and logits is not None and scored_logits is not None and _has_hooks(self.model):
                # a hook may have changed the logits after the loss was computed; compare those that it came from
                logits = scored_logits if scored_logits.shape == logits.shape else logits
        if replaceable and loss is not None:
            added = float(loss.float().mean())
        else:
            try:
                logits = logits_in(self.model(**fed))
            except TypeError as error:  # a forward that requires labels
                raise self._unlike(own, {}, logits) from error
        scored = labels != IGNORE_INDEX
        every_other = labels.masked_fill(~scored | (scored.flatten().cumsum(0).view_as(scored) % 2 == 0), IGNORE_INDEX)
        first = torch.full_like(labels, IGNORE_INDEX)
        first[..., 0] = labels.flatten()[scored.flatten().to(torch.int8).argmax()]
        part, alone = (loss_in(self.model(**fed, labels=chosen)) for chosen in (every_other, first))
        if not bool(scored.any()):
            return None
        if own is None or part is None or logits is None:
            raise self._unlike(own, {}, logits)
        values = float(own.float().mean()), float(part.float().mean())
        tolerance = (2e-5 if _precise(self.core, own, logits) else 2e-2) * max(1.0, abs(values[0]))
        found: dict[Alignment, float] = {}
        fits: dict[Alignment, float] = {}
        for alignment in get_args(Alignment):
            entropies = [_cross_entropy(logits, chosen, alignment) for chosen in (labels, every_other)]
            if entropies[0] is None or entropies[1] is None:
                continue
            found[alignment] = entropies[0]
            rests = [value - entropy for value, entropy in zip(values, entropies, strict=True)]  # type: ignore[operator]
            expected = added if replaceable else rests[0]
            # if every other label leaves none to score, that loss is NaN, which must count as fitting
            if abs(rests[0] - expected) <= tolerance and not abs(rests[1] - expected) > tolerance:
                fits[alignment] = rests[0]
        if not fits and fed.keys() > self.batch.keys() - {"labels"} and math.isfinite(values[0]):
            given = loss_in(self.model(**fed, labels=labels))
            if given is not None and abs(float(given.float().mean()) - values[0]) > tolerance:
                raise self._other_decoder_inputs(values[0], float(given.float().mean()))
        if not fits:
            if not math.isfinite(values[0]) and not any(map(math.isfinite, found.values())):
                return None  # with NaN in the weights nothing can be compared; the NaN loss is reported elsewhere
            raise self._unlike(own, found, logits)
        if len(fits) > 1:
            rest = next(iter(fits.values()))
            has_loss = alone is not None and float(alone.float().mean()) - rest > tolerance  # False for NaN
            chosen_alignment: Alignment = "aligned" if has_loss else "shifted"
            fits = {chosen_alignment: fits[chosen_alignment]}
        [(alignment, rest)] = fits.items()
        leading = logits.shape[-2] - labels.shape[-1] - virtual_tokens(self.model)
        adds = not replaceable and (abs(rest) > tolerance or _routes(core, self.batch))
        return OwnLoss(alignment, replaceable, adds, leading > 0)

    def _check_shapes(self) -> None:
        """Raise a readable error if the model failed because its labels do not fit its logits."""
        logits = logits_in(self.model(**inputs_without_labels(self.model, self.batch)))
        if logits is not None and logits.dim() > 1:
            check_positions(self.model, self.labels, logits.shape[-2], leads=False)
            align_targets(self.labels, logits.shape[-2], "aligned")

    def _other_decoder_inputs(self, own: float, given: float) -> ValueError:
        return _UnlikeOwnLossError(
            f"{type(self.core).__name__} makes other decoder inputs from its labels than DPSM: its own loss on the "
            f"first batch is {own}, but {given} with decoder_input_ids that are the labels shifted to the right by "
            "one. Add decoder_input_ids and decoder_attention_mask to the batches "
            "(DataCollatorForSeq2Seq(tokenizer, model=model) adds the former for a model with "
            "prepare_decoder_input_ids_from_labels)."
        )

    def _unlike(self, own: Tensor | None, found: dict[Alignment, float], logits: Tensor | None) -> ValueError:
        name, value = type(self.core).__name__, None if own is None else float(own.float().mean())
        values = ", ".join(f"{alignment}: {entropy}" for alignment, entropy in found.items())
        if not values:
            shape = None if logits is None else tuple(logits.shape)
            values = f"logits {shape}, labels {tuple(self.labels.shape)}"
        if own_weights(self.model):
            return _UnlikeOwnLossError(
                f"PEFT's context-aware prompt tuning (CPT) weighs tokens, also of its prompt, by a loss of its own "
                f"({value} for {name} on the first batch), which has no place for a scoring rule. Take "
                "PromptTuningConfig or LoraConfig instead of CPTConfig, or train with transformers.Trainer."
            )
        known = label_alignment(self.model) is not None
        first = "computes another loss than DPSM" if known else "is not a language model that DPSM knows"
        remedy = (
            "transformers.Trainer trains it with its own loss."
            if known
            else "scoring_rule='ce' trains any model as Trainer does."
        )
        return _UnlikeOwnLossError(
            f"{name} {first}: its own loss on the first batch ({value}) is not the cross-entropy of its logits "
            f"against the labels (shifted by one or aligned: {values}), plus what does not depend on them. DPSM "
            f"scores tokens from logits [batch, length, vocabulary]; {remedy}"
        )


def _cross_entropy(logits: Tensor, labels: Tensor, alignment: Alignment) -> float | None:
    """Return the mean cross-entropy over the scored labels; None if the shapes do not fit."""
    if (
        logits.dim() != labels.dim() + 1
        or logits.shape[:-2] != labels.shape[:-1]
        or logits.shape[-2] < labels.shape[-1]
        or labels.is_floating_point()
    ):
        return None
    targets = align_targets(labels, logits.shape[-2], alignment)
    flat = logits.float().reshape(-1, logits.shape[-1])
    return float(F.cross_entropy(flat, targets.reshape(-1).to(flat.device), ignore_index=IGNORE_INDEX))


def _precise(core: nn.Module, *tensors: Tensor) -> bool:
    """Return whether a loss was computed in float32 or float64 throughout."""
    halves = (torch.float16, torch.bfloat16)
    dtypes = {tensor.dtype for tensor in tensors} | {getattr(core, "dtype", torch.float32)}
    return not dtypes & set(halves) and not torch.is_autocast_enabled(tensors[0].device.type)


def _has_hooks(model: nn.Module) -> bool:
    return bool(model._forward_hooks or core_model(model)._forward_hooks)


def _routes(core: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether the model adds the load balancing of its experts, which can be near zero in one batch."""
    asked = batch.get("output_router_logits")
    return bool(getattr(getattr(core, "config", None), "output_router_logits", False) if asked is None else asked)


@contextlib.contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context for calling a model without gradient, compilation or lasting effect.

    Afterwards the training mode, plain attributes (counters, for example) and the random state are as before.
    """
    # plain attributes too: some models change one in their forward, such as a router its capacity for a long text
    before = [(module, _plain_attributes(module)) for module in model.modules()]
    tensor = next(model.parameters(), None)
    device = None if tensor is None or tensor.device.type in ("cpu", "meta", "mps") else tensor.device
    stance: Any = torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()
    devices = [] if device is None else [device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device is None else device.type):
        model.eval()
        try:
            with torch.no_grad(), stance:
                yield
        finally:
            for module, attributes in before:
                for name, value in attributes.items():
                    if vars(module).get(name, value) != value:
                        vars(module)[name] = value


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes that are numbers, strings or flags, without Transformers' note of its hooks."""
    kept = (bool, int, float, str)
    return {k: v for k, v in vars(module).items() if isinstance(v, kept) and k != "_output_capturing_hooks_installed"}


def _part(core: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch cut to a few rows, and long text to a part of its length; uncut if it cannot be cut."""
    labels = batch["labels"]
    if labels.dim() < 2:
        return batch
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if any(not value.dim() or len(value) != len(labels) for value in tensors.values()):
        return batch
    if any(not isinstance(value, (bool, str, int, float, type(None), Tensor)) for value in batch.values()):
        return batch
    length = labels.shape[-1]
    scored = labels != IGNORE_INDEX
    rows = scored.flatten(1).sum(1).argsort(descending=True, stable=True)[: max(1, _POSITIONS // length)].sort().values
    cut = {key: value[rows] for key, value in tensors.items()}
    alike = all(value.dim() == 2 and value.shape[1] == length for value in tensors.values())
    if alike and tensors.keys() <= _TEXT and length > _POSITIONS:
        if not getattr(getattr(core, "config", None), "is_encoder_decoder", False):
            first = int(scored[rows].any(0).to(torch.int8).argmax())
            start = min(max(0, first - 1), length - _POSITIONS)
            cut = {key: value[:, start : start + _POSITIONS] for key, value in cut.items()}
    elif len(rows) == len(labels):
        return batch
    return {**batch, **cut}
