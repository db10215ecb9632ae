#!/usr/bin/env python
"""Train and evaluate a causal language model with the losses of dpsm_hf:

    python run_clm_dpsm.py --dataset_name python-docs --model_type gpt2 \\
        --config_overrides n_embd=128,n_layer=2,n_head=2 --tokenizer_name train-bpe --block_size 128 \\
        --output_dir out --do_train --do_eval

The arguments are those of the Hugging Face example `run_clm.py` with those of `DPSMConfig`; the few more are marked
"dpsm_hf" in --help. All of them may also come from one JSON or YAML file, and several processes share the work:

    python run_clm_dpsm.py settings.yaml
    accelerate launch run_clm_dpsm.py settings.yaml

A run whose output folder holds a checkpoint continues from it; Ctrl-C saves one first. --do_predict evaluates on the
test split. Perplexity is exp of the true token mean of the negative log-likelihood, `eval_nll`. What a finished run
found out is in `outcome.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.data.clm import ClmCollator, choose_text_column, prepare_clm_datasets
from dpsm_hf.data.loading import EMBEDDED_DATASETS, AnyDataset, column_names, load_text_datasets
from dpsm_hf.data.tokenizer import DEFAULT_MAX_LENGTH, TRAIN_BPE, column_texts, resolve_tokenizer
from dpsm_hf.runtime.child_process import end_with_runner
from dpsm_hf.tasks.best_checkpoint import best_weights, early_stopping
from dpsm_hf.tasks.clm_arguments import (
    DataTrainingArguments,
    ModelArguments,
    check_contradictions,
    natural_boundary,
    resolve_block_size,
)
from dpsm_hf.tasks.outcome import Outcome, discard_outcome
from dpsm_hf.tasks.outcome_arguments import OutcomeArguments, settle_best_checkpoint
from dpsm_hf.tasks.samples import continuations
from dpsm_hf.tasks.script_utils import (
    build_config_from_scratch,
    check_block_size,
    detect_checkpoint,
    parse_script_arguments,
    setup_logging,
    train_and_save,
)
from dpsm_hf.tasks.stopping import stopping

logger = logging.getLogger("run_clm_dpsm")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the script.

    Args:
        argv: Arguments without the program's name; `sys.argv[1:]` when None.

    Returns:
        All metrics of training, evaluation and test by their logged names; empty where nothing was to do.
    """
    end_with_runner()
    model_args, data_args, outcome_args, training_args = parse_script_arguments(
        (ModelArguments, DataTrainingArguments, OutcomeArguments, DPSMConfig), argv
    )
    setup_logging(training_args)
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # it speeds up copies to a GPU; torch warns where there is none
    check_contradictions(model_args, data_args, training_args)
    settle_best_checkpoint(outcome_args, training_args)
    limits: dict[str, int | None] = {
        split: limit
        for split, wanted, limit in (
            ("train", training_args.do_train, data_args.max_train_samples),
            ("validation", training_args.do_eval, data_args.max_eval_samples),
            ("test", training_args.do_predict, data_args.max_predict_samples),
        )
        if wanted
    }
    if not limits:
        logger.warning("There is nothing to do: pass --do_train, --do_eval or --do_predict.")
        return {}
    if training_args.fit_temperature:
        limits["calibration"] = None
    discard_outcome(training_args)
    checkpoint = detect_checkpoint(training_args)
    set_seed(training_args.seed)
    raw = load_texts(model_args, data_args, training_args, list(limits))
    extra_texts = load_extra_texts(model_args, data_args, outcome_args, training_args)
    limits |= dict.fromkeys(extra_texts, data_args.max_predict_samples or data_args.max_eval_samples)
    tokenizer = load_tokenizer(model_args, data_args, training_args, raw, resuming=checkpoint is not None)
    model = load_model(model_args, data_args, tokenizer)
    block_size = resolve_block_size(data_args.block_size, tokenizer, model.config)
    check_block_size(model.config, block_size)
    parts = prepare_rows(data_args, training_args, tokenizer, block_size, raw, extra_texts, limits)
    trainer = DPSMTrainer(
        model=model,
        args=training_args,
        train_dataset=parts.get("train"),
        eval_dataset=parts.get("validation"),
        calibration_dataset=parts.get("calibration"),
        processing_class=tokenizer,
        data_collator=ClmCollator(block_size, tokenizer.pad_token_id or 0),
        corruption=data_args.corruption(model, tokenizer, parts.get("train"), training_args.seed),
    )
    results: dict[str, float] = {}
    if training_args.do_train:
        samples = number_of_rows(parts["train"], limits["train"])
        callbacks = [*early_stopping(outcome_args.early_stopping_patience), *stopping(data_args.stop_at_step)]
        results |= train_and_save(trainer, checkpoint, samples, callbacks)
    outcome = Outcome(trainer)
    prefixes = {"validation": "eval", "test": "test"} | {name: name for name in extra_texts}

    def evaluate_all(weights: str) -> None:
        for split, prefix in prefixes.items():
            if split in parts:
                prefix = prefix if weights == "last" else f"{weights}_{prefix}"
                metrics = evaluate(trainer, prefix, parts[split], number_of_rows(parts[split], limits[split]))
                outcome.add(weights, split, metrics, prefix=prefix, rows=parts[split])
                results.update(metrics)

    evaluate_all("last")
    shown = parts.get("test", parts.get("validation"))
    if shown is not None:
        outcome.samples = continuations(trainer, shown, outcome_args.sample_outputs)
    describe(trainer, model_args, data_args)
    if outcome_args.evaluate_best:
        with best_weights(trainer) as found:
            if found:
                evaluate_all("best")
    outcome.write()
    return results


