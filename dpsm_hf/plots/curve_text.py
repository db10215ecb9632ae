"""What a reliability diagram says in words: its title, and the labels of its curves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from .curve_series import CurveSeries

# What fits on a line of the figure in the fonts used there.
_HEADING_CHARACTERS, _LABEL_CHARACTERS = 54, 50


def title_lines(series: Sequence[CurveSeries], split: str) -> list[list[str]]:
    """Say what a diagram of these curves shows, as lines of parts.

    Args:
        series: one, whose ECE is named, or several.
        split: name of the evaluated split, or empty.
    """
    tokens, bins = _span([one.tokens for one in series], "{:,}".format), sorted({len(one.count) for one in series})
    numbers = "/".join(str(number) for number in bins)
    first = [split] if split else []
    first += [f"{tokens} tokens", f"{numbers} bin" if numbers == "1" else f"{numbers} bins"]
    errors = [ece_with_interval(series[0])] if len(series) == 1 else []
    nulls = [one.ece_null for one in series if one.ece_null is not None]
    if nulls:
        errors.append(f"{'null' if errors else 'null ECE'} {_span(nulls, _number)}")
    scaled = series[0].scaled if len(series) == 1 else None
    last = [] if scaled is None else [f"{after(scaled)}: {ece_with_interval(scaled)}"]
    return [line for line in (first, errors, last) if line]


def wrapped(line: str) -> list[str]:
    """Break a heading where it is too long, between its parts if that helps."""
    hard = "\N{NO-BREAK SPACE}"
    kept = " · ".join(part.replace(" ", hard) for part in line.split(" · "))
    lines = textwrap.wrap(kept, _HEADING_CHARACTERS)
    return [_plain(part.replace(hard, " ").removesuffix(" ·")) for part in lines]


def wrapped_label(text: str) -> str:
    """Break a label of the legend where it is too long, before its bracket if it has one."""
    text = _plain(text)
    if len(text) <= _LABEL_CHARACTERS:
        return text
    name, bracket, rest = text.rpartition(" (")
    lines = textwrap.wrap(name if bracket else text, _LABEL_CHARACTERS)
    return "\n".join([*lines, f"({rest}"] if bracket else lines)


def _plain(text: str) -> str:
    """Keep matplotlib from reading names as formulas, or as labels to leave out of the legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def after(scaled: CurveSeries) -> str:
    """Name a curve after temperature scaling by its temperature."""
    return "scaled" if scaled.temperature is None else f"at T = {scaled.temperature:.3g}"


def short_ece(series: CurveSeries) -> str:
    """Name the ECE of a curve."""
    return f"ECE {_number(series.ece)}"


def ece_with_interval(series: CurveSeries) -> str:
    """Name the ECE of a curve and its confidence interval, if that is known."""
    if series.ece_interval is None:
        return short_ece(series)
    low, high = (_number(bound) for bound in series.ece_interval)
    return f"{short_ece(series)}, 95 %: {low}–{high}"


def _span(values: Sequence[Any], written: Callable[[Any], str]) -> str:
    low, high = written(min(values)), written(max(values))
    return low if low == high else f"{low}–{high}"


def _number(value: float) -> str:
    return "not a number" if math.isnan(value) else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"
