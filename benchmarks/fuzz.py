"""Fuzz settings and data files: is every mistake refused with an error that names it?

python -m benchmarks.fuzz --settings 2000 --files 500

Settings are given as YAML, JSON, command lines, file and command line together, campaign files and arguments of the
constructor; half of them have one invalid value. Data files of every kind are damaged and read by both scripts, each
in a process of its own. Problems are: an error that names neither option nor file, another kind of exception, an
invalid value that is accepted, a valid value that is changed, and a process that crashes or hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dpsm_hf import DPSMConfig, DPSMSeq2SeqConfig
from dpsm_hf.campaign.spec.loading import load_campaign
from dpsm_hf.campaign.spec.script_arguments import RESERVED, argument_fields, quiet
from dpsm_hf.runtime.former_names import ARGUMENTS as FORMER_ARGUMENTS
from dpsm_hf.runtime.typed_values import AT_LEAST, options_of, words_of
from dpsm_hf.tasks import get_task
from dpsm_hf.training.arguments import dpsm_field_names

FORMS = ("yaml", "json", "words", "file and words", "campaign", "python")
TASKS = ("language-modelling", "summarization")

#: Options whose valid values depend on the machine, the hub, other files or other options; no valid ones are drawn.
_ELSEWHERE = {"deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "bf16", "fp16", "tf32"}
_ELSEWHERE |= {"bf16_full_eval", "fp16_full_eval", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
_ELSEWHERE |= {
    "push_to_hub",
    "output_dir",
    "use_cpu",
    "dataloader_pin_memory",
    "ddp_backend",
    "report_to",
    "debug",
    "token",
}
_ELSEWHERE |= {"dataset_name", "model_type", "tokenizer_name", "generation_config", "log_on_each_node", "do_eval"}
_ELSEWHERE |= {"train_file", "validation_file", "test_file", "calibration_file", "gradient_checkpointing"}
_ELSEWHERE |= {"disable_tqdm", "greater_is_better", "include_num_input_tokens_seen", "trackio_static_space_id"}

#: Invalid values of the right type.
OUT_OF_RANGE: dict[str, list[Any]] = {
    **{name: [least - 1] for name, least in AT_LEAST.items()},
    **{f"alpha_{name}": [2, -0.5] for name in ("start", "end")},
    **{f"max_{name}_samples": [0, -1] for name in ("train", "eval", "predict")},
    **{f"max_{name}_length": [0, -1] for name in ("source", "target")},
    **{name: [2, -0.5] for name in ("score_smoothing", "flip_target_tokens", "low_resource")},
    **{name: [1, 0, -5] for name in ("block_size", "min_remainder")},
    **{name: [0, -1] for name in ("chunk_tokens", "early_stopping_patience", "preprocessing_num_workers")},
    **{name: [-1] for name in ("classwise_tokens", "focal_gamma", "z_loss", "sample_outputs", "min_source_words")},
    "calibration_bins": [0, 7, -15],
    "calibration_split_percentage": [0, 100],
    "stop_at_step": [0, -1, 1.5],
    "alpha_warmup_steps": [-1],
    "tokenizer_vocab_size": [1],
}


@dataclasses.dataclass(frozen=True)
class Raw:
    """A word to write into YAML without quotes."""

    word: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """One option with a value, and the value that it should become; ``wrong`` if it should be refused."""

    name: str
    value: Any
    wanted: Any = None
    wrong: bool = False


@dataclasses.dataclass
class Tally:
    """The results: how often each outcome occurred, and every problem in full."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, outcome: str, problem: str | None = None) -> None:
        """Count an outcome, and keep the problem if it is one."""
        self.counts[outcome] += 1
        if problem is not None:
            self.problems.append(f"{outcome}: {problem}")


# ---- settings -------------------------------------------------------------------------------------------------------


