"""The command ``dpsm demo``: a campaign of a few runs (cross-entropy, Brier, DPSM), and a page on what came out.

    dpsm demo                            # or: make demo
    dpsm demo --preset summarization     # or: make demo PRESET=summarization
    dpsm demo --preset finetune          # a real pretrained model, with LoRA
    dpsm demo --steps 50 -- --learning_rate 3e-4     # what follows -- goes to every run

The runs are those of ``shipped/demo-PRESET.yaml``, with the same seed, hence the same initial weights and the same
batches; only the loss differs. As in every campaign finished runs are kept and a stopped one goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ..runtime.environment import PACKAGE, versions
from ..runtime.files import check_folder, read_json, write_json
from ..runtime.mistakes import exit_status
from .report.side_by_side import RunsPage, write_runs_page
from .runner.launching import LOG_NAME, run_folder
from .runner.lock import runner_at_work
from .runner.progress import Progress
from .runner.records import read_records
from .runner.running import run_campaign
from .spec.design import Campaign
from .verdict.results import Results

PRESETS = ("clm", "summarization", "finetune")
#: Which code and which library versions the runs of the folder were made with.
CODE_NAME = "code.json"
# Shown of an evaluation while it runs; the log has all.
_CHIEF = (
    "eval_nll", "eval_perplexity", "eval_brier", "eval_ece_15", "eval_token_accuracy", "eval_rougeL", "epoch",
)  # fmt: skip
# What plans runs and reads them cannot change their numbers.
_READERS = ("campaign", "measuring", "plots")


def load_demo(preset: str, steps: int | None = None, seed: int = 42, extra: Sequence[str] = ()) -> Campaign:
    """Read a preset's campaign, with other steps and another seed if wanted.

    ``extra`` are arguments for every run as on a command line, which win over the preset's; one that is unknown or
    refused is a SpecError.
    """
    from .spec.loading import load_campaign  # needs torch and transformers, which take seconds

    changes = [f"seeds=[{seed}]"] + ([] if steps is None else [f"base.max_steps={steps}"])
    changes += [f"base.{name}={value}" for name, value in _arguments(extra).items()]
    return load_campaign(Path(__file__).parent / "shipped" / f"demo-{preset}.yaml", overrides=changes)


def _arguments(words: Sequence[str]) -> dict[str, str]:
    """Return the arguments of a command line: ``--name value``, ``--name=value``, ``--name`` alone for true."""
    values: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values[name] = [value] if equals else []
        elif name:
            values[name].append(word)
        else:
            raise ValueError(f"{word!r} stands behind -- without an argument's name; write --name value.")
    return {name: given[0] if len(given) == 1 else f"[{', '.join(given)}]" if given else "true"
            for name, given in values.items()}  # fmt: skip


def get_models(campaign: Campaign) -> None:
    """Make the models that the package knows by name before the first run, whose error nobody would read."""
    from ..models.pretrained import named_model  # needs torch and transformers, which take seconds

    runs = campaign.runs.values()
    for name, cache in {(r.arguments.get("model_name_or_path"), r.arguments.get("cache_dir")) for r in runs}:
        if name is not None:
            named_model(str(name), cache)


def forget_other_code(directory: Path) -> None:
    """Delete runs that were made with other code or other library versions, which are not to be taken for these."""
    path, now = directory / CODE_NAME, {"sources": source_digest(), "versions": versions()}
    if (read_json(path) if path.exists() else None) != now and runner_at_work(directory) is None:
        for made in ("runs", "tokenizer"):
            shutil.rmtree(directory / made, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(now, path)


def source_digest(package: Path = PACKAGE) -> str:
    """Hash the package's sources that the numbers of a run depend on."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(tuple(f"{room}/" for room in _READERS)):
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class FollowedRuns(Progress):
    """A campaign's progress, and of the run under way what it writes, as it comes."""

    def __init__(
        self, directory: Path, campaign: Campaign, order: list[str], names: Mapping[str, str], *stream: None
    ) -> None:
        super().__init__(campaign, order, names)
        self.directory, self.order = directory, order
        self.titles = {p.run_id: campaign.variation(p.variation).title for p in campaign.points}
        self.followed = ""
        self.log: BinaryIO | None = None
        self.pending = b""
        self.bar = False  # whether a progress bar stands in the last line

    def say(self, text: str) -> None:
        super().say(f"\n{text}" if self.bar else text)
        self.bar = False

    def tick(self, active: Mapping[str, float], estimate: Callable[[], float | None]) -> None:
        for run_id in active:
            self.show(run_id)

    def ended(self, run_id: str, status: str, seconds: float, message: str, left: float | None) -> None:
        self.show(run_id)
        if self.log is not None:
            self.log.close()
        super().ended(run_id, status, seconds, message, left)

    def show(self, run_id: str) -> None:
        """Write what a run has written to its log since the last call."""
        folder = run_folder(self.directory, run_id)
        if run_id != self.followed:
            number = self.order.index(run_id) + 1
            self.say(f"\n[{number}/{len(self.order)}] {self.titles[run_id]} -> {folder}")
            self.followed, self.pending, self.log = run_id, b"", (folder / LOG_NAME).open("rb")
            # what earlier attempts have written was shown then
            self.log.seek(max(0, self.log.read().rfind(b"=== attempt")))
        assert self.log is not None  # it was opened with the first call for this run
        if not (chunk := self.log.read()):
            return
        *lines, self.pending = (self.pending + chunk).split(b"\n")
        for line in lines:
            # of a progress bar its last state
            seen = brief(line.decode("utf-8", errors="replace").rstrip("\r").rsplit("\r", 1)[-1])
            if seen is not None:
                sys.stderr.write(f"\r{seen}\n")
        state = self.pending.rsplit(b"\r", 1)[-1]
        self.bar = b"%|" in state  # its line ends with the work
        if self.bar:
            sys.stderr.write("\r" + state.decode("utf-8", errors="replace"))
        sys.stderr.flush()


