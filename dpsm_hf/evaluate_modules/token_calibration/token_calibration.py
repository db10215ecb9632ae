"""Calibration of predicted tokens or classes, as an `evaluate` module; the figures are those of `dpsm_hf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from dpsm_hf import calibration as dpsm_calibration
from dpsm_hf.calibration.metrics import equal_width_ece
from dpsm_hf.runtime.files import json_number

_DESCRIPTION = """
How well the confidence of a model in its predicted (top) label tells the share of places where that label is right:
expected calibration error over 10, 15 and 100 equal-width bins, over bins of equal mass, smooth and debiased, the
largest gap, the signed gap, and confidence intervals by resampling documents. The unit is a token, or any other thing
that a class was predicted for.
"""

_CITATION = """
@inproceedings{naeini2015obtaining,
  title = {Obtaining Well Calibrated Probabilities Using {B}ayesian Binning},
  author = {Naeini, Mahdi Pakdaman and Cooper, Gregory F. and Hauskrecht, Milos},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2015}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): the probability of the predicted label at each place, in [0, 1]. With
        config_name="probabilities": a list of the probabilities of all classes at each place.
    references (list of int): 1 where the predicted label is right, 0 where it is wrong. With
        config_name="probabilities": the class that is right. -100 marks places that do not count.
    documents (list of int): optional; the number of the document that each place belongs to, from 0 on. Intervals
        resample documents; without it each place is one. To give them batch by batch, load the module with
        config_name="documents" or "probabilities_documents"; otherwise `compute` takes them for all places at once.
    bins (int): adds `ece_<bins>`, and is the number of bins of the curve; a divisor of 3,000. 15 by default.
    intervals (bool): adds `intervals`, {metric: [low, high]}, None where a bound cannot be told. False by default.
    curve (bool): adds `curve`, the data of a reliability diagram, as plain lists. False by default.
    level (float): of confidence of the intervals. 0.95 by default.
    samples (int): resamples for the intervals. 300 by default.
    seed (int): of the resampling. 0 by default.
Options but the seed may be given to `evaluate.load` as well; those given to `compute` win.

Returns:
    dict: `ece_10`, `ece_15`, `ece_100`, each with `_null` (what a perfectly calibrated model would show at this
    size), `adaptive_ece`, `smooth_ece`, `debiased_ece`, `mce`, `signed_gap` (confidence - accuracy), `token_accuracy`,
    `confidence`, `reliability`, `resolution`, `uncertainty`, `top_label_brier`, `confidence_auroc`, `tokens`; with
    probabilities also `nll`, `perplexity`, `brier`, `spherical`, `entropy`, `label_probability`.

Raises:
    ValueError: for confidences outside [0, 1] or NaN, references that are neither 0 nor 1 (nor a class), rows of
    probabilities of different lengths or that do not add up to 1, no place that counts, or an unknown option.

Example:
    >>> module = evaluate.load(module_path("token_calibration"))
    >>> results = module.compute(predictions=[0.8] * 10, references=[1, 0] * 5)
    >>> round(results["ece_15"], 6)
    0.3
