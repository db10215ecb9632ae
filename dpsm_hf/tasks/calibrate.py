"""Fit a temperature for a saved model and report every calibration metric before and after.

    dpsm calibrate MODEL --dataset python-docs
    dpsm calibrate MODEL --calibration_file held-out.txt --test_file test.txt --apply weights

The temperature is fitted on the calibration split by NLL and judged on the test split, which it has not seen; those
of least Brier score and of equal confidence and accuracy are reported beside it. Causal language models and
encoder-decoders alike; ``accelerate launch -m dpsm_hf calibrate ...`` shares the work.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..data.loading import load_text_datasets
from ..evaluation.temperature import FILE_NAME, TemperatureScaler
from ..models.pretrained import named_model
from ..runtime.mistakes import exit_status
from . import task_of_model
from .adapters import base_of, load_with_adapter, merged, tokenizer_source
from .model_building import load_saved_tokenizer
from .scaled_model import PLACES, check_target, save_scaled

APPLICATIONS = ("none", *PLACES)
_MODEL = "model"  # folder of the scaled model in that of the output

_OTHER_DATA = "a temperature is judged on other data than it is fitted on."
_LOCAL_REMEDY = (
    "Use local files with --calibration_file and --test_file (csv, json, jsonl, txt or parquet), a folder with such "
    "files as --dataset, or the real text that every Python carries with --dataset python-docs (language models) or "
    "python-docstrings (encoder-decoders)."
)
_DESCRIPTION = (__doc__ or "").replace("``", "")

# Tokens of an encoder-decoder's rows where nobody says.
_MOST_TOKENS = {"max_source_length": 1024, "max_target_length": 128}

# Rows of the table.
_ROWS = (
    ("nll", "NLL (nats)"), ("perplexity", "perplexity"), ("brier", "Brier score"),
    ("ece_10", "ECE-10"), ("ece_15", "ECE-15"), ("ece_100", "ECE-100"),
    ("debiased_ece", "debiased ECE-15"), ("adaptive_ece", "adaptive ECE"),
    ("smooth_ece", "smooth ECE"), ("mce", "MCE-15"), ("signed_gap", "confidence - accuracy"),
)  # fmt: skip

_OF_OTHER_FITS = (("nll", "NLL"), ("brier", "Brier score"), ("ece_15", "ECE-15"))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command = argparse.ArgumentParser(
        prog="dpsm calibrate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("model", help="folder of a saved model or PEFT adapter, a name on the hub, or smollm2-135m")
    data = command.add_argument_group("data")
    data.add_argument("--dataset", help="python-docs, python-docstrings, a folder, or a name on the hub")
    data.add_argument("--dataset_config_name", help="configuration of the data set")
    data.add_argument("--calibration_split", default="validation", help="split to fit on (default: %(default)s)")
    data.add_argument("--test_split", default="test", help="split to report on (default: %(default)s)")
    data.add_argument("--calibration_file", help="instead of a data set: txt, csv, json, jsonl or parquet to fit on")
    data.add_argument("--test_file", help="instead of a data set: file of the same kind to report on")
    data.add_argument("--text_column", help="column with the text (encoder-decoders: the full texts)")
    data.add_argument("--prompt_column", help="language models: column of prompts, as dpsm clm takes it; see there")
    data.add_argument("--completion_column", help="language models: column of the completions, which alone are scored")
    data.add_argument("--prompt_template", help="text of the prompt, in which {prompt} stands for the column's text")
    text = "put prompt and completion into the tokenizer's chat template"
    data.add_argument("--use_chat_template", action="store_true", help=text)
    data.add_argument("--summary_column", help="encoder-decoders: column with the summaries")
    data.add_argument("--max_samples", type=int, help="use at most this many rows of each split")
    data.add_argument("--block_size", type=int, help="tokens of a row (default: the model's positions, 1024 at most)")
    for name, most in _MOST_TOKENS.items():
        text = f"encoder-decoders (default: the model's positions, {most} at most)"
        data.add_argument(f"--{name}", type=int, help=text)
    data.add_argument("--source_prefix", default="", help="encoder-decoders: text before every source")
    run = command.add_argument_group("evaluation and output")
    run.add_argument("--output_dir", default="calibrate-output", help="where to write (default: %(default)s)")
    run.add_argument("--per_device_eval_batch_size", type=int, default=8, help="(default: %(default)s)")
    run.add_argument("--bf16", action="store_true", help="evaluate in bf16")
    run.add_argument("--use_cpu", action="store_true", help="do not use a GPU that is there")
    run.add_argument("--bins", type=int, default=15, help="bins of the reliability diagram (default: %(default)s)")
    text = (
        "also save the model in OUTPUT_DIR/model with the temperature in its generation config (sampling), or folded "
        "into its output weights where that is exact"
    )
    run.add_argument("--apply", choices=APPLICATIONS, default="none", help=text)
    text = "keep the labels that a text is made to begin with (BART's first <s>) out of the figures and of the fit"
    run.add_argument("--ignore_forced_tokens", action="store_true", help=text)
    run.add_argument("--trust_remote_code", action="store_true", help="allow a model that brings code of its own")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after a wrong argument or data that cannot be used, said in one line."""
    options = parser().parse_args(argv)
    return exit_status(lambda: calibrate(options))


