"""Text-overlap and text-similarity scores of generated summaries: ROUGE, BERTScore and lengths.

ROUGE comes straight from the `rouge-score` package (the one behind `evaluate.load("rouge")`, which would need the
network) and BERTScore from `bert-score`. Nothing here knows about trainers or models under training. Sentences, see
`split_sentences`, matter to rougeLsum only.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

Reference = str | Sequence[str]

# A full stop after one of these does not end a sentence. Compared in lower case, without the stop.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr gen col sgt capt lt rep sen gov vs e.g i.e cf al approx no fig eq vol ch sec pp "
    "inc ltd co corp dept est jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k u.n a.m p.m".split()
)
# A terminator, the closing quotes or brackets that belong to it, white space, then what can open a sentence.
_BOUNDARY = re.compile(r"""([.!?]+)(["'”’)\]]*)\s+(?=["'“‘(\[]*[A-Z0-9])""")
_LAST_WORD = re.compile(r"([\w.]+)$")
_SCORABLE = re.compile(r"[a-z0-9]", re.IGNORECASE)


@functools.lru_cache(maxsize=1)
def _punkt_tokenizer() -> Callable[[str], list[str]] | None:
    """Return punkt's sentence splitter, or None where its data are not installed (it is never downloaded)."""
    try:
        from nltk.tokenize import PunktTokenizer  # type: ignore[import-untyped]

        return PunktTokenizer("english").tokenize
    except (ImportError, LookupError, OSError):
        return None


def sentence_splitter_name() -> str:
    """Name the splitter used for texts without newlines on this machine, for a report: "nltk punkt" or "rules"."""
    return "rules" if _punkt_tokenizer() is None else "nltk punkt"


def split_by_rules(text: str) -> list[str]:
    """Split English prose into sentences by punctuation alone.

    A sentence ends at a run of `.`, `!` or `?` (with any closing quotes or brackets) that is followed by white space
    and an upper-case letter or a digit, unless the word before a single full stop is a known abbreviation ("Dr.",
    "e.g.", "U.S.", month names ...) or a single letter (an initial). Sentences are stripped, and none is empty.
    """
    sentences: list[str] = []
    start = 0
    for boundary in _BOUNDARY.finditer(text):
        if boundary.group(1) == ".":
            found = _LAST_WORD.search(text[start : boundary.start()])
            word = "" if found is None else found.group(1)
            if (len(word) == 1 and word.isalpha()) or word.lower() in _ABBREVIATIONS:
                continue
        sentences.append(text[start : boundary.end()].strip())
        start = boundary.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def split_sentences(text: str) -> list[str]:
    """Split a text into the sentences that rougeLsum compares.

    Newlines in the text decide when there are any (CNN/DailyMail highlights carry them, and PEGASUS writes them as
    `<n>`); otherwise nltk's punkt when installed; otherwise `split_by_rules`. Sentences are stripped, none is empty.
    """
    text = text.replace("<n>", "\n").strip()
    pieces = text.split("\n") if "\n" in text else (_punkt_tokenizer() or split_by_rules)(text)
    return [piece.strip() for piece in pieces if piece.strip()]


def rouge_scores(
    predictions: Sequence[str], references: Sequence[Reference], *, use_stemmer: bool = True
) -> dict[str, float]:
    """Return ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum of predictions against references.

    Each value is 100 times the mean over samples of the F-measure 2PR/(P+R). `rougeL` takes each text as one sequence
    (the figure on Hugging Face model cards); `rougeLsum` takes the union of longest common subsequences over
    newline-separated sentences (the "ROUGE-L" of the CNN/DailyMail papers), split by `split_sentences`.
    A sample with several references scores its best one, chosen per ROUGE type by F-measure.
    An empty prediction scores 0. rouge-score compares lower-cased `[a-z0-9]+` words only, so text in other
    scripts scores 0: a warning says how many references are affected.

    Args:
        predictions: N generated texts.
        references: N reference texts, or N non-empty lists of them.
        use_stemmer: Compare Porter stems instead of words (words of more than three letters).

    Returns:
        `{"rouge1": ..., "rouge2": ..., "rougeL": ..., "rougeLsum": ...}`, each in [0, 100].

    Raises:
        ValueError: If there is no sample, the lengths differ, or a sample has no reference.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    from rouge_score.rouge_scorer import RougeScorer

    groups = _check_pairs("rouge_scores", predictions, references)
    unscorable = sum(not any(_SCORABLE.search(reference) for reference in group) for group in groups)
    if unscorable:
        reason = "hold no letter a-z and no digit; rouge-score sees no words there and scores them 0."
        logger.warning("%d of %d references %s", unscorable, len(groups), reason)
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=use_stemmer)
    totals = dict.fromkeys(ROUGE_TYPES, 0.0)
    for prediction, group in zip(predictions, groups, strict=True):
        # Line breaks are no words, so the split changes rougeLsum and leaves the other three as on the raw text.
        targets = ["\n".join(split_sentences(reference)) for reference in group]
        best = scorer.score_multi(targets, "\n".join(split_sentences(prediction)))
        for name in ROUGE_TYPES:
            totals[name] += best[name].fmeasure
    return {name: 100.0 * total / len(groups) for name, total in totals.items()}


def text_qualities(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return ROUGE-L of each text, the F-measure of stemmed words in [0, 1], as `rouge_scores` averages it.

    Raises:
        ValueError: If there are more texts than references, or fewer.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    return [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for prediction, reference in pairs]


def load_bert_scorer(
    model_type: str | None = None,
    lang: str | None = None,
    *,
    num_layers: int | None = None,
    rescale_with_baseline: bool = False,
    **options: Any,
) -> Any:
    """Build the model that scores pairs for BERTScore, so that it can be reused over several evaluations.

    Args:
        model_type: A hub name that bert-score knows (for example `roberta-large`), or a local folder.
        lang: Language code; picks bert-score's recommended model when `model_type` is None (`en`: roberta-large).
        num_layers: Layer whose hidden states are compared; required when bert-score has no tuned value for the model.
        rescale_with_baseline: Rescale with bert-score's baseline of the language and model; needs `lang`.
        options: Of `bert_score.BERTScorer`, such as `batch_size`, `device` and `baseline_path`.

    Returns:
        A `bert_score.BERTScorer`.

    Raises:
        ValueError: If neither model nor language is given, the language is unknown, the layer is unknown or out of
            range, no baseline exists, or the model cannot be loaded (for example offline).
    """
    from bert_score import BERTScorer
    from bert_score.utils import lang2model, model2layers

    if model_type is None and lang is None:
        raise ValueError("BERTScore needs a scorer model or a language: pass model_type='roberta-large' or lang='en'.")
    if rescale_with_baseline and lang is None:
        raise ValueError(
            "BERTScore's baseline depends on the language: pass lang together with rescale_with_baseline."
        )
    # lang2model is a defaultdict: every language it does not list gets the multilingual model, as upstream means it.
    name = model_type if model_type is not None else lang2model[str(lang).lower()]
    if num_layers is None and name not in model2layers:
        raise ValueError(
            f"bert-score has no tuned layer for the scorer model '{name}': pass num_layers (the layer to compare, "
            "for example 17 for roberta-large, 9 for bert-base-uncased)."
        )
    try:
        scorer = BERTScorer(
            model_type=_LocalFolder(name) if os.path.isdir(name) else name,
            num_layers=num_layers,
            lang=lang,
            rescale_with_baseline=rescale_with_baseline,
            **options,
        )
    except AssertionError as error:
        raise ValueError(f"BERTScore cannot use layer {num_layers} of '{name}': {error}.") from error
    except (OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The BERTScore model '{name}' cannot be loaded ({first_line}). Without the hub, save a model and its "
            "tokenizer to a folder, and pass that folder as model_type together with num_layers "
            "(--bertscore_model FOLDER --bertscore_num_layers N in run_summarization_dpsm.py)."
        ) from error
    if rescale_with_baseline:
        scorer.baseline_vals  # noqa: B018  (a lazy property: reading it now reports a missing baseline before training)
    _bound_scorer_length(scorer)
    return scorer


def bert_scores(
    predictions: Sequence[str], references: Sequence[Reference], *, scorer: Any = None, **options: Any
) -> dict[str, float]:
    """Return mean BERTScore precision, recall and F1 of predictions against references.

    For unit-length contextual embeddings x_i of the reference and y_j of the prediction,
    R = mean_i max_j x_i.y_j, P = mean_j max_i x_i.y_j, F1 = 2PR/(P+R); the means of P, R and F1 over samples are
    returned. A sample with several references takes bert-score's maximum for each of the three. A sample whose
    prediction is empty, or that has no non-empty reference, scores 0 (bert-score itself fails there with current
    tokenizers).

    Args:
        predictions: N generated texts.
        references: N reference texts, or N non-empty lists of them.
        scorer: A scorer from `load_bert_scorer`, to load the model once for many calls.
        options: Of `load_bert_scorer`; ignored when `scorer` is given.

    Returns:
        `{"bertscore_precision": ..., "bertscore_recall": ..., "bertscore_f1": ...}`, not multiplied by 100.

    Raises:
        ValueError: If there is no sample, the lengths differ, a sample has no reference, or no scorer can be loaded.

    Source: Zhang et al., "BERTScore: Evaluating Text Generation with BERT", ICLR 2020.
    """
    groups = _check_pairs("bert_scores", predictions, references)
    if scorer is None:
        scorer = load_bert_scorer(**options)
    filled = [[reference for reference in group if reference.strip()] for group in groups]
    scored = [(text, group) for text, group in zip(predictions, filled, strict=True) if text.strip() and group]
    empty = len(groups) - len(scored)
    if empty:
        logger.warning("BERTScore is 0 for %d of %d samples: an empty prediction or reference.", empty, len(groups))
    sums = [0.0, 0.0, 0.0]
    if scored:
        columns = scorer.score(*map(list, zip(*scored, strict=True)), batch_size=scorer.batch_size)
        sums = [float(column.double().sum()) for column in columns]
    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    return {name: value / len(groups) for name, value in zip(names, sums, strict=True)}


def generation_lengths(token_ids: np.ndarray | Sequence[Sequence[int]], pad_token_id: int) -> np.ndarray:
    """Count the generated tokens of each row, everything but padding (as `gen_len` in the upstream script).

    A decoder start token that is not the pad token (BART's `</s>`, mBART's language code) and the end token count.

    Args:
        token_ids: [N, T] generated token ids, or N lists of them; -100 counts as padding.
        pad_token_id: The tokenizer's padding id.

    Returns:
        int64 [N]; ValueError if there are no rows.
    """
    if len(token_ids) == 0:
        raise ValueError("generation_lengths got no generated sequence: the evaluation set is empty.")
    rows = (np.asarray(row) for row in token_ids)
    return np.array([int(np.sum((row != pad_token_id) & (row != -100))) for row in rows], dtype=np.int64)


def _check_pairs(where: str, predictions: Sequence[str], references: Sequence[Reference]) -> list[list[str]]:
    """Return the references as lists, after checking that they belong to the predictions one to one."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError(f"{where} takes lists of texts, not one text: wrap it in a list.")
    if len(predictions) != len(references):
        raise ValueError(
            f"{where} got {len(predictions)} predictions and {len(references)} references: give one reference "
            "(or one list of references) to each prediction."
        )
    if len(predictions) == 0:
        raise ValueError(f"{where} got no samples: the set to score is empty.")
    groups = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    for index, (prediction, group) in enumerate(zip(predictions, groups, strict=True)):
        if not group:
            raise ValueError(f"{where}: sample {index} has no reference; give it at least one text.")
        if not isinstance(prediction, str) or not all(isinstance(reference, str) for reference in group):
            raise ValueError(f"{where}: sample {index} is not text; decode token ids and replace None by ''.")
    return groups


class _LocalFolder(str):
    """A model folder for bert-score, which asks for "t5" in the path it is given: the folder's config answers that."""

    def __contains__(self, part: object) -> bool:
        if part == "t5":
            from transformers import AutoConfig

            return "t5" in AutoConfig.from_pretrained(str(self)).model_type
        return isinstance(part, str) and super().__contains__(part)


def _bound_scorer_length(scorer: Any) -> None:
    """Give the scorer's tokenizer a usable maximum length.

    A tokenizer saved without `model_max_length` reports 10^30, which overflows the Rust tokenizer; and a length above
    the model's positions would index out of range. RoBERTa-like models reserve positions up to their padding id.
    """
    config = scorer._model.config
    positions = getattr(config, "max_position_embeddings", None)
    limit = int(positions) if isinstance(positions, int) and positions > 0 else 512
    if "roberta" in getattr(config, "model_type", "") and getattr(config, "pad_token_id", None) is not None:
        limit -= config.pad_token_id + 1
    scorer._tokenizer.model_max_length = min(int(min(scorer._tokenizer.model_max_length, 10**9)), limit)
