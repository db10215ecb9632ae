"""The part of a model card that says what the model was trained with and how well calibrated it came out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import DPSMArguments

_BEGIN, _END = "<!-- dpsm_hf: begin -->", "<!-- dpsm_hf: end -->"

_METRICS = {
    "nll": "negative log-likelihood (nats a token)",
    "perplexity": "perplexity",
    "brier": "Brier score",
    "token_accuracy": "token accuracy",
    "confidence": "mean confidence",
    "signed_gap": "confidence minus accuracy",
    "ece_10": "ECE, 10 equal-width bins",
    "ece_15": "ECE, 15 equal-width bins",
    "ece_100": "ECE, 100 equal-width bins",
    "tokens": "scored tokens",
}


def objective_section(arguments: DPSMArguments, max_steps: int, log_history: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown with the training objective and the last evaluation's token metrics.

    Shares of the schedule refer to ``max_steps``, the optimizer steps of the run; 0 if nothing was trained.
    """
    lines = ["## Training objective", ""]
    if arguments.scoring_rule == "dpsm":
        lines.append("Dynamic Proper-Score Mixing, `(1 - alpha) * CE + alpha * Brier` for each token.")
        if max_steps > 0:
            lines.append(f"Schedule: {arguments.schedule().describe(max_steps)}.")
    else:
        lines.append(f"The token-level scoring rule `{arguments.scoring_rule}`.")
    names = ("label_smoothing_factor", "score_smoothing", "z_loss")
    if options := [f"`{name}={value:g}`" for name in names if (value := getattr(arguments, name, 0.0))]:
        lines.append("Options: " + ", ".join(options) + ".")
    last = next((entry for entry in reversed(log_history) if "eval_nll" in entry), None)
    if last is not None:
        lines += ["", f"Evaluation at step {last['step']}, token-level and top-label, one run:", ""]
        lines += ["| metric | value |", "|---|---|"]
        known = {name: text for name, text in _METRICS.items() if f"eval_{name}" in last}
        lines += [f"| {text} | {last[f'eval_{name}']:,.6g} |" for name, text in known.items()]
    return "\n".join(lines)


def with_equal_columns(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return log entries in which every evaluation has the same keys, a dash where it lacks a figure.

    The card's table takes its columns from the first evaluation and fails on others. Before training a model may
    generate nothing but empty texts, so that there are no figures of generated tokens yet.
    """
    columns = dict.fromkeys(key for entry in log_history if "eval_loss" in entry for key in entry)
    return [
        {key: entry.get(key, "–") for key in columns} if "eval_loss" in entry else dict(entry) for entry in log_history
    ]


def add_objective_section(card: Path, section: str) -> None:
    """Put the section at the end of a model card, in place of the one that an earlier call put there."""
    text = card.read_text(encoding="utf-8")
    text = re.sub(rf"\n*{_BEGIN}.*?{_END}\n*", "\n", text, flags=re.DOTALL)
    card.write_text(f"{text.rstrip()}\n\n{_BEGIN}\n{section}\n{_END}\n", encoding="utf-8")
