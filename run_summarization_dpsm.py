#!/usr/bin/env python
"""Train, evaluate and predict with an encoder-decoder model on summarisation, with the losses of dpsm_hf.

The arguments are those of the Hugging Face example `run_summarization.py` with those of `DPSMSeq2SeqConfig`; the few
more are marked "dpsm_hf" in --help. All of them may also come from one JSON or YAML file:

    python run_summarization_dpsm.py --dataset_name python-docstrings --model_type bart \\
        --config_overrides d_model=128,encoder_layers=2,decoder_layers=2 --tokenizer_name train-bpe \\
        --output_dir out --do_train --do_eval --predict_with_generate
    python run_summarization_dpsm.py settings.yaml
    accelerate launch run_summarization_dpsm.py settings.yaml

ROUGE is that of the rouge-score package.
`dpsm_hf.evaluation.text_metrics` says how sentences are split and what each figure is.
What a finished run found out is in `outcome.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from dpsm_hf import DPSMSeq2SeqConfig, DPSMSeq2SeqTrainer
from dpsm_hf.data.loading import load_text_datasets
from dpsm_hf.data.summarization import TokenizationSettings, filter_pairs, resolve_columns, tokenize_split
from dpsm_hf.data.tokenizer import column_texts, resolve_tokenizer
from dpsm_hf.evaluation.text_metrics import load_bert_scorer, sentence_splitter_name
from dpsm_hf.runtime.child_process import end_with_runner
from dpsm_hf.tasks.best_checkpoint import best_weights, early_stopping
from dpsm_hf.tasks.generation_metrics import decode_ids, summary_metrics, write_predictions
from dpsm_hf.tasks.outcome import Outcome, discard_outcome
from dpsm_hf.tasks.outcome_arguments import OutcomeArguments, check_samples, settle_best_checkpoint
from dpsm_hf.tasks.positions import fit_positions
from dpsm_hf.tasks.samples import summaries
from dpsm_hf.tasks.script_utils import (
    build_config_from_scratch,
    detect_checkpoint,
    parse_script_arguments,
    setup_logging,
    train_and_save,
)
from dpsm_hf.tasks.seq2seq_setup import (
    check_decoder_start,
    check_source_prefix,
    check_tokenizer,
    fit_vocabulary,
    set_languages,
)
from dpsm_hf.tasks.stopping import stopping
from dpsm_hf.tasks.summarization_arguments import DataTrainingArguments, ModelArguments, check_contradictions

logger = logging.getLogger("run_summarization_dpsm")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the script.

    Args:
        argv: Arguments without the program's name; `sys.argv[1:]` when None.

    Returns:
        All metrics of training, evaluation and prediction by their logged names; empty where nothing was to do.
    """
    end_with_runner()
    model_args, data_args, outcome_args, training_args = parse_script_arguments(
        (ModelArguments, DataTrainingArguments, OutcomeArguments, DPSMSeq2SeqConfig), argv
    )
    setup_logging(training_args)
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # it speeds up copies to a GPU; torch warns where there is none
    check_contradictions(model_args, data_args, training_args)
    settle_best_checkpoint(outcome_args, training_args)
    check_samples(outcome_args, training_args)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        logger.warning("There is nothing to do: pass --do_train, --do_eval or --do_predict.")
        return {}
    discard_outcome(training_args)
    checkpoint = detect_checkpoint(training_args)
    bert_scorer = make_bert_scorer(data_args)  # before training: a scorer that cannot be had is found out now
    pairs, columns = load_pairs(model_args, data_args, training_args)
    of_own = dict.fromkeys(pairs, columns)
    extra_pairs, of_extra = load_extra_pairs(model_args, data_args, outcome_args, training_args, columns)
    set_seed(training_args.seed)
    tokenizer = load_tokenizer(model_args, data_args, training_args, pairs, columns, resuming=checkpoint is not None)
    model = load_model(model_args, data_args, tokenizer)
    rows = {
        split: tokenize(texts, (of_own | of_extra)[split], split, tokenizer, data_args, training_args)
        for split, texts in (pairs | extra_pairs).items()
    }
    set_generation_arguments(data_args, training_args)
    generates = training_args.predict_with_generate
    if generates:
        logger.info("rougeLsum splits texts without newlines into sentences by: %s.", sentence_splitter_name())
    trainer = DPSMSeq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        calibration_dataset=rows.get("calibration"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(
            tokenizer,
            model=model,  # it makes decoder_input_ids with the model's prepare_decoder_input_ids_from_labels
            label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
            pad_to_multiple_of=8 if training_args.fp16 else None,
        ),
        compute_metrics=summary_metrics(tokenizer, bert_scorer=bert_scorer) if generates else None,
        corruption=data_args.corruption(model, tokenizer, rows.get("train"), training_args.seed),
    )
    results: dict[str, float] = {}
    if training_args.do_train:
        callbacks = [*early_stopping(outcome_args.early_stopping_patience), *stopping(data_args.stop_at_step)]
        results |= train_and_save(trainer, checkpoint, len(rows["train"]), callbacks)
    outcome = Outcome(trainer)
    prefixes = {"validation": "eval", "test": "predict"} | {name: name for name in extra_pairs}

    def evaluate_all(weights: str) -> None:
        for split, prefix in prefixes.items():
            if split not in rows:
                continue
            logger.info("*** Evaluate (%s, %s weights) ***", split, weights)
            if split == "test" and weights == "last":
                metrics = predict(trainer, rows["test"], pairs["test"], columns)
            else:
                prefix = prefix if weights == "last" else f"{weights}_{prefix}"
                metrics = trainer.evaluate(rows[split], metric_key_prefix=prefix)
            metrics = report(trainer, prefix, metrics, len(rows[split]))
            outcome.add(weights, split, metrics, prefix=prefix, rows=rows[split])
            results.update(metrics)

    evaluate_all("last")
    shown = next((split for split in ("test", "validation") if split in rows), None)
    if shown is not None and outcome_args.sample_outputs:
        outcome.samples = summaries(trainer, rows[shown], pairs[shown], columns, outcome_args.sample_outputs)
    describe(trainer, model_args, data_args)
    if outcome_args.evaluate_best:
        with best_weights(trainer) as found:
            if found:
                evaluate_all("best")
    outcome.write()
    return results


