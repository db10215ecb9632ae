"""Diversity of generated texts by distinct n-grams, as an `evaluate` module that does not import `dpsm_hf`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Distinct-n: how many different n-grams generated texts hold, for each word that they hold. Low values tell that a
model repeats itself, within a text or from one text to the next.
"""

_CITATION = """
@inproceedings{li2016diversity,
  title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
  author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle = {Proceedings of NAACL-HLT},
  year = {2016}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the texts; an empty one is allowed.
    n (int or list of int): lengths of the n-grams. 1, 2 and 3 by default.
    divide_by (str): "words", as Li et al. (2016) define it (default), or "ngrams", the number of all n-grams, as much
        published code does; the two agree for n = 1.
    lowercase (bool): whether to lower-case texts before they are cut into words. False by default.
    tokenizer (callable): from a text to a list of words. Splits at white space by default.
Options may be given to `evaluate.load` as well; those given to `compute` win.

Returns:
    dict: for each n `distinct_<n>` (over all texts together) and `distinct_<n>_mean` (mean over texts of the same
    ratio within each, leaving out those without a word, or without an n-gram if divided by these), NaN where nothing
    can be divided by; and `texts`, `empty_texts`, `words`.

Raises:
    ValueError: if there is no text, an element is not text, or an option cannot be.

Example:
    >>> module = evaluate.load(module_path("distinct_n"))
    >>> results = module.compute(predictions=["a b a b", "a b c"])
    >>> round(results["distinct_1"], 4), round(results["distinct_2"], 4)
    (0.4286, 0.4286)
"""

_OPTIONS = {"n": (1, 2, 3), "divide_by": "words", "lowercase": False, "tokenizer": None}


class DistinctN(evaluate.Metric):
    """The metric; see `_KWARGS_DESCRIPTION` for what goes in and comes out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._given = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name != "default":
            raise ValueError(f"config_name={self.config_name!r} is unknown; distinct_n has the default one only.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            license="Apache-2.0",
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of texts; references are ignored (`evaluate.combine` passes them to every module)."""
        # evaluate would treat one text as a list of letters, and turn numbers and None into words
        if isinstance(predictions, str):
            raise ValueError("predictions must be a list of texts, not one text: wrap it in a list.")
        for i, text in enumerate(() if predictions is None else predictions):
            if not isinstance(text, str):
                raise ValueError(f"predictions[{i}]={text!r} is not text; decode token ids and replace None by ''.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, *, predictions: Sequence[str], **options: Any) -> dict[str, float]:
        if unknown := set(options) - set(_OPTIONS):
            raise ValueError(f"unknown options {sorted(unknown)}; distinct_n knows {', '.join(_OPTIONS)}.")
        return distinct_n(predictions, **{**_OPTIONS, **self._given, **options})


def distinct_n(
    texts: Sequence[str],
    n: int | Sequence[int] = (1, 2, 3),
    *,
    divide_by: str = "words",
    lowercase: bool = False,
    tokenizer: Callable[[str], Sequence[str]] | None = None,
) -> dict[str, float]:
    """Return the share of distinct n-grams, over all texts together and as a mean over texts.

    Over all texts, ``|union_i G_n(i)| / sum_i D(i)``; the mean over texts is that of ``|G_n(i)| / D(i)`` where
    ``D(i) > 0``. ``G_n(i)`` is the set of n-grams of text i (no n-gram spans two texts), and ``D(i)`` is its number of
    words ``w_i``, or, with ``divide_by="ngrams"``, its number of n-grams ``max(0, w_i - n + 1)``. NaN where no text
    has ``D(i) > 0``. The value over all texts falls with more or longer texts: compare equal amounts. Arguments,
    results and errors are those of `_KWARGS_DESCRIPTION`.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016), section 5,
    which scales by the number of generated words.
    """
    orders: list[Any] = list(n) if isinstance(n, (list, tuple, range)) else [n]
    if not orders or not all(type(order) is int and order >= 1 for order in orders):
        raise ValueError(f"n={n!r} must be a whole number from 1 on, or a list of them.")
    if divide_by not in ("words", "ngrams"):
        raise ValueError(f"divide_by={divide_by!r} must be 'words' or 'ngrams'.")
    if not len(texts):
        raise ValueError("distinct_n got no texts: the set to score is empty.")
    cut = str.split if tokenizer is None else tokenizer
    words = [list(cut(text.lower() if lowercase else text)) for text in texts]
    results: dict[str, float] = {}
    for order in orders:
        sets = [{tuple(text[i : i + order]) for i in range(len(text) - order + 1)} for text in words]
        sizes = [len(text) if divide_by == "words" else max(0, len(text) - order + 1) for text in words]
        ratios = [len(grams) / size for grams, size in zip(sets, sizes, strict=True) if size]
        results[f"distinct_{order}"] = len(set().union(*sets)) / sum(sizes) if any(sizes) else math.nan
        results[f"distinct_{order}_mean"] = math.fsum(ratios) / len(ratios) if ratios else math.nan
    results["texts"] = len(words)
    results["empty_texts"] = sum(not text for text in words)
    results["words"] = sum(map(len, words))
    return results
