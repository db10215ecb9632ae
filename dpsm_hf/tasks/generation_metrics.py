"""From generated token ids to scores and files: decoding, the Trainer's `compute_metrics`, and the predictions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..evaluation.text_metrics import bert_scores, generation_lengths, rouge_scores

PREDICTIONS_TXT = "generated_predictions.txt"
PREDICTIONS_JSONL = "generated_predictions.jsonl"


def decode_ids(token_ids: np.ndarray | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Turn rows of token ids ``[N, T]``, -100 for padding, into N stripped texts without special tokens."""
    rows = np.asarray(token_ids)
    rows = np.where(rows != -100, rows, tokenizer.pad_token_id)  # no tokenizer can decode -100
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def summary_metrics(
    tokenizer: PreTrainedTokenizerBase, *, use_stemmer: bool = True, bert_scorer: Any = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build a `compute_metrics` for evaluation with `predict_with_generate`.

    It gives `rouge1`, `rouge2`, `rougeL`, `rougeLsum` (see `text_metrics.rouge_scores`), `gen_len` (mean number of
    generated tokens that are not padding) and, with a scorer, the three BERTScore means. The references are the
    decoded labels, that is the summaries as cut to the target length, as in the upstream script.

    Args:
        tokenizer: Decodes predictions and labels.
        use_stemmer: Porter stemming in ROUGE.
        bert_scorer: From `text_metrics.load_bert_scorer`; None leaves BERTScore out.
    """

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        generated = evaluation.predictions
        if isinstance(generated, tuple):
            generated = generated[0]
        predictions = decode_ids(generated, tokenizer)
        references = decode_ids(evaluation.label_ids, tokenizer)  # type: ignore[arg-type]
        rouge = rouge_scores(predictions, references, use_stemmer=use_stemmer)
        scores = {name: round(value, 4) for name, value in rouge.items()}
        if bert_scorer is not None:
            scores |= bert_scores(predictions, references, scorer=bert_scorer)
        scores["gen_len"] = float(generation_lengths(generated, int(tokenizer.pad_token_id)).mean())
        return scores

    return compute_metrics


def write_predictions(
    output_dir: str | os.PathLike[str], predictions: Sequence[str], documents: Sequence[str], references: Sequence[str]
) -> tuple[str, str]:
    """Write the generated summaries as text (one a line) and as JSON lines beside their sources.

    A line break inside a prediction becomes a space in the text file, so that its lines stay those of the test set;
    the JSON lines keep it. Returns the two paths.

    Raises:
        ValueError: If predictions, documents and (uncut) references are not as many.
    """
    if not len(predictions) == len(documents) == len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions, {len(documents)} documents and {len(references)} references; "
            "they must belong together one to one."
        )
    os.makedirs(output_dir, exist_ok=True)
    text_path = os.path.join(output_dir, PREDICTIONS_TXT)
    jsonl_path = os.path.join(output_dir, PREDICTIONS_JSONL)
    with open(text_path, "w", encoding="utf-8") as file:
        file.writelines(" ".join(prediction.split()) + "\n" for prediction in predictions)
    with open(jsonl_path, "w", encoding="utf-8") as file:
        for document, reference, prediction in zip(documents, references, predictions, strict=True):
            record = {"document": document, "reference": reference, "prediction": prediction}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return text_path, jsonl_path
