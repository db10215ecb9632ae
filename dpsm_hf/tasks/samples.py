"""--sample_outputs: texts that the model writes for fixed prompts, to be read side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig

from ..data.completions import IGNORED, split_row
from ..evaluation.text_metrics import rouge_scores
from ..training.trainer import DPSMMixin, DPSMSeq2SeqTrainer
from .generation_metrics import decode_ids

logger = logging.getLogger(__name__)

# Characters kept of a source.
_SOURCE_START = 400


def continuations(trainer: DPSMMixin, rows: Any, number: int) -> list[dict[str, str]]:
    """Let the model continue the first half of the first rows, or their prompts, greedily; every process calls this.

    Returns:
        ``prompt``, ``reference`` (how the row goes on) and ``output`` of each; nothing from a model that does not
        generate.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not number or not getattr(model, "can_generate", lambda: False)():
        if number:
            logger.warning("%s does not generate: there are no sample outputs.", type(model).__name__)
        return []
    model.eval()
    return _continuations(trainer, model, list(islice(rows, number)), 1)


def continuation_rouge(trainer: DPSMMixin, rows: Any, number: int) -> dict[str, float]:
    """Continue the first half of the first rows, or their prompts, greedily, and score that against how they go on.

    Prompts of one length go through the model together, as many as in an evaluation's batch. Every process calls this,
    and does the same.

    Args:
        trainer: of the model as it is now.
        rows: of token ids.
        number: of rows.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL`` and ``rougeLsum``, F1 out of 100; nothing from a model that does not
        generate.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not getattr(model, "can_generate", lambda: False)():
        logger.warning("%s does not generate: there is no ROUGE of continuations.", type(model).__name__)
        return {}
    model.eval()
    found = _continuations(trainer, model, list(islice(rows, number)), trainer.args.per_device_eval_batch_size)
    outputs, references = ([text[name] for text in found] for name in ("output", "reference"))
    return {name: round(value, 4) for name, value in rouge_scores(outputs, references).items()}


def _continuations(trainer: DPSMMixin, model: Any, rows: Sequence[Any], size: int) -> list[dict[str, str]]:
    """Continue rows in batches of prompts of one length, so that nothing has to be padded.

    Half a row is continued up to the row's length. How long a completion is to be a prompt does not tell: all get as
    many tokens as the longest one has.
    """
    pairs = [split_row(row) for row in rows]
    prompted = any(row["labels"][0] == IGNORED for row in rows)
    longest = max((len(rest) for _, rest in pairs), default=0)
    groups: dict[Any, list[tuple[list[int], list[int]]]] = {}
    for prompt, rest in pairs:
        groups.setdefault((len(prompt), longest if prompted else len(rest)), []).append((prompt, rest))
    found: list[dict[str, str]] = []
    for (_, most), together in groups.items():
        for start in range(0, len(together), size):
            found += _continued(trainer, model, together[start : start + size], most)
    return found


def _continued(
    trainer: DPSMMixin, model: Any, pairs: Sequence[tuple[list[int], list[int]]], most: int
) -> list[dict[str, str]]:
    """Continue prompts of one length by so many tokens at most."""
    tokenizer: Any = trainer.processing_class
    prompts = torch.as_tensor([prompt for prompt, _ in pairs], device=trainer.args.device)
    rests = [rest for _, rest in pairs]
    # a configuration of its own: that of a pretrained model may sample
    greedy = GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    with torch.no_grad(), trainer.compute_loss_context_manager():
        written = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy)[
            :, prompts.shape[1] :
        ]
    texts = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in (prompts, rests, written))
    return [dict(zip(("prompt", "reference", "output"), three, strict=True)) for three in zip(*texts, strict=True)]


def summaries(
    trainer: DPSMSeq2SeqTrainer, rows: Any, pairs: Any, columns: tuple[str, str], number: int
) -> list[dict[str, str]]:
    """Let the model summarise the first texts, as evaluation does; every process calls this.

    Args:
        trainer: of the model as it is now.
        rows, pairs: the set as token ids and as texts.
        columns: of the texts and the summaries.
        number: of texts.

    Returns:
        ``prompt`` (the text's first 400 characters), ``reference`` and ``output`` of each.
    """
    number = min(number, len(pairs))
    if not number:
        return []
    output = trainer.predict(rows.select(range(number)), metric_key_prefix="sample")
    # several processes repeat samples to fill their last batch
    written = decode_ids(output.predictions, trainer.processing_class)[:number]  # type: ignore[arg-type]
    return [
        {"prompt": text[:_SOURCE_START], "reference": reference, "output": summary}
        for text, reference, summary in zip(*(pairs[column][:number] for column in columns), written, strict=True)
    ]
