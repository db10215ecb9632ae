"""Temperature scaling, the post-hoc baseline: one scalar, fitted on data neither trained nor tested on.

Source: Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017), section 4.2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..models.fingerprint import fingerprint
from ..models.language_model import core_model
from ..models.output_layer import added_bias, output_layer, post_ops
from ..rules.losses import IGNORE_INDEX
from ..runtime.files import write_json
from .temperature_search import (
    BrierSearch,
    GapSearch,
    Moments,
    MomentSums,
    NllSearch,
    Sums,
    UnfittableError,
    search,
)

logger = logging.get_logger(__name__)

FILE_NAME = "temperature.json"


@dataclass(frozen=True)
class TemperatureScaler:
    """Divide logits by a temperature.

    ``p = softmax(logits / temperature)``. What is most likely stays so; above 1 the probabilities become more equal.

    Args:
        temperature: positive; 1 changes nothing.
        nll_before: mean NLL of the tokens it was fitted on, in nats, at temperature 1; None if it was not fitted.
        nll_after: the same at this temperature.
        tokens: tokens it was fitted on.
        passes: passes over the data that the fit took.
        split: name of the data it was fitted on, for the reader of the file.
        temperature_brier: the one of least Brier score on the same tokens; None if it was not fitted.
        temperature_gap: the one at which their mean confidence is their accuracy; None if it was not fitted.
        left_out: why one of the last two is missing, in a sentence.

    Raises:
        ValueError: if a temperature is not positive and finite.

    Example::

        scaler = TemperatureScaler.fit(logits, labels)
        probabilities = scaler(test_logits).softmax(-1)
        scaler.save("out")
    """

    temperature: float = 1.0
    nll_before: float | None = None
    nll_after: float | None = None
    tokens: int = 0
    passes: int = 0
    split: str = ""
    temperature_brier: float | None = None
    temperature_gap: float | None = None
    left_out: str = ""

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_brier", "temperature_gap"):
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r} must be a positive number; 1 changes nothing.")

    @property
    def others(self) -> dict[str, float]:
        """Return the temperatures that were fitted by something else than NLL, by its name: ``brier``, ``gap``."""
        found = {"brier": self.temperature_brier, "gap": self.temperature_gap}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor, *, split: str = "") -> TemperatureScaler:
        """Fit on logits that are at hand.

        Args:
            logits: ``[..., V]``, any float dtype; scored in float32, or in float64 if they are.
            labels: ``[...]`` int64 in ``[0, V)``, or -100 for what does not count.
            split: name of the data.

        Raises:
            ValueError: if shapes disagree, a label lies outside the vocabulary, nothing is scored, a logit is NaN, or
                the NLL has no minimum between 0.01 and 100.
        """
        return cls.fit_batches(lambda: [(logits, labels)], split=split)

    @classmethod
    def fit_batches(
        cls, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], *, split: str = ""
    ) -> TemperatureScaler:
        """Fit on batches that are made anew for each of the few passes: ``(logits, labels)`` as `fit` takes them.

        Errors are those of `fit`.
        """

        def one_pass(wanted: Mapping[str, float]) -> Sums:
            sums = MomentSums(wanted)
            for logits, labels in batches():
                scored = _scored(logits, labels)
                sums.add(sums.extra(logits.reshape(-1, logits.shape[-1])[scored], labels.reshape(-1)[scored]))
            return sums.finish(torch.device("cpu"))

        return cls.fit_passes(one_pass, split=split)

    @classmethod
    def fit_passes(cls, passes: Callable[[Mapping[str, float]], Sums], *, split: str = "") -> TemperatureScaler:
        """Fit by NLL, and beside it by Brier score and by the gap between confidence and accuracy.

        The three searches share the passes over the data, about five. Errors are those of `fit`; where the Brier score
        has no minimum, or the gap no zero, that temperature is left out with a sentence in ``left_out``.

        Args:
            passes: makes one pass, see `temperature_search.search`.
            split: name of the data.
        """
        nll, brier, gap = NllSearch(), BrierSearch(), GapSearch()
        number = search(passes, nll, brier, gap)
        left_out = " ".join(one.failure for one in (brier, gap) if one.failure)
        return _fitted(nll, number, split, brier.temperature, gap.temperature, left_out)

    @classmethod
    def fit_moments(cls, moments: Callable[[float], Moments], *, split: str = "") -> TemperatureScaler:
        """Fit by NLL alone, from sums over the tokens at one temperature after the other.

        By Newton's method on log T. The NLL is convex in 1/T, so it has one minimum; a bracket around it, and a half
        step where the curvature by log T is not positive, make the method safe. Errors are those of `fit`.

        Args:
            moments: called with T, gives the sums there; one pass over the data each, about five in all.
            split: name of the data.
        """

        def one_pass(wanted: Mapping[str, float]) -> Sums:
            *sums, tokens = moments(wanted["nll"])
            return {"nll": sums}, int(tokens)

        nll = NllSearch()
        return _fitted(nll, search(one_pass, nll), split)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return ``logits / temperature``."""
        return logits / self.temperature

    # ---- keeping it ------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Write ``temperature.json`` into a folder, the model's for instance, and return its path."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json({"schema": 1, **asdict(self)}, path)
        return path

    @classmethod
    def load(cls, source: str | Path) -> TemperatureScaler:
        """Read what `save` wrote.

        Args:
            source: the file, or the folder it is in.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not such a file.
        """
        path = Path(source) / FILE_NAME if Path(source).is_dir() else Path(source)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("schema")
            return cls(temperature=content.pop("temperature"), **content)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no {path}; TemperatureScaler.save writes it.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a file of TemperatureScaler.save: {error}") from error

    def apply_to_generation_config(self, model: Any) -> None:
        """Let ``model.generate`` sample at this temperature: sets ``temperature`` and ``do_sample`` of its config.

        Greedy and beam search take what is most likely, which no temperature changes; so sampling is switched on.

        Raises:
            ValueError: if the model has no generation config.
        """
        config = getattr(core_model(model), "generation_config", None)
        if config is None:
            raise ValueError(f"{type(model).__name__} has no generation_config: it does not generate.")
        config.temperature, config.do_sample = float(self.temperature), True

    def fold_into(self, model: nn.Module) -> None:
        """Divide weight and bias of the output layer, so that the model's own logits are scaled; in place.

        The result is exact up to the rounding of the weights' dtype (a warning says so in 16 bits).

        Raises:
            ValueError: where it would change more than the temperature, or less: weights tied to the embeddings, a
                softcap behind the layer, a layer that is not linear (LoRA on it, quantised weights).
        """
        core = core_model(model)
        layer, name = output_layer(core), type(core).__name__
        kind, reason = type(layer), ""
        if layer is None or type(layer) is not nn.Linear:
            reason = f"its output layer is {kind.__module__}.{kind.__qualname__}, not a plain torch.nn.Linear"
        elif shared := _shared_with(core, layer):
            reason = f"its output weights are those of {shared} too (tie_word_embeddings)"
        elif post_ops(core).softcap is not None:
            reason = "it caps its logits behind the layer"
        elif not layer.weight.is_floating_point() or layer.weight.element_size() < 2:
            reason = f"its weights are {layer.weight.dtype}"
        if reason:
            raise ValueError(
                f"the temperature cannot be folded into {name}: {reason}. Use apply_to_generation_config, or keep "
                f"{FILE_NAME} beside the model and divide its logits."
            )
        assert isinstance(layer, nn.Linear)
        if layer.weight.element_size() == 2:
            logger.warning(f"the weights of {name} are {layer.weight.dtype}: folded, they are rounded once more.")
        with torch.no_grad():
            for values in (layer.weight, layer.bias, added_bias(core)):
                if values is not None:
                    values.div_(self.temperature)