def _sound(name: str, hint: Any, choices: list[str], form: str) -> st.SearchStrategy[tuple[Any, Any]]:
    """Return valid values of an option, each with the value that it should become."""
    text, options = form not in ("campaign", "python"), options_of(hint)
    pairs: list[st.SearchStrategy[tuple[Any, Any]]] = []
    if choices:
        pairs.append(st.sampled_from(choices).map(lambda word: (word, word)))
        if form == "yaml":
            pairs.append(st.sampled_from(choices).map(lambda word: (Raw(word), word)))
    elif bool in options:
        words = [(True, True), (False, False), *([("false", False), ("true", True), ("no", False)] if text else [])]
        pairs.append(st.sampled_from(words))
    elif int in options:
        least = max(2, AT_LEAST.get(name, 2))
        whole = st.integers(least, least + 58)
        pairs.append(whole.flatmap(lambda n: st.sampled_from([(n, n), *([(str(n), n)] * text)])))
    elif float in options:
        numbers = st.sampled_from([0.25, 0.5, 0.75])
        pairs.append(numbers.flatmap(lambda x: st.sampled_from([(x, x), *([(f"{x:e}", x)] * text)])))
    elif str in options:
        pairs.append(st.sampled_from(["a", "some words", "ünï", "100 %", "null "]).map(lambda word: (word, word)))
        if form == "yaml":
            pairs.append(st.sampled_from(["no", "007", "1e5", "on", "2024-01-01"]).map(lambda word: (Raw(word), word)))
    if type(None) in options and form not in ("words", "file and words", "campaign"):
        pairs.append(st.just((None, None)))
    return st.one_of(pairs)


def _nonsense(name: str, hint: Any, choices: list[str], form: str) -> st.SearchStrategy[Any]:
    """Return invalid values of an option."""
    options, words_only = options_of(hint), form in ("words", "file and words")
    wrong: list[Any] = list(OUT_OF_RANGE.get(name, []))
    if not words_only:
        wrong += [{"a": [1]}] if dict not in map(_plain, options) else [[1], 5]
        wrong += [[[1], {}]]
        wrong += [None] if type(None) not in options and form != "campaign" else []
        wrong += [math.nan, math.inf] if form in ("json", "python", "yaml") and int in options else []
        wrong += [[True], [1]] if not any(word in str(hint) for word in ("list", "List")) else []
        wrong += [[], ["a", "b"]] if not any(word in str(hint) for word in ("list", "List")) else []
    if choices:
        wrong += ["maybe", "None", " "]
    elif bool in options and str not in options:
        wrong += ["maybe", "truee", "2", "nan", "", *([] if words_only else [2, 1.5, -1])]
    elif int in options:
        wrong += ["1.5", "ten", "nan", "inf", "1e999", "", "0x", *([] if words_only else [1.5, True])]
    elif float in options:
        wrong += ["nan", "fast", "", "1,5", *([] if words_only else [True, math.nan])]
        wrong += ["inf", "1e999", "-inf"] if name != "max_grad_norm" else []
    elif name.endswith("_kwargs"):
        wrong += ["{", "twice"]
    return st.sampled_from([value for value in wrong if not (words_only and isinstance(value, (dict, list)))] or [...])


@st.composite
def setting_cases(draw: Callable[..., Any]) -> tuple[str, str, list[Setting]]:
    """Draw a task, a form and one to three settings, of which at most the first is invalid."""
    task, form = draw(st.sampled_from(TASKS)), draw(st.sampled_from(FORMS))
    fields = argument_fields(task)
    names = sorted(
        dpsm_field_names()
        if form == "python"
        else set(fields) - {*FORMER_ARGUMENTS, *(RESERVED if form == "campaign" else ())}
    )
    found: list[Setting] = []
    for index, name in enumerate(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))):
        hint, field = fields[name]
        choices = [str(word) for word in field.metadata.get("choices", ())] or words_of(hint)
        if index == 0 and draw(st.booleans()):
            value = draw(_nonsense(name, hint, choices, form))
            if value is not ...:
                found.append(Setting(name, value, wrong=True))
        elif name not in _ELSEWHERE and not (dict in map(_plain, options_of(hint)) or "list" in str(hint)):
            found.append(Setting(name, *draw(_sound(name, hint, choices, form))))
    return task, form, found


def _plain(option: Any) -> Any:
    return getattr(option, "__origin__", option)


_BASE = {"model_type": "gpt2", "tokenizer_name": "train-bpe", "dataset_name": "python-docs", "use_cpu": True}
_BASE |= {"do_train": True, "max_steps": 10}
_CAMPAIGN: dict[str, Any] = {
    "name": "try",
    "title": "A try",
    "task": "language-modelling",
    "reference": "ce",
    "brier": "brier",
    "base": {"do_train": True, "do_eval": True, "do_predict": True, "fit_temperature": True, "max_steps": 10},
    "variations": {
        "ce": {"arguments": {"scoring_rule": "ce"}},
        "brier": {"arguments": {"scoring_rule": "brier"}},
        "dpsm": {},
    },
    "sizes": {"tiny": {"arguments": {"model_type": "gpt2", "tokenizer_name": "train-bpe"}}},
    "data": {"docs": {"arguments": {"dataset_name": "python-docs"}}},
    "seeds": [1],
    "studies": {"main": {"variations": "all"}},
    "budget": {"limit": 1.2},
    "scales": {"small": {}, "paper": {}},
}


