"""--sample_outputs: texts that the model writes for fixed prompts, to be read side by side."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig

from ..training.trainer import DPSMMixin, DPSMSeq2SeqTrainer
from .generation_metrics import decode_ids

logger = logging.getLogger(__name__)

# Characters kept of a source.
_SOURCE_START = 400


def continuations(trainer: DPSMMixin, rows: Any, number: int) -> list[dict[str, str]]:
    """Let the model continue the first half of the first rows, greedily, up to their length; every process calls this.

    Returns:
        ``prompt``, ``reference`` (how the row goes on) and ``output`` of each; nothing from a model that does not
        generate.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not number or not getattr(model, "can_generate", lambda: False)():
        if number:
            logger.warning("%s does not generate: there are no sample outputs.", type(model).__name__)
        return []
    tokenizer: Any = trainer.processing_class
    model.eval()
    found = []
    for row in islice(rows, number):
        ids = torch.as_tensor(row["input_ids"], device=trainer.args.device)
        prompt, rest = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        # a configuration of its own: that of a pretrained model may sample
        greedy = GenerationConfig(
            max_new_tokens=len(rest),
            do_sample=False,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        with torch.no_grad(), trainer.compute_loss_context_manager():
            written = model.generate(
                input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], generation_config=greedy
            )[0, len(prompt) :]
        texts = tokenizer.batch_decode([prompt, rest, written], skip_special_tokens=True)
        found.append(dict(zip(("prompt", "reference", "output"), texts, strict=True)))
    return found


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