def _fitted(
    nll: NllSearch, passes: int, split: str, brier: float | None = None, gap: float | None = None, left_out: str = ""
) -> TemperatureScaler:
    assert nll.temperature is not None  # it raises where nothing is found
    return TemperatureScaler(nll.temperature, nll.before, nll.after, nll.tokens, passes, split, brier, gap, left_out)


class FittedTemperature:
    """The temperature of a model, for as long as its weights stay what they were when it was fitted."""

    def __init__(self) -> None:
        self._fitted: tuple[Any, TemperatureScaler | None] | None = None

    def keep(self, model: nn.Module, scaler: TemperatureScaler | None) -> None:
        """Keep the temperature of a model as it is now; None if there is no best one for these weights."""
        self._fitted = (fingerprint(model), scaler)

    def forget(self) -> None:
        """Forget it: the weights change, or the data it is fitted on."""
        self._fitted = None

    def _known(self, model: nn.Module) -> bool:
        return self._fitted is not None and self._fitted[0] == fingerprint(model)

    def of(self, model: nn.Module) -> TemperatureScaler | None:
        """Return the temperature for the weights as they are now; None if there is none."""
        return self._fitted[1] if self._fitted is not None and self._known(model) else None

    def fit_if_possible(self, model: nn.Module, fit: Callable[[], object]) -> None:
        """Fit once for the weights as they are, and keep None, with a warning, where no temperature is best."""
        if not self._known(model):
            try:
                fit()
            except UnfittableError as error:
                self.keep(model, None)
                logger.warning(f"no temperature was fitted, and no metric is reported after scaling: {error}")


def _shared_with(model: nn.Module, layer: nn.Module) -> str:
    """Return the name of another parameter that lies where one of the layer's does; empty if there is none."""
    own = {id(module) for module in layer.modules()}
    places = {values.data_ptr() for values in layer.parameters()}
    for name, module in model.named_modules():
        for part, values in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(module) not in own and values.data_ptr() in places:
                return f"{name}.{part}".lstrip(".")
    return ""


def _scored(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which labels count, flattened, after looking at shapes and range."""
    if logits.dim() < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected [..., V] and [...]."
        )
    flat = labels.reshape(-1)
    scored = flat != IGNORE_INDEX
    wrong = scored & ((flat < 0) | (flat >= logits.shape[-1]))
    if bool(wrong.any()):
        raise ValueError(
            f"label {int(flat[wrong][0])} lies outside [0, {logits.shape[-1]}), the vocabulary of the logits; tokens "
            f"that do not count carry {IGNORE_INDEX}."
        )
    return scored
