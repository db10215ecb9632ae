"""Compare loss and gradient of `DPSMTrainer` with the model's own, for every language model class of Transformers.

python -m benchmarks.model_sweep --table docs/models.md

Each class is built small from its default configuration (`benchmarks.tiny_models`) and run in a process of its own
with a time limit, so that a crash does not end the others. At ``scoring_rule="ce"``, loss and gradient of a batch must
equal the model's own, both from full logits and inside the head.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import os
import re
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from benchmarks.common import HERE, commit
from benchmarks.tiny_models import batch_for, build
from dpsm_hf import DPSMConfig, DPSMTrainer
from dpsm_hf.models.language_model import inputs_without_labels
from dpsm_hf.models.own_loss import own_loss

TABLES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
COLUMNS = (
    "class", "tables", "result", "alignment", "loss_function", "fused", "loss", "extra", "loss_full", "loss_fused",
    "gradient_full", "gradient_fused", "needs", "reason", "seconds", "date", "transformers", "torch", "commit",
)  # fmt: skip
#: Relative difference above which a loss or a gradient counts as wrong.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


def classes() -> dict[str, list[str]]:
    """Return the name of every class with the tables that it is in."""
    found: dict[str, list[str]] = {}
    for table, names in TABLES.items():
        for value in names.values():
            for name in [value] if isinstance(value, str) else value:
                tables = found.setdefault(name, [])
                if table not in tables:
                    tables.append(table)
    return dict(sorted(found.items()))


def compare(name: str, given: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Any]:
    """Return the row of one class; ``given`` are further inputs for its batch."""
    row: dict[str, Any] = {"class": name, "result": "not built"}
    try:
        model = build(name)
    except Exception as error:
        return {**row, "reason": _message(error)}
    row["result"] = "not run"
    try:
        batch = {**batch_for(model), **given}
        model.train()
        own, theirs = _step(model, lambda: model(**batch).loss)
        again, _ = _step(model, lambda: model(**batch).loss)
        if not torch.isfinite(own):
            raise FloatingPointError(f"the model's own loss is {float(own)}")
        if abs(float(own - again)) > LOSS_TOLERANCE * abs(float(own)):
            raise ValueError(f"the model's own loss differs from call to call: {float(own)}, {float(again)}")
    except Exception as error:
        return {**row, "reason": _message(error)}
    try:
        own_loss(model, batch)
    except ValueError as error:
        if "makes other decoder inputs" in str(error) and "decoder_input_ids" not in given:
            fed = inputs_without_labels(model, batch)["decoder_input_ids"]
            more = {"decoder_input_ids": fed, "decoder_attention_mask": torch.ones_like(fed)}
            return {**compare(name, more), "needs": "decoder_input_ids in the batch"}
    row["loss"] = float(own)
    result = "ok"
    for mode, suffix in (("off", "full"), ("auto", "fused")):
        try:
            trainer = _trainer(model, mode)
            for _ in range(2):  # twice, because the first batch only checks the head
                mine, gradients = _step(model, partial(trainer.compute_loss, model, dict(batch)))
        except Exception as error:
            return {**row, "result": "refused", "reason": _message(error)}
        row[f"loss_{suffix}"], row[f"gradient_{suffix}"] = float(mine), _difference(gradients, theirs)
        off = abs(float(mine - own)) > LOSS_TOLERANCE * max(1.0, abs(float(own)))
        if off or not row[f"gradient_{suffix}"] <= GRADIENT_TOLERANCE:
            result = "WRONG"
        if mode == "auto":
            row["fused"] = "yes" if trainer._scorer.head is not None else "no"
            if trainer._scorer.head is None:
                row["reason"] = _why_not_fused(model, batch)
    found = own_loss(model, batch)
    assert found is not None
    row["alignment"], row["loss_function"] = found.alignment, "replaced" if found.replaceable else "its own"
    with torch.no_grad():
        scored = trainer._scorer.score(model, trainer._scorer.batch(model, batch, None), trainer._rule(True))
    row["extra"] = float(scored.added) if scored.added is not None and abs(float(scored.added)) > 1e-6 else 0.0
    return {**row, "result": result}


def _trainer(model: nn.Module, mode: str) -> Any:
    folder = tempfile.gettempdir()
    args = DPSMConfig(
        output_dir=folder, scoring_rule="ce", fused_head=mode, use_cpu=True, max_steps=1, report_to="none"
    )
    return DPSMTrainer(model=model, args=args)


def _step(model: nn.Module, loss_of: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = loss_of()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two gradients, relative to the norm of the second."""
    names = mine.keys() | theirs.keys()
    total = norm = 0.0
    for name in names:
        zero = torch.zeros(())
        a, b = mine.get(name, zero), theirs.get(name, zero)
        total += float((a - b).double().square().sum())
        norm += float(b.double().square().sum())
    return (total / max(norm, 1e-30)) ** 0.5