def calibrate(options: argparse.Namespace) -> dict[str, float]:
    """Fit, report, write and apply as the options say; return the test split's ``test_...`` and ``test_..._scaled``.

    Raises:
        ValueError: for options that contradict each other, missing splits, or a temperature that cannot be fitted or
            applied.
    """
    _check(options)
    _check_model(options.model)
    options.model = named_model(options.model)
    trust, base = {"trust_remote_code": options.trust_remote_code}, base_of(options.model)
    config = AutoConfig.from_pretrained(base or options.model, **trust)
    task = task_of_model(config)
    tokenizer = load_saved_tokenizer(tokenizer_source(options.model, base), **trust)
    if base is None:
        model = task.auto_model.from_pretrained(options.model, config=config, **trust)
    else:
        adapted: Any = load_with_adapter(task.auto_model, options.model, base, config=config, **trust)
        model = adapted
        if options.apply != "none":  # the copy with the temperature is a whole model
            model = merged(adapted, options.model, f"leave out --apply {options.apply}")
    for name, remedy in task.without_effect.items():
        if getattr(options, name) not in (None, "", False):
            raise ValueError(f"--{name} {getattr(options, name)!r} has no effect on {type(model).__name__}: {remedy}.")
    rows, collator = task.calibration_rows(options, _splits(options), tokenizer, model)
    # only what is exact may be asked for: find out before the long part
    if options.apply == "weights":
        TemperatureScaler().fold_into(model)
    args: Any = task.training_class(
        output_dir=options.output_dir, scoring_rule="ce", fit_temperature=True, calibration_bins=options.bins,
        calibration_metrics="all",
        ignore_forced_tokens=options.ignore_forced_tokens,
        per_device_eval_batch_size=options.per_device_eval_batch_size, bf16=options.bf16, use_cpu=options.use_cpu,
        dataloader_pin_memory=torch.cuda.is_available(), report_to="none",
    )  # fmt: skip
    data = {"calibration_dataset": rows["calibration"], "data_collator": collator}
    trainer = task.trainer_class(model=model, args=args, processing_class=tokenizer, **data)
    scaler = trainer.fit_temperature()  # an evaluation would report without one that cannot be fitted
    metrics = trainer.evaluate(rows["test"], metric_key_prefix="test")
    assert trainer.panel is not None and trainer.panel.scaled is not None
    trainer.save_metrics("test", metrics, combined=False)
    if trainer.is_world_process_zero():
        print(_table(scaler, trainer.panel.tokens.intervals(), trainer.panel.scaled.intervals(), metrics))
        print("\n".join(_other_fits(scaler, metrics)))
        if conflict := trainer.panel.temperature_conflict:
            print(conflict)
        folder = Path(options.output_dir)
        print(f"\ntemperature: {folder / FILE_NAME}\ndiagram: {folder / 'calibration' / 'test-step-000000.png'}")
        if options.apply != "none":
            target = folder / _MODEL
            save_scaled(model, tokenizer, scaler, target, place=options.apply, source=options.model)
            print(f"model with the temperature in its {options.apply.replace('_', ' ')}: {target}")
    return metrics


