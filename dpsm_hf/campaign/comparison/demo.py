"""Train one small model three times on real text (cross-entropy, Brier, DPSM) and report what came out.

    python -m dpsm_hf demo                            # or: make demo
    python -m dpsm_hf demo --preset summarization     # or: make demo PRESET=summarization
    python -m dpsm_hf demo --steps 50 -- --learning_rate 3e-4     # what follows -- goes to every run

Each run is a child process of ``run_clm_dpsm.py`` or ``run_summarization_dpsm.py`` with the same seed, hence the same
initial weights and the same batches; only ``--loss_type`` differs. Finished runs are kept: a second call repeats only
what is missing or was made with other settings, other library versions or other code.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.loading import load_text_datasets
from ...data.tokenizer import TRAIN_BPE, column_texts, resolve_tokenizer
from ...runtime.child_process import run_child
from ...runtime.environment import PACKAGE, versions
from ..runner.launching import PROGRAM
from .records import LOSS_TITLES, RunRecord, read_json, read_run
from .report import Report, write_report

LOSSES = ("ce", "brier", "dpsm")
# Shown of an evaluation while it runs; the log has all.
_CHIEF = (
    "eval_nll", "eval_perplexity", "eval_brier", "eval_ece_15", "eval_token_accuracy", "eval_rougeL", "epoch",
)  # fmt: skip
# What reads finished runs cannot change them.
_READERS = {
    "demo.py",
    "child_process.py",
    "report.py",
    "records.py",
    "findings.py",
    "plots.py",
    "reliability.py",
    "curve_series.py",
    "curve_text.py",
    "figures.py",
}


@dataclass(frozen=True)
class Preset:
    """One job of the demo.

    Args:
        command: word behind ``dpsm`` that trains.
        title: heading of the report.
        subtitle: what is trained on what, in a sentence.
        dataset: name of the built-in real text.
        columns: its columns of text, for the tokenizer.
        vocabulary: size of the tokenizer trained on its train split.
        steps: optimizer steps.
        arguments: its other arguments.
    """

    command: str
    title: str
    subtitle: str
    dataset: str
    columns: tuple[str, ...]
    vocabulary: int
    steps: int
    arguments: Mapping[str, str]


_COMMON = {
    "do_train": "true",
    "do_eval": "true",
    "lr_scheduler_type": "cosine",
    "weight_decay": "0.01",
    "adam_beta2": "0.95",
    "eval_on_start": "true",
    "eval_strategy": "steps",
    "logging_first_step": "true",
    "save_strategy": "no",
    "dataloader_pin_memory": "false",
    "report_to": "none",
    "log_level": "warning",
}

PRESETS: Mapping[str, Preset] = {
    "clm": Preset(
        command="clm",
        title="Cross-entropy, Brier and DPSM on the Python documentation",
        subtitle="A small GPT-2, trained from scratch as a language model on python-docs (the Python language "
        "reference and the docstrings of the standard library).",
        dataset="python-docs",
        columns=("text",),
        vocabulary=2048,
        steps=400,
        arguments={
            **_COMMON,
            "model_type": "gpt2",
            # Wider initial weights than GPT-2's 0.02, which is meant for a width of 768.
            "config_overrides": "n_embd=128,n_layer=4,n_head=4,n_positions=128,initializer_range=0.08,"
            "resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
            "block_size": "128",
            "max_eval_samples": "160",
            "per_device_train_batch_size": "8",
            "per_device_eval_batch_size": "16",
            "learning_rate": "3e-3",
            "warmup_steps": "20",
            "logging_steps": "20",
            "eval_steps": "50",
        },
    ),
    "summarization": Preset(
        command="summarization",
        title="Cross-entropy, Brier and DPSM on docstring summaries",
        subtitle="A small BART, trained from scratch to write the summary line of a docstring from its body "
        "(python-docstrings, the standard library).",
        dataset="python-docstrings",
        columns=("document", "summary"),
        vocabulary=2048,
        steps=300,
        arguments={
            **_COMMON,
            "model_type": "bart",
            "config_overrides": "d_model=128,encoder_layers=2,decoder_layers=2,encoder_attention_heads=4,"
            "decoder_attention_heads=4,encoder_ffn_dim=512,decoder_ffn_dim=512,max_position_embeddings=256,dropout=0.0",
            "max_source_length": "192",
            "max_target_length": "32",
            "per_device_train_batch_size": "16",
            "per_device_eval_batch_size": "16",
            "predict_with_generate": "true",
            "num_beams": "1",
            "learning_rate": "3e-3",
            "warmup_steps": "20",
            "logging_steps": "10",
            "eval_steps": "100",
        },
    ),
}


def build_command(
    preset: Preset, loss: str, output_dir: Path, tokenizer: Path, steps: int, seed: int, extra: Sequence[str] = ()
) -> list[str]:
    """Write the command line of one run.

    Args:
        preset: the job.
        loss: the training loss.
        output_dir: the run's folder.
        tokenizer: folder of the trained tokenizer.
        steps: optimizer steps.
        seed: seed of the weights and of the order of the batches.
        extra: arguments appended as they are; they win over the preset's.
    """
    arguments = {
        "dataset_name": preset.dataset,
        "tokenizer_name": str(tokenizer),
        **preset.arguments,
        "max_steps": str(steps),
        "seed": str(seed),
        "loss_type": loss,
        "output_dir": str(output_dir),
    }
    pairs = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    return [sys.executable, *PROGRAM, preset.command, *pairs, *extra]


def source_digest() -> str:
    """Hash the sources that a run depends on, so that runs of other code are not taken for these."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in _READERS:
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_done(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder holds a finished run that was made with exactly these settings.

    Args:
        directory: the run's folder.
        settings: command, versions and digest of the sources.
    """
    path = directory / "run.json"
    if not path.exists() or not (directory / "trainer_state.json").exists():
        return False
    try:
        run = read_json(path)
    except ValueError:
        return False
    return run.get("status") == "finished" and all(run.get(key) == value for key, value in settings.items())


def train_one(command: list[str], directory: Path, loss: str, seed: int, digest: str) -> RunRecord:
    """Do one run unless it is there already, and read its record.

    Args:
        command: the command line.
        directory: the run's folder; emptied when the run is repeated.
        loss: the training loss.
        seed: the seed.
        digest: digest of the sources.

    Raises:
        KeyboardInterrupt: when interrupted; the folder then holds a run marked as such.
    """
    settings = {"command": command, "versions": versions(), "digest": digest}
    if is_done(directory, settings):
        print("      already done with the same settings: kept", file=sys.stderr)
        return read_run(directory)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    run: dict[str, Any] = {"schema": 1, "name": loss, "loss_type": loss, "seed": seed, **settings}
    _write_run(directory, {**run, "status": "interrupted", "message": "stopped before it had finished"})
    result = run_child(command, directory / "log.txt", shown=brief)
    run |= {"seconds": round(result.seconds, 2), "exit_code": result.exit_code}
    measured = {"cpu_seconds": result.cpu_seconds, "peak_memory_mb": result.peak_memory_mb}
    run |= {key: round(value, 1) for key, value in measured.items() if value is not None}
    if result.exit_code == 0:
        _write_run(directory, {**run, "status": "finished"})
    elif result.exit_code == 130:
        raise KeyboardInterrupt
    else:
        last = result.tail[-1] if result.tail else "no output"
        _write_run(directory, {**run, "status": "failed", "message": f"exit code {result.exit_code}: {last}"})
        print(f"\nThe {loss} run failed with exit code {result.exit_code}. Its last lines:", file=sys.stderr)
        print(textwrap.indent("\n".join(result.tail), "    "), file=sys.stderr)
        print(f"All of its output: {directory / 'log.txt'}", file=sys.stderr)
    return read_run(directory)


def brief(line: str) -> str | None:
    """Return what is shown of a line of a run's output: of the fifty figures of an evaluation the chief ones.

    Args:
        line: of the output; all of it is kept in the log.
    """
    if (start := line.find("{'eval_")) >= 0 and line.rstrip().endswith("}"):
        figures = ast.literal_eval(line[start:].strip())
        return line[:start] + ", ".join(f"{name} {value}" for name, value in figures.items() if name in _CHIEF)
    name = line.split("=")[0].strip()
    return None if name.startswith("eval_") and "=" in line and name not in _CHIEF else line


def _write_run(directory: Path, run: Mapping[str, Any]) -> None:
    temporary = directory / "run.json.part"
    temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / "run.json")


def make_tokenizer(preset: Preset, directory: Path) -> Path:
    """Train the tokenizer that all runs share on the train split, unless it is there already.

    Args:
        preset: the job.
        directory: folder of the demo; the tokenizer goes to ``tokenizer`` in it.
    """
    train = load_text_datasets(preset.dataset)["train"]
    resolve_tokenizer(
        TRAIN_BPE,
        output_dir=directory,
        training_texts=lambda: column_texts(train, preset.columns),
        vocab_size=preset.vocabulary,
        sequence_template=len(preset.columns) > 1,
    )
    return directory / "tokenizer"


def print_report(report: Report, seconds: float) -> None:
    """Print the table, the sentences and the paths.

    Args:
        report: the report.
        seconds: how long the demo took.
    """
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    print("\n" + report.table + "\n")
    for sentence in report.sentences:
        print(textwrap.fill(sentence, width, initial_indent="• ", subsequent_indent="  "))
    print(f"\nPage:     {report.html}\nNumbers:  {report.results}")
    if report.plots:
        print(f"Pictures: {report.plots[0].parent} ({len(report.plots)} files)")
    print(f"The demo took {seconds:.0f} s.")


def run_demo(
    preset: Preset, directory: Path, steps: int | None = None, seed: int = 42, extra: Sequence[str] = ()
) -> int:
    """Do the missing runs and report on all that exist.

    Args:
        preset: the job.
        directory: folder of this preset's runs and report.
        steps: optimizer steps; the preset's own by default.
        seed: seed of the weights and of the order of the batches.
        extra: arguments for every run; they win over the preset's.

    Returns:
        Exit code: 0 when every run finished, 1 when one failed, 130 after an interrupt.
    """
    started = time.perf_counter()
    digest = source_digest()
    directory.mkdir(parents=True, exist_ok=True)
    records: list[RunRecord] = []
    code = 0
    try:
        tokenizer = make_tokenizer(preset, directory)
        for number, loss in enumerate(LOSSES, 1):
            print(f"\n[{number}/{len(LOSSES)}] {LOSS_TITLES[loss]} -> {directory / loss}", file=sys.stderr, flush=True)
            command = build_command(preset, loss, directory / loss, tokenizer, steps or preset.steps, seed, extra)
            records.append(train_one(command, directory / loss, loss, seed, digest))
            if records[-1].status != "finished":
                code = 1
    except KeyboardInterrupt:
        code = 130
        done = ", ".join(record.name for record in records) or "none"
        print(
            f"\nInterrupted. Finished runs are kept ({done}); the same command makes the others, from their start.",
            file=sys.stderr,
        )
    if records:
        report = write_report(records, directory, preset.title, preset.subtitle)
        print_report(report, time.perf_counter() - started)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from a command line.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m dpsm_hf.campaign.comparison.demo",
        description="Train one small model with cross-entropy, Brier and DPSM on real text, and compare.",
        epilog="Arguments after -- are handed to every run of the training script.",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="clm", help="clm: GPT-2; summarization: BART")
    parser.add_argument("--output_dir", default="demo-output", help="runs and report go to OUTPUT_DIR/PRESET")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each run (default: the preset's)")
    parser.add_argument("--seed", type=int, default=42, help="seed of weights and batches, the same for all runs")
    options = parser.parse_args(words[:cut])
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: a run needs at least one step")
    preset = PRESETS[options.preset]
    directory = Path(options.output_dir) / options.preset
    try:
        return run_demo(preset, directory, options.steps, options.seed, words[cut + 1 :])
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