def _written(value: Any, form: str) -> str:
    if isinstance(value, Raw):
        return value.word
    if isinstance(value, float) and not math.isfinite(value) and form != "json":
        return {"nan": ".nan", "inf": ".inf"}.get(str(value), "-.inf")
    return json.dumps(value)


def _words(found: list[Setting]) -> list[str]:
    shown = {True: "true", False: "false"}
    return [f"--{s.name}={shown[s.value] if isinstance(s.value, bool) else s.value}" for s in found]


def _parse(task: str, form: str, found: list[Setting], folder: Path) -> Any:
    """Give settings to the package in a form, and return the argument objects; none for a campaign."""
    own = {s.name: s.value for s in found}
    base = {name: value for name, value in {**_BASE, "output_dir": str(folder / "out")}.items() if name not in own}
    if task == "summarization" and "model_type" in base:
        base["model_type"] = "bart"
    if form == "python":
        config = DPSMConfig if task == "language-modelling" else DPSMSeq2SeqConfig
        return [config(output_dir=str(folder / "out"), use_cpu=True, **own)]
    if form == "campaign":
        kept = {name: value for name, value in _CAMPAIGN["base"].items() if name not in own}
        text = yaml.safe_dump(_CAMPAIGN | {"task": task, "base": kept}, sort_keys=False)
        lines = "".join(f"  {s.name}: {_written(s.value, form)}\n" for s in found)
        path = folder / "campaign.yaml"
        path.write_text(text.replace("base:\n", f"base:\n{lines}", 1), encoding="utf-8")
        load_campaign(path)
        return []
    suffix = "json" if form == "json" else "yaml"
    path, inside = folder / f"settings.{suffix}", [] if form in ("words", "file and words") else found
    pairs = [*base.items(), *((s.name, s.value) for s in inside)]
    if form == "json":
        path.write_text("{" + ",\n".join(f"{json.dumps(k)}: {_written(v, form)}" for k, v in pairs) + "}", "utf-8")
    else:
        path.write_text("".join(f"{k}: {_written(v, form)}\n" for k, v in pairs), encoding="utf-8")
    words = _words(found) if form in ("words", "file and words") else []
    before = [f"--{k}={v}" for k, v in base.items()] if form == "words" else ["--config", str(path)]
    run = get_task(task).parse([*before, *words])
    run.check()
    return [run.model_args, run.data_args, run.outcome_args, run.training_args]


def _settings_outcome(task: str, form: str, found: list[Setting], folder: Path) -> tuple[str, str | None]:
    shown = f"{task}, {form}: " + ", ".join(f"{s.name}={s.value!r}{' (nonsense)' if s.wrong else ''}" for s in found)
    errors = io.StringIO()
    try:
        with quiet(), contextlib.redirect_stderr(errors):
            holders = _parse(task, form, found, folder)
    except (ValueError, FileNotFoundError, SystemExit) as error:
        message = f"{error} {errors.getvalue()[-2000:]}"
        # an error about two equal variations names these and the line, not the option
        if not any(s.name in message for s in found) and "has the same arguments as" not in message:
            return "an error that names no option", f"{shown}\n    {type(error).__name__}: {message[-300:]}"
        return ("nonsense refused" if found[0].wrong else "contradiction refused"), None
    except Exception as error:
        return "another kind of traceback", f"{shown}\n    {type(error).__name__}: {error}"
    if any(s.wrong for s in found):
        return "nonsense taken", shown
    for setting in found:
        holder = next((holder for holder in holders if hasattr(holder, setting.name)), None)
        value = getattr(holder, setting.name, setting.wanted)
        if value != setting.wanted and setting.wanted is not None:
            return "a sound value changed", f"{shown}: {setting.name} is {value!r}"
    return "sound and taken", None


def fuzz_settings(cases: int, number: int = 0) -> Tally:
    """Try so many random settings; ``number`` is the seed."""
    tally = Tally()

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(setting_cases())
    def attempt(case: tuple[str, str, list[Setting]]) -> None:
        task, form, found = case
        if found:
            with tempfile.TemporaryDirectory() as folder:
                tally.add(*_settings_outcome(task, form, found, Path(folder)))

    attempt()
    return tally


# ---- data files -----------------------------------------------------------------------------------------------------

