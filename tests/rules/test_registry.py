"""Everything that lists the scoring rules follows from one file a rule."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpsm_hf import DPSMConfig, DPSMLoss, Objective, linear_scoring_loss, score_tokens
from dpsm_hf.measuring.kernel_report import VARIANTS
from dpsm_hf.rules import formulas
from dpsm_hf.rules.registry import PARAMETERS, RULES, SCORING_RULES, documented
from dpsm_hf.rules.rows import Rule

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_is_a_rule_and_is_listed() -> None:
    files = {path.stem for path in Path(formulas.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(SCORING_RULES)
    assert SCORING_RULES[:5] == ("dpsm", "ce", "brier", "spherical", "focal")
    (choices,) = (f.metadata["choices"] for f in dataclasses.fields(DPSMConfig) if f.name == "scoring_rule")
    assert choices == list(SCORING_RULES)
    assert set(SCORING_RULES) <= set(VARIANTS), "the kernel report leaves a rule out"


def test_the_table_in_the_documentation_is_that_of_the_rules() -> None:
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert text == documented(text), "run: python -m dpsm_hf.rules.registry docs/losses.md"
    assert all(f"| `{name}` |" in text for name in SCORING_RULES)


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.parameters], ids=lambda rule: rule.name)
def test_a_parameter_is_a_field_of_objective_and_arguments(rule: Rule, tmp_path: Path) -> None:
    for i, parameter in enumerate(rule.parameters):
        other = next(x for x in (0.25, 0.5, 1.0) if x != parameter.default and parameter.allowed(x))
        changed = {parameter.name: other}
        assert getattr(Objective(rule.name), parameter.name) == parameter.default
        assert Objective(rule.name, **changed).parameters[i] == other
        config = DPSMConfig(output_dir=str(tmp_path), scoring_rule=rule.name, **changed)
        assert config.objective().parameters[i] == other
        with pytest.raises(ValueError, match=f"{parameter.name}={other} has no effect .*scoring_rule='{rule.name}'"):
            DPSMConfig(output_dir=str(tmp_path), scoring_rule="ce", **changed)
        for wrong in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{parameter.name}={wrong} must "):
                Objective(rule.name, **{parameter.name: wrong})
        hidden, weight, labels = torch.eye(3), torch.randn(3, 3), torch.arange(3)
        given: dict[str, Any] = {"scoring_rule": rule.name}
        given |= changed if parameter.name == "focal_gamma" else {"rule_parameters": changed}
        expected = score_tokens(hidden @ weight.T, labels, Objective(rule.name, alpha=0.5, **changed)).loss
        assert expected is not None
        torch.testing.assert_close(
            linear_scoring_loss(hidden, weight, labels, alpha=0.5, **given).loss, expected.mean()
        )
        torch.testing.assert_close(DPSMLoss(3, fixed_alpha=0.5, **given)(hidden @ weight.T, labels), expected.mean())
    assert set(PARAMETERS) >= {parameter.name for parameter in rule.parameters}
    with pytest.raises(TypeError, match="no_parameter"):
        Objective(rule.name, no_parameter=1.0)  # type: ignore[call-arg]


def test_the_rules_import_torch_alone() -> None:
    code = "import sys, dpsm_hf.rules.scoring_rules; assert not {'triton', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "given", [{"scoring_rule": 1.0}, {"z_loss": 1.0}, {"focal_gamma": 1.0}, {"alpha": 0.5}, {"nope": 1.0}]
)
def test_rule_parameters_that_the_rule_does_not_have_are_refused(given: dict[str, float]) -> None:
    (name,) = given
    message = f"scoring_rule='gce' has no '{name}' to be given here; it has gce_q"
    with pytest.raises(ValueError, match=message):
        DPSMLoss(12, scoring_rule="gce", warmup_steps=1, rule_parameters=given)
    with pytest.raises(ValueError, match=message):
        linear_scoring_loss(
            torch.zeros(1, 2), torch.zeros(12, 2), torch.zeros(1).long(), scoring_rule="gce", rule_parameters=given
        )


@pytest.mark.parametrize("value", ["a", None])
def test_a_parameter_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"gce_q={value} must lie in \(0, 1\]"):
        Objective("gce", gce_q=value)
