"""What `DPSMSFTConfig` and `DPSMSFTTrainer` take and refuse, and a machine without TRL."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, ProcessorMixin, TrainingArguments

from dpsm_hf import DPSMConfig, DPSMSeq2SeqConfig, DPSMTrainer
from tests.tiny import make_data, make_model
from tests.trl.sft import (
    DPSMSFTConfig,
    DPSMSFTTrainer,
    SFTConfig,
    SFTTrainer,
    data,
    settings,
    small_model,
    small_tokenizer,
)

ROOT = Path(__file__).resolve().parents[2]


def make(args: Any, kind: Any = DPSMSFTTrainer) -> Any:
    return kind(small_model(), args, train_dataset=data("messages"), processing_class=small_tokenizer())


def test_the_defaults_are_those_of_sft_config_but_for_the_rule(tmp_path: Path) -> None:
    ours, theirs = (kind(str(tmp_path), use_cpu=True).to_dict() for kind in (DPSMSFTConfig, SFTConfig))
    differences = {name for name, value in theirs.items() if ours[name] != value}
    assert differences == {"loss_type"}
    assert ours["scoring_rule"] == "dpsm" and ours["alpha_end"] == 1.0


def test_the_command_line_takes_both_kinds_of_fields(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--scoring_rule", "brier", "--packing"]
    line += ["--assistant_only_loss", "true"]
    (args,) = HfArgumentParser(DPSMSFTConfig).parse_args_into_dataclasses(line)
    assert (args.scoring_rule, args.packing, args.assistant_only_loss) == ("brier", True, True)
    again = DPSMSFTConfig(str(tmp_path), use_cpu=True, loss_type=args.loss_type)  # as a file of settings would have it
    assert again.loss_type == args.loss_type


def test_trls_own_default_is_taken(tmp_path: Path) -> None:
    assert make(DPSMSFTConfig(**settings(tmp_path, loss_type="nll"))).args.loss_type == "nll"
    with pytest.warns(FutureWarning, match="chunked_nll"):
        assert DPSMSFTConfig(**settings(tmp_path, loss_type="chunked_nll", scoring_rule="ce")).loss_type == "nll"
    both = DPSMSFTConfig(**settings(tmp_path, loss_type="dft", scoring_rule="dft"))  # TRL has this rule too
    assert make(both).args.scoring_rule == "dft"


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"loss_type": "sdft"}, r"loss_type='sdft' .*scoring_rule='dpsm'.*leave loss_type out.*trl.SFTTrainer"),
        ({"loss_type": "dft", "scoring_rule": "ce"}, r"loss_type='dft' .*scoring_rule='ce'.*write scoring_rule='dft'"),
        ({"loss_type": "chunked_nll"}, r"loss_type='chunked_nll' .*choose scoring_rule='ce'"),
        ({"loss_type": "brier"}, r"loss_type='brier' .*write scoring_rule='brier'"),
    ],
)
def test_another_loss_type_is_refused(options: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=remedy):
        DPSMSFTConfig(**settings(tmp_path, **options))


def test_a_plain_config_with_another_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type='dft' has no effect on scoring_rule='dpsm'"):
        make(SFTConfig(**settings(tmp_path, loss_type="dft")))
    changed = DPSMSFTConfig(**settings(tmp_path))
    changed.loss_type = "dft"
    with pytest.raises(ValueError, match="loss_type='dft' has no effect"):
        make(changed)


def test_sft_trainer_refuses_our_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs DPSMSFTTrainer"):
        make(DPSMSFTConfig(**settings(tmp_path)), SFTTrainer)


def test_an_unknown_alpha_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="alpha_ends"):
        DPSMSFTConfig(**settings(tmp_path, alpha_ends=0.5))
    with pytest.raises(ValueError, match="alpha_end=1.5"):
        DPSMSFTConfig(**settings(tmp_path, alpha_end=1.5))


def test_fields_of_dpsm_in_a_class_of_another_kind_are_refused(tmp_path: Path) -> None:
    @dataclass
    class Mine(SFTConfig):
        alpha_end: float = 0.5

    with pytest.raises(ValueError, match=r"Mine has alpha_end=0.5, which would have no effect.*DPSMSFTConfig"):
        make(Mine(**settings(tmp_path)))
    plain = TrainingArguments(str(tmp_path), use_cpu=True)
    plain.scoring_rule = "brier"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"TrainingArguments has scoring_rule='brier'.*use DPSMConfig"):
        DPSMTrainer(make_model("llama"), plain, train_dataset=make_data("llama"))


@pytest.mark.parametrize("config", [DPSMConfig, DPSMSeq2SeqConfig])
def test_the_config_of_another_trainer_is_refused(config: type, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"args is a {config.__name__}.*give DPSMSFTTrainer a DPSMSFTConfig"):
        make(config(str(tmp_path), use_cpu=True))


def test_plain_training_arguments_are_taken_as_by_sft_trainer(tmp_path: Path) -> None:
    trainer = make(TrainingArguments(str(tmp_path), use_cpu=True, bf16=False))
    assert isinstance(trainer.args, SFTConfig) and trainer.dpsm.scoring_rule == "dpsm"


def test_images_are_refused(tmp_path: Path) -> None:
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

    with pytest.raises(ValueError, match=r"processing_class is a Processor.*processor.tokenizer"):
        DPSMSFTTrainer(
            small_model(), DPSMSFTConfig(**settings(tmp_path)), train_dataset=data("text"),
            processing_class=Processor(small_tokenizer()),
        )  # fmt: skip


def test_nothing_else_needs_trl() -> None:
    for path in (ROOT / "dpsm_hf").rglob("*.py"):
        if path.parent.name == "trl":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            assert not any(name.split(".")[0] == "trl" for name in names), path


WITHOUT_TRL = """
import importlib.metadata
real = importlib.metadata.version

def told(name):
    if name != "trl":
        return real(name)
    if found is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return found

importlib.metadata.version = told
for found in (None, "1.9.2"):
    try:
        from dpsm_hf.trl import DPSMSFTTrainer
    except ImportError as error:
        print(error)
"""


def test_without_trl_the_error_has_the_line_that_gets_it() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRL], cwd=ROOT, capture_output=True, text=True, timeout=120)
    missing, old = done.stdout.splitlines()
    assert "TRL, which is not installed: pip install 'trl>=1.16,<2'" in missing
    assert "needs TRL 1.16 or newer, but 1.9.2 is installed: pip install 'trl>=1.16,<2'" in old