"""

_IGNORED = -100

_OPTIONS = {"bins": 15, "intervals": False, "curve": False, "level": 0.95, "samples": 300, "seed": 0}

_CONFIGS = ("default", "probabilities", "documents", "probabilities_documents")

# The sum of a row in bfloat16 (8 bits) is off by up to 0.4 %; rows of logits or percentages are off by far more.
_SUM_TOLERANCE = 0.01


class TokenCalibration(evaluate.Metric):
    """The metric; see `_KWARGS_DESCRIPTION` for what goes in and comes out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._given = {name: kwargs.pop(name) for name in _OPTIONS if name != "seed" and name in kwargs}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _CONFIGS:
            raise ValueError(f"config_name={self.config_name!r} is unknown; use one of {', '.join(_CONFIGS)}.")
        # float64 throughout: float32 would move confidences over the edges of bins, and an integer column would
        # silently turn a reference of 0.5 into 0
        number = datasets.Value("float64")
        features = {
            "predictions": datasets.List(number) if "probabilities" in self.config_name else number,
            "references": number,
        }
        if "documents" in self.config_name:
            features["documents"] = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
            license="Apache-2.0",
        )

    def _compute(
        self,
        *,
        predictions: Sequence[Any],
        references: Sequence[float],
        documents: Sequence[int] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        if unknown := set(options) - set(_OPTIONS):
            raise ValueError(f"unknown options {sorted(unknown)}; token_calibration knows {', '.join(_OPTIONS)}.")
        chosen = {**_OPTIONS, **self._given, **options}
        labels = np.array(references, dtype=np.float64)
        kept = np.flatnonzero(labels != _IGNORED)
        labels = labels[kept]
        if "probabilities" in self.config_name:
            columns = _scores([predictions[i] for i in kept.tolist()], labels, kept)
        else:
            columns = {"confidence": np.array(predictions, dtype=np.float64)[kept], "correct": labels}
            _check_confidences(columns["confidence"], labels, kept)
        if documents is not None:
            columns["document"] = _document_numbers(documents, len(references))[kept]
        calibration = dpsm_calibration.TokenCalibration()
        calibration.update(**columns)
        bins = chosen["bins"]
        results: dict[str, Any] = calibration.compute()
        results.setdefault(f"ece_{bins}", float(equal_width_ece(calibration.totals(), bins)))
        if chosen["intervals"]:
            found = calibration.intervals(level=chosen["level"], samples=chosen["samples"], seed=chosen["seed"])
            results["intervals"] = {name: [json_number(bound) for bound in pair] for name, pair in found.items()}
        if chosen["curve"]:
            results["curve"] = calibration.curve(bins).as_dict()
        return results


def _check_confidences(confidence: np.ndarray, correct: np.ndarray, places: np.ndarray) -> None:
    """Raise for the first place with an impossible confidence or reference."""
    if len(wrong := np.flatnonzero(~((confidence >= 0) & (confidence <= 1)))):
        raise ValueError(
            f"predictions[{places[wrong[0]]}]={confidence[wrong[0]]} lies outside [0, 1]: give the probability of "
            "the predicted label, after the softmax."
        )
    if len(wrong := np.flatnonzero((correct != 0) & (correct != 1))):
        raise ValueError(
            f"references[{places[wrong[0]]}]={correct[wrong[0]]:g} must be 1 where the predicted label is right, 0 "
            f"where it is wrong, {_IGNORED} where it does not count. If it is a class, load the module with "
            "config_name='probabilities' and give the probabilities of all classes."
        )


def _scores(rows: Sequence[Sequence[float] | None], labels: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns that `dpsm_hf.TokenCalibration.update` takes, from the probabilities of all classes.

    ``confidence = max_j p_j``; right where the label's probability is as large (a tie counts as right);
    ``nll = -log p_y``, ``brier = sum_j (p_j - [j = y])**2``, ``spherical = 1 - p_y / ||p||``,
    ``entropy = -sum_j p_j log p_j``. Rows ``[N][V]`` are used as they are: nothing is normalized. Messages name the
    place where a row stood in the input.
    """
    lengths = [len(row) if row is not None else 0 for row in rows]
    for i, length in enumerate(lengths):
        if length != lengths[0] or not length:
            raise ValueError(
                f"predictions[{places[i]}] holds {length} probabilities and predictions[{places[0]}] {lengths[0]}: "
                "each row must have one for each class."
            )
    p = np.array(rows, dtype=np.float64).reshape(len(rows), lengths[0] if lengths else 1)
    if len(outside := np.argwhere(~((p >= 0) & (p <= 1)))):
        row, column = outside[0]
        value = p[row, column]
        raise ValueError(f"predictions[{places[row]}] holds {value}, outside [0, 1]: give it after the softmax.")
    if len(wrong := np.flatnonzero(np.abs(p.sum(-1) - 1) > _SUM_TOLERANCE)):
        raise ValueError(
            f"predictions[{places[wrong[0]]}] adds up to {p[wrong[0]].sum():g}, not 1: give the probabilities of all "
            "classes, after the softmax."
        )
    classes = p.shape[1]
    if len(wrong := np.flatnonzero(~((labels >= 0) & (labels < classes) & (labels % 1 == 0)))):
        raise ValueError(
            f"references[{places[wrong[0]]}]={labels[wrong[0]]:g} is no class in [0, {classes}); places that do not "
            f"count carry {_IGNORED}."
        )
    each, y = np.arange(len(p)), labels.astype(np.int64)
    label_probability, confidence = p[each, y], p.max(-1)
    miss = p.copy()
    miss[each, y] -= 1
    with np.errstate(divide="ignore"):  # a label with probability 0 has an infinite NLL
        nll = 0.0 - np.log(label_probability)
    return {
        "confidence": confidence,
        "correct": (label_probability >= confidence).astype(np.int64),
        "nll": nll,
        "brier": np.square(miss).sum(-1),
        "spherical": 1 - label_probability / np.sqrt(np.square(p).sum(-1)),
        "entropy": -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1),
        "label_probability": label_probability,
    }


def _document_numbers(documents: Sequence[int | None], places: int) -> np.ndarray:
    """Return the numbers of the documents as int64 ``[places]``, one whole number from 0 on for each."""
    if len(documents) != places:
        raise ValueError(f"documents holds {len(documents)} numbers for {places} places; give one for each.")
    numbers = np.array(documents, dtype=np.float64)  # None becomes NaN
    if len(wrong := np.flatnonzero(~((numbers >= 0) & (numbers % 1 == 0)))):
        raise ValueError(f"documents[{wrong[0]}]={documents[wrong[0]]} must be a whole number from 0 on.")
    return np.array(documents, dtype=np.int64)