def make_bert_scorer(data_args: DataTrainingArguments) -> Any:
    """Load the scorer of --bertscore, or return None without it."""
    if not data_args.bertscore:
        return None
    language = (data_args.lang or "en").split("_")[0]
    return load_bert_scorer(data_args.bertscore_model, language, num_layers=data_args.bertscore_num_layers)


def load_pairs(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: Any
) -> tuple[dict[str, Any], tuple[str, str]]:
    """Load the splits that the run needs, without unusable pairs and cut to the --max_*_samples.

    Returns:
        The pairs by split (train, validation, test, calibration), and the names of their text and summary columns.
    """
    wanted = {
        "train": (training_args.do_train, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.max_predict_samples),
        "calibration": (training_args.fit_temperature, None),
    }
    raw: Mapping[str, Any] = load_text_datasets(
        data_args.dataset_name,
        data_args.dataset_config_name,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        test_file=data_args.test_file,
        calibration_file=data_args.calibration_file,
        required_splits=data_args.splits_to_load([split for split, (needed, _) in wanted.items() if needed]),
        validation_split_percentage=None,
        calibration_split_percentage=data_args.calibration_split_percentage,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    arguments = (data_args.dataset_name, data_args.text_column, data_args.summary_column)
    if data_args.cross_validation_fold is not None:
        raw = data_args.take_fold(raw, resolve_columns(raw["train"].column_names, *arguments))
    pairs: dict[str, Any] = {}
    columns = ("", "")
    for split, (needed, most) in wanted.items():
        if not needed:
            continue
        found = resolve_columns(raw[split].column_names, *arguments)
        if pairs and found != columns:
            raise ValueError(
                f"The {split} set has its pairs in the columns {found}, another one in {columns}: name columns that "
                "all have with --text_column and --summary_column."
            )
        columns = found
        with training_args.main_process_first(desc=f"filtering the {split} set"):
            kept, _ = filter_pairs(
                raw[split],
                *columns,
                min_source_words=data_args.min_source_words,
                split=split,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=not data_args.overwrite_cache,
            )
        if split == "train":
            kept = data_args.take_low_resource(kept, columns)
        pairs[split] = kept if most is None else kept.select(range(min(most, len(kept))))
    return pairs, columns


def load_extra_pairs(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    outcome_args: OutcomeArguments,
    training_args: Any,
    own: tuple[str, str],
) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """Load the sets of --extra_eval_datasets as `load_pairs` loads the test split.

    Returns:
        The pairs by name, and the names of their text and summary columns.
    """
    pairs, columns = {}, {}
    for extra in outcome_args.extra_datasets():
        raw = extra.load(cache_dir=model_args.cache_dir, token=model_args.token)
        columns[extra.name] = extra.pair_columns(raw.column_names, own)
        with training_args.main_process_first(desc=f"filtering {extra.name}"):
            kept, _ = filter_pairs(
                raw,
                *columns[extra.name],
                min_source_words=data_args.min_source_words,
                split=extra.name,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=not data_args.overwrite_cache,
            )
        most = data_args.max_predict_samples or data_args.max_eval_samples
        pairs[extra.name] = kept if most is None else kept.select(range(min(most, len(kept))))
    return pairs, columns


def tokenize(
    pairs: Any,
    columns: tuple[str, str],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataTrainingArguments,
    training_args: Any,
) -> Any:
    """Turn the pairs of a split into rows of token ids."""
    limit = data_args.max_target_length if split == "train" else data_args.val_max_target_length
    settings = TokenizationSettings(
        *columns,
        max_source_length=data_args.max_source_length,
        max_target_length=limit or data_args.max_target_length,
        source_prefix=data_args.source_prefix or "",
        pad_to_max_length=data_args.pad_to_max_length,
        ignore_pad_token_for_loss=data_args.ignore_pad_token_for_loss,
    )
    with training_args.main_process_first(desc=f"tokenising the {split} set"):
        return tokenize_split(
            pairs,
            tokenizer,
            settings,
            split=split,
            num_proc=data_args.preprocessing_num_workers,
            load_from_cache_file=not data_args.overwrite_cache,
        )


def load_tokenizer(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: Any,
    pairs: dict[str, Any],
    columns: tuple[str, str],
    *,
    resuming: bool,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on the training pairs."""
    tokenizer = resolve_tokenizer(
        model_args.tokenizer_name or model_args.model_name_or_path or "",
        output_dir=training_args.output_dir,
        training_texts=lambda: column_texts(pairs["train"], columns),
        vocab_size=model_args.tokenizer_vocab_size,
        sequence_template=True,
        model_max_length=data_args.max_source_length,
        resuming=resuming,
        main_process_first=training_args.main_process_first,
        cache_dir=model_args.cache_dir,
        use_fast=model_args.use_fast_tokenizer,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    check_tokenizer(tokenizer)
    return tokenizer


def load_model(
    model_args: ModelArguments, data_args: DataTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the model or make a fresh one, and fit it to the tokenizer, the languages and the lengths."""
    hub = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    source = model_args.config_name or model_args.model_name_or_path
    if source is not None:
        config = AutoConfig.from_pretrained(source, **hub)
    else:
        config = build_config_from_scratch(model_args.model_type, model_args.config_overrides, tokenizer)
    if not config.is_encoder_decoder:
        raise ValueError(
            f"A model of type {config.model_type} has no encoder and decoder, which this script trains; for language "
            "models there is run_clm_dpsm.py."
        )
    if model_args.model_name_or_path is not None:
        model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path, config=config, **hub)
    else:
        model = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=model_args.trust_remote_code)
        logger.info("Training from scratch: %.1f million parameters.", model.num_parameters() / 1e6)
    fit_vocabulary(model, tokenizer)
    set_languages(model, tokenizer, data_args.lang, data_args.forced_bos_token)
    check_decoder_start(model, tokenizer)
    longest = (data_args.max_source_length, data_args.max_target_length, data_args.val_max_target_length or 1)
    fit_positions(model, max(longest), model_args.resize_position_embeddings)
    check_source_prefix(model, data_args.source_prefix, from_scratch=model_args.model_name_or_path is None)
    return model