_ROWS = [
    {"text": f"Line {index} of a text, with some more words in it.", "summary": f"Line {index}.", "n": index}
    for index in range(40)
]
_KINDS = ("csv", "json", "jsonl", "txt", "parquet", "jsonl.gz", "csv.gz")
_INSERTS = [
    b"null",
    b"null\n",
    b"\nnull\n",
    b"[",
    b"{",
    b"]",
    b"}",
    b'"',
    b",",
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
]
_INSERTS += [b"\xed\xa0\x80"]
_INSERTS += [b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"\\ud800", b"NaN", b"1e999", b"[" * 50_000, b'{"a":' * 50_000]
#: Kinds of parquet files by their columns; only the bytes of the first kind are damaged.
_PARQUET = (
    "text",
    "view",
    "large",
    "numbers",
    "lists",
    "nulls",
    "no rows",
    "no columns",
    "bytes",
    "bad",
    "labels",
)


@dataclasses.dataclass(frozen=True)
class Damage:
    """One change to the bytes of a file."""

    kind: str  # cut, drop, flip, insert, repeat
    at: float
    length: int
    insert: bytes


def _damages() -> st.SearchStrategy[list[Damage]]:
    kinds = st.sampled_from(["cut", "drop", "flip", "insert", "insert", "repeat"])
    places = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    one = st.builds(Damage, kinds, places, st.integers(1, 40), st.sampled_from(_INSERTS))
    return st.lists(one, min_size=0, max_size=4)