def load_texts(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: DPSMConfig, splits: list[str]
) -> Mapping[str, AnyDataset]:
    """Load the splits that the run needs, and the train split for a tokenizer that is trained on it.

    Only the part of the train split that the run may train on: other folds and a small subset leave the rest unseen.
    """
    needed = [*splits, "train"] if model_args.tokenizer_name == TRAIN_BPE and "train" not in splits else splits
    with training_args.main_process_first(desc="loading the data"):
        raw = load_text_datasets(
            data_args.dataset_name,
            data_args.dataset_config_name,
            train_file=data_args.train_file,
            validation_file=data_args.validation_file,
            test_file=data_args.test_file,
            calibration_file=data_args.calibration_file,
            required_splits=data_args.splits_to_load(needed),
            validation_split_percentage=(
                None if data_args.cross_validation_fold is not None else data_args.validation_split_percentage
            ),
            calibration_split_percentage=data_args.calibration_split_percentage,
            streaming=data_args.streaming,
            keep_linebreaks=data_args.keep_linebreaks,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
            trust_remote_code=model_args.trust_remote_code,
        )
    if data_args.low_resource is None and data_args.cross_validation_fold is None:
        return raw
    column = choose_text_column(raw["train"], data_args.text_column_name, "train")
    by_document = data_args.preprocessing(DEFAULT_MAX_LENGTH).document_boundary == "blank_line"
    parts = data_args.take_fold(raw, [column], by_document=by_document)
    # documents differ much in length, so a share of them is a share of their text
    parts["train"] = data_args.take_low_resource(parts["train"], [column], by_length=True, by_document=by_document)
    return parts


def load_extra_texts(
    model_args: ModelArguments, data_args: DataTrainingArguments, outcome_args: OutcomeArguments, training_args: Any
) -> dict[str, tuple[AnyDataset, str | None, str]]:
    """Load the sets of --extra_eval_datasets: texts, their column and what ends a document, by name."""
    found = {}
    own = data_args.text_column_name
    for extra in outcome_args.extra_datasets():
        if extra.summary_column is not None:
            raise ValueError(
                f"--extra_eval_datasets {extra.name}: language modelling has no summaries; leave summary= out."
            )
        with training_args.main_process_first(desc=f"loading {extra.name}"):
            texts = extra.load(
                streaming=data_args.streaming,
                keep_linebreaks=data_args.keep_linebreaks,
                cache_dir=model_args.cache_dir,
                token=model_args.token,
            )
        column = extra.text_column or (own if own in column_names(texts) else None)
        choose_text_column(texts, column, extra.name)
        found[extra.name] = texts, column, natural_boundary([extra.source] if extra.is_file else [])
    return found


def prepare_rows(
    data_args: DataTrainingArguments,
    training_args: DPSMConfig,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    raw: Mapping[str, AnyDataset],
    extra_texts: dict[str, tuple[AnyDataset, str | None, str]],
    limits: dict[str, int | None],
) -> dict[str, AnyDataset]:
    """Turn the texts of every split and further set into rows of tokens, cut to their limits."""
    options = data_args.preprocessing(block_size)
    how = {"num_proc": data_args.preprocessing_num_workers, "overwrite_cache": data_args.overwrite_cache}
    own = {split: raw[split] for split in limits if split in raw}
    with training_args.main_process_first(desc="preparing the texts"):
        rows = dict(prepare_clm_datasets(own, tokenizer, options, text_column=data_args.text_column_name, **how))
        for name, (texts, column, boundary) in extra_texts.items():
            of_kind = replace(options, document_boundary=boundary)
            rows |= prepare_clm_datasets({name: texts}, tokenizer, of_kind, text_column=column, **how)
    return {split: first_rows(rows[split], limit) for split, limit in limits.items()}