def _why_not_fused(model: nn.Module, batch: dict[str, Any]) -> str:
    found = own_loss(model, batch)
    if found is not None and found.adds:
        return "adds to its loss outside of self.loss_function"
    try:
        _trainer(model, "on").compute_loss(model, dict(batch))
    except ValueError as error:
        return str(error).split("of this model: ")[-1].split(". Use ")[0]
    return "unknown"


def _message(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]


# ---- one process per class -----------------------------------------------------------------------------------------


def in_a_process(name: str, folder: Path, memory: int) -> int:
    """Compare one class in a forked process; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        torch.set_num_threads(1)
        begin = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            row = compare(name)
        row["seconds"] = round(time.monotonic() - begin, 1)
        (folder / f"{name}.json").write_text(json.dumps(row))
    finally:
        os._exit(0)


def sweep(names: list[str], *, jobs: int, limit: float, memory: int) -> list[dict[str, Any]]:
    """Return the rows of classes, each measured in a process of its own.

    Args:
        names: the classes.
        jobs: processes at a time.
        limit: seconds for one class.
        memory: bytes of address space for one class.
    """
    rows: dict[str, dict[str, Any]] = {}
    running: dict[int, tuple[str, float]] = {}
    waiting = list(names)
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[in_a_process(name, folder, memory)] = name, time.monotonic()
            time.sleep(0.05)
            for pid, (name, begin) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                slow = time.monotonic() - begin > limit
                if not ended and slow:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                if not ended and not slow:
                    continue
                del running[pid]
                path = folder / f"{name}.json"
                missing = f"took more than {limit:.0f} s" if slow else f"the process ended with {status}"
                row = json.loads(path.read_text()) if path.exists() else {"result": "not run", "reason": missing}
                rows[name] = {"class": name, **row}
                print(
                    f"{len(rows):4}/{len(names)} {name:50} {row['result']:10} {row.get('reason', '')[:150]}",
                    flush=True,
                )
    return [rows[name] for name in names]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table of the compared classes, and that of those that were refused or could not be run."""
    head = "| class | tables | labels | head | adds | error of the loss | of the gradient |\n" + "|---" * 7 + "|\n"
    lines, others = [], []
    for row in rows:
        if row["result"] not in ("ok", "WRONG"):
            others.append(f"| {row['class']} | {row['tables']} | {row['result']} | {_cell(row['reason'])} |")
            continue
        losses = [
            abs(float(row[f"loss_{m}"]) - float(row["loss"])) / max(1.0, abs(float(row["loss"])))
            for m in ("full", "fused")
        ]
        gradients = [float(row[f"gradient_{m}"]) for m in ("full", "fused")]
        fused = "fused" if row["fused"] == "yes" else f"full logits: {_cell(row.get('reason', ''))}"
        extra = "" if not float(row["extra"]) else f"{float(row['extra']):.3g}"
        lines.append(
            f"| {row['class']} | {row['tables']} | {row['alignment']} | {fused} | {extra} | {max(losses):.0e} | "
            f"{max(gradients):.0e} |"
        )
    refused = "| class | tables | | reason |\n|---|---|---|---|\n" + "\n".join(others)
    return head + "\n".join(lines) + "\n\n" + refused + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")[:220]


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Replace the text between the two marks in a document by the table."""
    begin, end = "<!-- sweep -->", "<!-- /sweep -->"
    text = path.read_text()
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}\n\n{markdown(rows)}\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Run from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", help="names of classes to run; the rows of the others are kept")
    p.add_argument("--csv", type=Path, default=HERE / "results" / "models.csv")
    p.add_argument("--table", type=Path, help="document whose table is replaced")
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--limit", type=float, default=120.0, help="seconds for a class")
    p.add_argument("--memory", type=float, default=12.0, help="GiB of address space for a class")
    p.add_argument("--no-run", action="store_true", help="only write the table of what was measured before")
    arguments = p.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    every = classes()
    old: dict[str, dict[str, Any]] = {}
    if arguments.csv.exists():
        with arguments.csv.open(newline="") as file:
            old = {row["class"]: row for row in csv.DictReader(file)}
    if not arguments.no_run:
        names = arguments.only or list(every)
        made = {
            "date": datetime.date.today().isoformat(), "transformers": transformers.__version__,
            "torch": torch.__version__, "commit": commit(),
        }  # fmt: skip
        for row in sweep(names, jobs=arguments.jobs, limit=arguments.limit, memory=int(arguments.memory * 2**30)):
            old[row["class"]] = {**row, **made, "tables": " ".join(every.get(row["class"], []))}
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({key: row.get(key, "") for key in COLUMNS} for _, row in sorted(old.items()))
    rows = [row for _, row in sorted(old.items())]
    print(dict(Counter(row["result"] for row in rows)))
    if arguments.table:
        write_table(rows, arguments.table)


if __name__ == "__main__":
    main()