def _damaged(data: bytes, damages: list[Damage]) -> bytes:
    for damage in damages:
        at = int(damage.at * len(data))
        if damage.kind == "cut":
            data = data[:at]
        elif damage.kind == "drop":
            data = data[:at] + data[at + damage.length :]
        elif damage.kind == "repeat":
            data = data[:at] + data[at : at + damage.length] * 3 + data[at + damage.length :]
        elif damage.kind == "flip":
            flipped = bytes(byte ^ 0xA5 for byte in data[at : at + damage.length // 8 + 1])
            data = data[:at] + flipped + data[at + len(flipped) :]
        else:
            data = data[:at] + damage.insert + data[at:]
    return data


def _sound_bytes(kind: str, columns: str) -> bytes:
    if kind == "parquet":
        return _parquet(columns)
    lines = {
        "csv": ["text,summary,n", *(f'"{row["text"]}","{row["summary"]}",{row["n"]}' for row in _ROWS)],
        "jsonl": [json.dumps(row) for row in _ROWS],
        "json": [json.dumps(_ROWS)],
        "txt": [str(row["text"]) for row in _ROWS],
    }[kind.removesuffix(".gz")]
    return ("\n".join(lines) + "\n").encode()


def _parquet(columns: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, summaries = ([str(row[key]) for row in _ROWS] for key in ("text", "summary"))
    kinds = {"view": pa.string_view(), "large": pa.large_string(), "bytes": pa.binary()}
    if columns == "no columns":
        table = pa.table({})
    elif columns == "bad":
        data = [text.encode() for text in texts[:-1]] + [b"sch\xf6n"]
        bad = pa.Array.from_buffers(pa.string(), len(data), pa.array(data, type=pa.binary()).buffers())
        table = pa.table({"text": bad, "summary": summaries})
    elif columns == "numbers":
        table = pa.table({"text": list(range(40)), "summary": [0.5] * 40})
    elif columns == "lists":
        table = pa.table({"text": [[text] for text in texts], "summary": [{"a": text} for text in texts]})
    elif columns == "nulls":
        table = pa.table({"text": [None] * 40, "summary": [None] * 40})
    elif columns == "labels":
        table = pa.table({"text": pa.array(texts).dictionary_encode(), "summary": summaries})
    else:
        kind = kinds.get(columns, pa.string())
        table = pa.table({"text": pa.array(texts).cast(kind), "summary": pa.array(summaries).cast(kind)})
    target = io.BytesIO()
    pq.write_table(table.slice(0, 0) if columns == "no rows" else table, target)
    return target.getvalue()


def _prepared() -> dict[str, tuple[Any, Any]]:
    """Return a tokenizer and a tiny model by task."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from dpsm_hf.data.tokenizer import train_bpe_tokenizer
    from dpsm_hf.tasks.model_building import build_config_from_scratch

    tokenizer = train_bpe_tokenizer([str(row["text"]) for row in _ROWS], 290)
    clm = build_config_from_scratch("gpt2", "n_embd=8,n_layer=1,n_head=1,n_positions=64", tokenizer)
    pairs = "d_model=16,encoder_layers=1,decoder_layers=1"
    bart = build_config_from_scratch("bart", pairs, tokenizer)
    return {
        "language-modelling": (tokenizer, AutoModelForCausalLM.from_config(clm)),
        "summarization": (tokenizer, AutoModelForSeq2SeqLM.from_config(bart)),
    }


def _read_rows(task: str, path: Path, streaming: bool, tokenizer: Any, model: Any) -> None:
    """Read a data file as a training script does, up to its tokenized rows."""
    words = ["--train_file", str(path), "--do_train", "--max_steps", "1", "--use_cpu", "--report_to", "none"]
    words += ["--output_dir", str(path.parent / "out"), "--cache_dir", str(path.parent / "cache")]
    words += ["--tokenizer_name", "train-bpe", "--model_type", "gpt2" if task == "language-modelling" else "bart"]
    words += ["--block_size", "16", "--min_remainder", "2"] if task == "language-modelling" else []
    run = get_task(task).parse([*words, *(["--streaming"] if streaming else [])])
    run.check()
    run.load_data()
    list(run.training_texts())
    rows, _ = run.prepare_rows(tokenizer, model)
    for row in rows["train"]:
        assert all(isinstance(token, int) for token in row["labels"])


def _in_own_process(work: Callable[[], None], seconds: float = 60.0) -> tuple[str, str]:
    """Call a function in a forked process; return ``done``, ``error`` or ``crash``, and the error or signal."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        said = ["done", ""]
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            with quiet():
                work()
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = ["error", f"{type(error).__name__}\t{error}\t{place.filename}:{place.lineno}"]
        os.write(writing, json.dumps(said).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    heard = b""
    end = time.monotonic() + seconds
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while (left := end - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            if not (part := pipe.read(65536)):
                break
            heard += part
    if not heard:
        os.kill(child, signal.SIGKILL) if time.monotonic() >= end else None
    _, status = os.waitpid(child, 0)
    if not heard:
        return "crash", f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
    kind, text = json.loads(heard)
    return kind, text


def _nonsense_inside(path: Path) -> str | None:
    """Return what is wrong with a file that every reader should refuse; None if nothing is known."""
    if path.suffix == ".parquet":
        return None
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (OSError, EOFError):
        return "is no whole gzip file"
    if ".json" in path.name and any(line.strip() == b"null" for line in data.splitlines()):
        return "has null for a row"
    return None


def fuzz_files(cases: int, number: int = 0) -> Tally:
    """Damage so many data files and read them as the scripts do; ``number`` is the seed."""
    tally, ready = Tally(), _prepared()
    drawn = st.tuples(
        st.sampled_from(TASKS), st.sampled_from(_KINDS), st.sampled_from(_PARQUET), st.booleans(), _damages()
    )

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn)
    def attempt(case: tuple[str, str, str, bool, list[Damage]]) -> None:
        task, kind, columns, streaming, damages = case
        streaming = streaming and task == "language-modelling"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"data.{kind}"
            data = _damaged(_sound_bytes(kind, columns), [] if columns != "text" and kind == "parquet" else damages)
            path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
            ended, said = _in_own_process(lambda: _read_rows(task, path, streaming, *ready[task]))
            changes = "+".join(damage.kind for damage in damages) or "nothing"
            shown = (
                f"{task}, {kind}{f' ({columns})' if kind == 'parquet' else ''}, {streaming=}, {changes}: {said[:600]}"
            )
            if ended == "crash":
                tally.add("crash of the process", shown)
            elif ended == "error":
                error, message, _ = (*said.split("\t"), "", "")[:3]
                named = any(word in message for word in (path.name, "train split", "train set", "olumn"))
                if error not in ("ValueError", "FileNotFoundError") or not named:
                    tally.add("a traceback that does not name the file", shown)
                else:
                    tally.add("refused with a name")
            elif (wrong := _nonsense_inside(path)) is not None:
                tally.add("nonsense taken", f"{shown} {wrong}")
            else:
                tally.add("read")

    attempt()
    return tally


def _report(title: str, tally: Tally, seconds: float) -> None:
    print(f"{title}: {sum(tally.counts.values())} cases in {seconds:.0f} s, {len(tally.problems)} problems")
    for outcome, count in sorted(tally.counts.items()):
        print(f"  {count:6d}  {outcome}")
    for problem in tally.problems:
        print(f"- {problem}")


def main() -> int:
    """Run from the command line; the exit status is 1 if there were problems."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--settings", type=int, default=2000, help="configurations and command lines")
    p.add_argument("--files", type=int, default=500, help="data files")
    p.add_argument("--seed", type=int, default=0)
    options = p.parse_args()
    problems = 0
    for title, work, cases in (
        ("settings", fuzz_settings, options.settings),
        ("data files", fuzz_files, options.files),
    ):
        begun = time.monotonic()
        if cases:
            tally = work(cases, options.seed)
            _report(title, tally, time.monotonic() - begun)
            problems += len(tally.problems)
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