def brief(line: str) -> str | None:
    """Return what is shown of a line of a run's output: of the fifty figures of an evaluation the chief ones."""
    if line.startswith("=== attempt"):
        return None
    if (start := line.find("{'eval_")) >= 0 and line.rstrip().endswith("}"):
        figures = ast.literal_eval(line[start:].strip())
        return line[:start] + ", ".join(f"{name} {value}" for name, value in figures.items() if name in _CHIEF)
    name = line.split("=")[0].strip()
    return None if name.startswith("eval_") and "=" in line and name not in _CHIEF else line


def run_demo(campaign: Campaign, directory: Path) -> int:
    """Do the missing runs of a demo, report on all that exist, and return `run_campaign`'s exit code: 0, 1 or 130."""
    started = time.perf_counter()
    directory = directory.resolve()
    forget_other_code(directory)
    for record in read_records(directory, campaign.order).values():
        if record.status == "ok":
            print(f"{record.name}: already done with the same settings, kept", file=sys.stderr)
    code = run_campaign(campaign, directory, progress=lambda *given: FollowedRuns(directory, *given))
    records = read_records(directory, campaign.order)
    if code != 2 and records:
        sizes, data = (next(iter(campaign.titles[kind].values())) for kind in ("size", "data"))
        page = write_runs_page(Results(campaign, records), directory, campaign.title, f"{sizes}, on {data}.")
        print_page(page, time.perf_counter() - started)
    return code


def print_page(page: RunsPage, seconds: float) -> None:
    """Print the tables, the sentences and the paths of a page, and how many seconds the demo took."""
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    print("\n" + page.table + "\n")
    for sentence in page.sentences:
        print(textwrap.fill(sentence, width, initial_indent="• ", subsequent_indent="  "))
    print(f"\nPage:     {page.html}\nNumbers:  {page.results}")
    if page.plots:
        print(f"Pictures: {page.plots[0].parent} ({len(page.plots)} files)")
    print(f"The demo took {seconds:.0f} s.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from a command line (``sys.argv``'s by default) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="dpsm demo",
        description="Train one model with cross-entropy, Brier and DPSM on real text, and compare.",
        epilog="Arguments after -- are handed to every run of the training script.",
    )
    about = (
        "clm: a small GPT-2 from scratch; summarization: a small BART from scratch; finetune: SmolLM2-135M with LoRA"
    )
    parser.add_argument("--preset", choices=PRESETS, default="clm", help=f"{about} (default: %(default)s)")
    parser.add_argument("--output_dir", default="demo-output", help="runs and report go to OUTPUT_DIR/PRESET")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each run (default: the preset's)")
    parser.add_argument("--seed", type=int, default=42, help="seed of weights and batches, the same for all runs")
    options = parser.parse_args(words[:cut])
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: a run needs at least one step")
    # The texts come with Python, so that no run has to ask the hub for anything. A run writes into a file and does not
    # see how wide the terminal is, nor whether there is one.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("COLUMNS", str(shutil.get_terminal_size((100, 24)).columns))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "5")
    return exit_status(lambda: _demo(options, words[cut + 1 :]))


def _demo(options: argparse.Namespace, words: Sequence[str]) -> int:
    campaign = load_demo(options.preset, options.steps, options.seed, words)
    folder = check_folder(options.output_dir, "--output_dir")
    get_models(campaign)
    return run_demo(campaign, folder / options.preset)