def _check(options: argparse.Namespace) -> None:
    files = [name for name in ("calibration_file", "test_file") if getattr(options, name) is not None]
    if options.dataset is not None and files:
        raise ValueError(f"--dataset and --{files[0]} contradict each other: give one or the other.")
    if options.dataset is None and len(files) < 2:
        raise ValueError(f"give --dataset, or both --calibration_file and --test_file: {_OTHER_DATA}")
    if options.dataset is not None and options.calibration_split == options.test_split:
        raise ValueError(f"--calibration_split and --test_split are both {options.test_split!r}: {_OTHER_DATA}")
    if options.dataset is None:
        defaults = parser()
        for name in ("dataset_config_name", "calibration_split", "test_split"):
            if getattr(options, name) != defaults.get_default(name):
                raise ValueError(f"--{name} {getattr(options, name)!r} has no effect without --dataset: leave it out.")
        if Path(options.calibration_file).resolve() == Path(options.test_file).resolve():
            raise ValueError(f"--calibration_file and --test_file are both {options.test_file!r}: {_OTHER_DATA}")
    if options.apply != "none":
        try:
            check_target(Path(options.output_dir) / _MODEL, options.model)
        except ValueError as error:
            raise ValueError(f"--output_dir {options.output_dir!r}: {error}") from None
    for name in ("max_samples", "per_device_eval_batch_size", "block_size", "bins"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")


def _check_model(model: str) -> None:
    """Refuse a path that is none; transformers would take it for a name on the hub."""
    path = Path(model).expanduser()
    if (path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1) and not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise ValueError(
            f"the model {model!r} {what}: give the folder that save_pretrained or a script's --output_dir wrote, the "
            "one with config.json, or a name on the hub."
        )


def _splits(options: argparse.Namespace) -> dict[str, Any]:
    if options.dataset is None:
        files = {"calibration_file": options.calibration_file, "test_file": options.test_file}
        return dict(load_text_datasets(**files, required_splits=["calibration", "test"]))
    names = {"calibration": options.calibration_split, "test": options.test_split}
    raw: Mapping[str, Any] = load_text_datasets(
        options.dataset, options.dataset_config_name, required_splits=[], validation_split_percentage=None,
        remedy=_LOCAL_REMEDY,
    )  # fmt: skip
    for name, split in names.items():
        if split not in raw:
            there = f"{options.dataset} has no {split!r} split; it has {', '.join(map(repr, raw))}."
            raise ValueError(f"{there} Choose one with --{name}_split.")
    return {name: raw[split] for name, split in names.items()}


_Intervals = Mapping[str, tuple[float, float]]


def _table(scaler: TemperatureScaler, before: _Intervals, after: _Intervals, metrics: Mapping[str, float]) -> str:
    """Return the figures of the test split before and after, with their intervals."""
    lines = [
        f"temperature {scaler.temperature:.4f}, fitted on {scaler.tokens:,} tokens (NLL {scaler.nll_before:.4f} -> "
        f"{scaler.nll_after:.4f}); figures of {metrics['test_tokens']:,} test tokens, 95 % intervals over documents:",
        "",
        f"{'':<22}{'before':>12}  {'':<22}{'after':>12}",
    ]
    for name, heading in _ROWS:
        cells = []
        for suffix, intervals in (("", before), ("_scaled", after)):
            value = metrics.get(f"test_{name}{suffix}")
            low, high = intervals.get(name, (math.nan, math.nan))
            interval = f"[{low:.4f}, {high:.4f}]" if math.isfinite(low) and math.isfinite(high) else ""
            cells.append(f"{'' if value is None else f'{value:.4f}':>12}  {interval:<22}")
        lines.append(f"{heading:<22}{''.join(cells)}".rstrip())
    lines.append(f"{'ECE-15 if calibrated':<22}{metrics['test_ece_15_null']:>12.4f}  {'':<22}"
                 f"{metrics['test_ece_15_null_scaled']:>12.4f}")  # fmt: skip
    return "\n".join(lines)


def _other_fits(scaler: TemperatureScaler, metrics: Mapping[str, float]) -> list[str]:
    """Return what the test split shows after scaling by the temperatures that were fitted by something else."""
    words = {"brier": "Brier score", "gap": "confidence = accuracy"}
    lines = [""]
    for name, temperature in scaler.others.items():
        figures = [f"{label} {metrics[f'test_{key}_scaled_by_{name}']:.4f}" for key, label in _OF_OTHER_FITS]
        lines.append(f"fitted by {words[name]}: temperature {temperature:.4f}; after it {', '.join(figures)}")
    return [*lines, *([scaler.left_out] if scaler.left_out else [])]


if __name__ == "__main__":
    sys.exit(main())