def load_tokenizer(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: DPSMConfig,
    raw: Mapping[str, AnyDataset],
    *,
    resuming: bool,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on the train split."""

    def training_texts() -> Any:
        column = choose_text_column(raw["train"], data_args.text_column_name, "train")
        return column_texts(raw["train"], [column])

    return resolve_tokenizer(
        model_args.tokenizer_name or model_args.model_name_or_path or "",
        output_dir=training_args.output_dir or ".",
        training_texts=training_texts,
        vocab_size=model_args.tokenizer_vocab_size,
        model_max_length=data_args.block_size or DEFAULT_MAX_LENGTH,
        resuming=resuming,
        main_process_first=training_args.main_process_first,
        **hub_options(model_args),
        use_fast=model_args.use_fast_tokenizer,
    )


def load_model(
    model_args: ModelArguments, data_args: DataTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the model or make a fresh one, with a row of embeddings for every token."""
    options = hub_options(model_args)
    source = model_args.config_name or model_args.model_name_or_path
    if source is not None:
        config = AutoConfig.from_pretrained(source, **options)
        if model_args.tokenizer_name == TRAIN_BPE:
            config.update(
                {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            )
    else:
        config = build_config_from_scratch(
            model_args.model_type, model_args.config_overrides, tokenizer, block_size=data_args.block_size
        )
    model: PreTrainedModel
    if model_args.model_name_or_path is not None:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=model_args.dtype, **options
        )
    else:
        dtype = None if model_args.dtype == "auto" else model_args.dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model_args.trust_remote_code)
        logger.info("Training from scratch: %.2f million parameters.", model.num_parameters() / 1e6)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # type: ignore[index, union-attr]
        model.resize_token_embeddings(len(tokenizer))
    return model


def hub_options(model_args: ModelArguments) -> dict[str, Any]:
    """Give the options that every `from_pretrained` takes."""
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def first_rows(rows: AnyDataset, limit: int | None) -> AnyDataset:
    """Cut a split to a number of rows, or leave it whole."""
    return rows if limit is None else rows.take(limit)


def number_of_rows(rows: AnyDataset, limit: int | None) -> int | None:
    """Count the rows of a split; of a stream only the limit is known."""
    return len(rows) if hasattr(rows, "__len__") else limit


def evaluate(trainer: DPSMTrainer, prefix: str, rows: AnyDataset, samples: int | None) -> dict[str, float]:
    """Evaluate on a split, log and save the metrics."""
    logger.info("*** Evaluate (%s) ***", prefix)
    metrics = trainer.evaluate(rows, metric_key_prefix=prefix)
    if samples is not None:
        metrics[f"{prefix}_samples"] = samples
    # exp(loss) is off where a model's loss divides by another count than the scored tokens, as GPT-2's does.
    if prefix == "eval":
        metrics["perplexity"] = metrics["eval_perplexity"]  # run_clm.py's name
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


def describe(trainer: DPSMTrainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Write the model card, and push to the hub where --push_to_hub asks for it."""
    card: dict[str, Any] = {"tasks": "text-generation"}
    if model_args.model_name_or_path is not None:
        card["finetuned_from"] = model_args.model_name_or_path
    else:
        # The card says "trained from scratch" where the config names no model but a folder, and else names model "".
        trainer.model.config._name_or_path = trainer.args.output_dir  # type: ignore[union-attr]
    if data_args.dataset_name is not None:
        card["dataset"] = data_args.dataset_name
        if data_args.dataset_name not in EMBEDDED_DATASETS:  # A tag links to the hub, where those are not.
            card["dataset_tags"] = data_args.dataset_name
        if data_args.dataset_config_name is not None:
            card["dataset_args"] = data_args.dataset_config_name
            card["dataset"] = f"{data_args.dataset_name} {data_args.dataset_config_name}"
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def _mp_fn(index: int) -> None:
    """Entry point of one TPU process under xla_spawn."""
    main()


if __name__ == "__main__":
    main()
