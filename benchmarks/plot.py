"""Draw the CSV of a device: time and memory of each variant relative to Transformers' CE, and their growth.

python -m benchmarks.plot benchmarks/results/cpu-2-cores.csv          # the picture, beside the CSV
python -m benchmarks.plot benchmarks/results/cpu-2-cores.csv --table  # Markdown tables
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import read

# Okabe and Ito's palette, safe for colour blindness; the second shade is bfloat16
OURS, THEIRS, FLOOR = ("#0072B2", "#56B4E9"), ("#555555", "#AAAAAA"), ("#D55E00", "#E69F00")
REFERENCE = "transformers CE"

# Longest bar, in units of the reference; longer ones are cut off.
_LONGEST = 2.5
DTYPES = ("fp32", "bf16")


def _colours(variant: str) -> tuple[str, str]:
    return OURS if variant.startswith("ours") else FLOOR if variant == "three products" else THEIRS


def draw(path: Path) -> Path:
    """Write the picture beside the CSV, and return its path.

    It is one column in large letters, readable at a width of 400 pixels: time and memory of the head at the size of
    GPT-2 (or at the first size in the CSV), and the growth of its memory.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(path)
    if not rows:
        raise SystemExit(f"{path} has no rows: run python -m benchmarks first.")
    heads = [row for row in rows if row["benchmark"] == "head" and row["ratio"]]
    sizes = [(row["tokens"], row["width"], row["vocabulary"]) for row in heads]
    size = next((size for size in sizes if size[1:] == ("768", "50257")), sizes[0] if sizes else None)
    heads = [row for row, its in zip(heads, sizes, strict=True) if its == size]
    kinds = ("tokens", "vocabulary", "width")
    growth = [(kind, [row for row in rows if row["benchmark"] == f"growth with {kind}"]) for kind in kinds]
    growth = [(kind, part) for kind, part in growth if len({row[kind] for row in part if row["peak_mib"]}) > 1]
    names = _names(heads)
    bars = 1.6 + 0.62 * len(names)
    heights = [bars, bars] * bool(heads) + [5.0] * len(growth)
    if not heights:
        raise SystemExit(f"{path} has neither the head nor growth: run python -m benchmarks --parts head growth.")
    with plt.rc_context({"font.size": 19, "axes.titlesize": 20, "axes.spines.right": False, "axes.spines.top": False}):
        figure, axes = plt.subplots(
            len(heights), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
        )
        left = list(axes[:, 0])
        if heads:
            assert size is not None
            n, d, v = (f"{int(x):,}" for x in size)
            title = f"Head, {n} tokens, width {d}, vocabulary {v}:"
            for column, what in (("ratio", "time"), ("peak_ratio", "peak memory")):
                axis = left.pop(0)
                _bars(axis, heads, names, column)
                axis.set_title(f"{title}\n{what}, Transformers' cross-entropy = 1", loc="left", x=-0.55)
        for kind, part in growth:
            axis = left.pop(0)
            _growth(axis, part, kind)
            axis.set_title(f"Head: peak memory by {kind}", loc="left")
        figure.supxlabel(f"{rows[-1]['device']}, torch {rows[-1]['torch']}", fontsize=14, color="#555555")
        picture = path.with_suffix(".png")
        figure.savefig(picture, dpi=100)
        plt.close(figure)
    return picture


def _names(rows: list[dict[str, str]]) -> list[str]:
    """Return the names to draw, ours and the bare products last; variants that differ only in the chunk are one."""
    names = dict.fromkeys(_program(row["variant"]) for row in rows if row["variant"] != REFERENCE)
    order = {"three products": 2, "ours, ce": 1, "ours, dpsm": 1}
    return sorted(names, key=lambda name: order.get(name, 0))


def _program(variant: str) -> str:
    name, _, last = variant.rpartition(", ")
    return f"{name}, best chunk" if last.isdigit() else name if last.startswith("chunk ") else variant


def _bars(axis: Any, rows: list[dict[str, str]], names: list[str], column: str) -> None:
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    height = 0.8 / max(1, len(dtypes))
    right = 0.0
    for k, dtype in enumerate(dtypes):
        for i, name in enumerate(names):
            mine = [row for row in rows if row["dtype"] == dtype and _program(row["variant"]) == name]
            # the variant with the default chunk, else the fastest one; the same for time and memory
            mine = [row for row in mine if row["variant"] == name] or mine
            best = min(mine, key=lambda row: float(row["ratio"]), default=None)
            if best is None or not best[column]:
                continue
            value, place = float(best[column]), i + (k - (len(dtypes) - 1) / 2) * height
            shade = DTYPES.index(dtype)
            axis.barh(place, value, height, color=_colours(name)[shade], edgecolor="white")
            low, high = (best["ratio_p10"], best["ratio_p90"]) if column == "ratio" else ("", "")
            if value > _LONGEST:  # cut off, so that the other bars remain readable
                white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                label = f"{value:.2f} {dtype} \N{RIGHTWARDS ARROW}"
                axis.text(1.25 * _LONGEST, place, label, va="center", ha="right", fontsize=15, bbox=white)
                right = max(right, _LONGEST)
                continue
            if low and high:
                axis.plot([float(low), float(high)], [place, place], color="black", linewidth=1)
            end = max(value, float(high or 0))
            white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line at 1
            axis.text(end + 0.03, place, f"{value:.2f} {dtype}", va="center", fontsize=15, bbox=white)
            right = max(right, end)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1.5, linestyle="--")
    axis.set_xlim(0, min(right, _LONGEST) * 1.25)


def _growth(axis: Any, rows: list[dict[str, str]], column: str) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = sorted(
            (int(r[column]), float(r["peak_mib"])) for r in rows if r["variant"] == variant and r["peak_mib"]
        )
        if mine:
            marker = "o" if variant.startswith("ours") else "s"
            style = {"marker": marker, "markersize": 9, "linewidth": 3, "color": _colours(variant)[0]}
            axis.plot(*zip(*mine, strict=True), label=variant, **style)
    axis.set_ylim(0)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.locator_params(nbins=5)
    axis.set_xlabel(column)
    axis.set_ylabel("MiB above inputs")
    axis.legend(fontsize=17, frameon=False)
    axis.grid(alpha=0.3)


def table(path: Path) -> str:
    """Return one Markdown table for each benchmark of the CSV."""
    rows, lines = read(path), []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        lines += [f"### {benchmark}", "", "| N | D | V | dtype | variant | time | 10-90 % | ms | peak | MiB | n |",
                  "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in rows:
            if row["benchmark"] == benchmark:
                spread = f"{_two(row['ratio_p10'])}-{_two(row['ratio_p90'])}" if row["ratio"] else row["note"]
                cells = [row["tokens"], row["width"], row["vocabulary"], row["dtype"], row["variant"],
                         _two(row["ratio"]), spread, _round(row["median_ms"]), _two(row["peak_ratio"]),
                         _round(row["peak_mib"]), row["samples"]]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _two(value: str) -> str:
    return f"{float(value):.2f}" if value else ""


def _round(value: str) -> str:
    return f"{float(value):,.0f}" if value else ""


def main() -> None:
    """Run from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("csv", type=Path)
    p.add_argument("--table", action="store_true", help="print Markdown instead of drawing")
    arguments = p.parse_args()
    print(table(arguments.csv) if arguments.table else draw(arguments.csv))


if __name__ == "__main__":
    main()