def set_generation_arguments(data_args: DataTrainingArguments, training_args: Any) -> None:
    """Fill in length and beams of generation where the trainer's own arguments leave them open."""
    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.val_max_target_length
    if training_args.generation_num_beams is None:
        training_args.generation_num_beams = data_args.num_beams


def predict(trainer: DPSMSeq2SeqTrainer, rows: Any, pairs: Any, columns: tuple[str, str]) -> dict[str, float]:
    """Score the test set and, with --predict_with_generate, write its generated summaries."""
    if not trainer.args.predict_with_generate:  # type: ignore[attr-defined]
        logger.warning("Without --predict_with_generate the test set is scored, but no summaries are written.")
        # Trainer.predict would keep the logits of the whole set in memory.
        return trainer.evaluate(rows, metric_key_prefix="predict")
    output = trainer.predict(rows, metric_key_prefix="predict")
    if trainer.is_world_process_zero():
        # Several processes repeat samples at the end to fill their last batch.
        predictions = decode_ids(output.predictions, trainer.processing_class)[: len(pairs)]  # type: ignore[arg-type]
        paths = write_predictions(
            str(trainer.args.output_dir), predictions, pairs[columns[0]][:], pairs[columns[1]][:]
        )
        logger.info("The generated summaries are in %s and %s.", *paths)
    return dict(output.metrics or {})


def report(trainer: DPSMSeq2SeqTrainer, split: str, metrics: dict[str, float], samples: int) -> dict[str, float]:
    """Log and save the metrics of a split with its number of samples."""
    metrics[f"{split}_samples"] = samples
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics


def describe(trainer: DPSMSeq2SeqTrainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Write the model card, and push to the hub where --push_to_hub asks for it."""
    card: dict[str, Any] = {"tasks": "summarization"}
    if model_args.model_name_or_path is not None:
        card["finetuned_from"] = model_args.model_name_or_path
    else:
        # The card says "trained from scratch" where the config names no model but a folder, and else names model "".
        trainer.model.config._name_or_path = trainer.args.output_dir  # type: ignore[union-attr]
    if data_args.dataset_name is not None:
        card["dataset_tags"] = card["dataset"] = data_args.dataset_name
        if data_args.dataset_config_name is not None:
            card["dataset_args"] = data_args.dataset_config_name
            card["dataset"] = f"{data_args.dataset_name} {data_args.dataset_config_name}"
    if data_args.lang is not None:
        card["language"] = data_args.lang
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def _mp_fn(index: int) -> None:
    """Entry point of one TPU process under xla_spawn."""
    main()


if __name__ == "__main__":
    main()
