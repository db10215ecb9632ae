"""Figures, axes and styles that all plots share.

Only matplotlib's object interface is used (``Figure`` with the Agg canvas, never pyplot), so drawing needs no display,
is safe in threads, and does not touch a user's own plots. Colours are those of Okabe & Ito (2008), which colour-blind
readers can tell apart; marker and dash pattern repeat the distinction for print without colour.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

OKABE_ITO = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), "-.", (0, (3, 1, 1, 1)), (0, (8, 3)), ":")
_FIXED_STYLES = {"ce": 0, "brier": 1, "dpsm": 2, "spherical": 3, "focal": 4}
# What pages call the losses.
_LOSSES = {"cross-entropy": "ce", "Brier": "brier", "DPSM": "dpsm", "focal loss": "focal"}


def empty_figure(width: float = 5.0, height: float = 3.6) -> Figure:
    """Make a figure without axes, sizes in inches, without touching pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_log_axis(ax: Axes) -> None:
    """Make the vertical axis of axes with data logarithmic, with enough plain numbers to read values off."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    if decades > 0.8:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0), numticks=12))
    else:  # less than a decade: evenly spaced numbers, which are nearly evenly spaced on the axis too
        ax.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def figure_of(ax: Axes) -> Figure:
    """Return the top-level figure of axes; ValueError if they were removed from it."""
    figure = ax.get_figure(root=True)
    if not isinstance(figure, Figure):
        raise ValueError("These axes belong to no figure any more; make new ones with figure.add_subplot().")
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure to a file whose ending names the format; missing folders are made.

    Args:
        figure: the figure.
        path: where to; ``.png``, ``.svg`` and ``.pdf`` are usual.
        dpi: dots per inch of pixel formats.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date, and in SVG no random names, so that the same numbers give the same bytes
    if path.suffix == ".svg":
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=dpi, metadata={"Date": None})
        path.write_text(_named_in_order(text.getvalue()), encoding="utf-8")
        return path
    figure.savefig(path, dpi=dpi, metadata={".pdf": {"CreationDate": None}}.get(path.suffix))
    return path


def _named_in_order(svg: str) -> str:
    """Number the markers, clip paths and hatches, to which matplotlib gives random names."""
    names = dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', svg))
    numbered = {name: f"{name[0]}{number}" for number, name in enumerate(names)}
    return re.sub(r"\b[a-z][0-9a-f]{10}\b", lambda found: numbered.get(found[0], found[0]), svg)


def run_style(name: str, position: int) -> dict[str, Any]:
    """Return colour, marker and dash pattern of a run; the known losses have fixed ones.

    Args:
        name: name of the run; ``ce``, ``brier``, ``dpsm``, ``spherical`` and ``focal`` have fixed styles.
        position: position among the runs, for any other name.
    """
    index = _FIXED_STYLES.get(_LOSSES.get(name, name), position + len(_FIXED_STYLES)) % len(OKABE_ITO)
    return {"color": OKABE_ITO[index], "marker": _MARKERS[index], "linestyle": _DASHES[index]}


def _shade(color: str, time: int) -> str:
    """Return a colour the first time, and mixed with black or white when it is used again."""
    if not time:
        return color
    other, share = (0.0, 0.45) if time % 2 else (1.0, 0.5)
    if color == "#000000":  # which has no darker shade
        other, share = 1.0, 0.35 + 0.2 * (time % 2)
    red, green, blue = ((1 - share) * part + share * other for part in to_rgb(color))
    return to_hex((red, green, blue))


def run_styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the styles of all runs in one figure: those of `run_style`, made distinct.

    From the eighth run on colours return darker, then paler, with other markers and dashes.
    """
    styles: list[dict[str, Any]] = []
    names = [_LOSSES.get(name, name) for name in names]
    used: set[int] = {_FIXED_STYLES[name] for name in names if name in _FIXED_STYLES}
    times: Counter[int] = Counter()
    for position, name in enumerate(names):
        index = _FIXED_STYLES.get(name)
        if index is None:
            following = [(position + len(_FIXED_STYLES) + i) % len(OKABE_ITO) for i in range(len(OKABE_ITO))]
            index = next((i for i in following if i not in used), following[0])
            used.add(index)
        shift = index + position // len(OKABE_ITO)
        marker = _MARKERS[shift % len(_MARKERS)]
        dash = _DASHES[shift % len(_DASHES)]  # a repeated colour has other dashes
        styles.append({"color": _shade(OKABE_ITO[index], times[index]), "marker": marker, "linestyle": dash})
        times[index] += 1
    return styles
