"""Draw the CSV of a device: time and memory of each variant relative to Transformers' CE, and how they grow.

python -m benchmarks.plot benchmarks/results/cpu-2-cores.csv          # the picture, beside the CSV
python -m benchmarks.plot benchmarks/results/cpu-2-cores.csv --table  # Markdown tables
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import read

# Okabe and Ito's palette, told apart in colour blindness too
OURS, THEIRS, FLOOR = "#0072B2", "#999999", "#E69F00"


def _colour(variant: str) -> str:
    return OURS if variant.startswith("ours") else FLOOR if variant == "three products" else THEIRS


def draw(path: Path) -> Path:
    """Write the picture beside the CSV and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(path)
    if not rows:
        raise SystemExit(f"{path} has no rows: run python -m benchmarks first.")
    widths = [row for row in rows if row["benchmark"] == "head" and row["vocabulary"] == "50257"]
    cases = sorted({(row["dtype"], int(row["width"])) for row in widths if int(row["width"]) <= 1024}, reverse=True)
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), constrained_layout=True)
    for axis, column, title in ((axes[0, 0], "ratio", "time"), (axes[0, 1], "peak_ratio", "peak memory")):
        _bars(axis, widths, cases, column)
        axis.set_title(f"Output layer, forward and backward: {title}", fontsize=11)
        axis.set_xlabel("relative to Transformers' cross-entropy")
    for axis, benchmark, column in (
        (axes[1, 0], "growth with tokens", "tokens"),
        (axes[1, 1], "growth with vocabulary", "vocabulary"),
    ):
        _growth(axis, [row for row in rows if row["benchmark"] == benchmark], column)
        axis.set_title(f"Peak memory, {benchmark}", fontsize=11)
    figure.suptitle(f"{rows[-1]['device']}, torch {rows[-1]['torch']}", fontsize=10)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _bars(axis: Any, rows: list[dict[str, str]], cases: list[tuple[str, int]], column: str) -> None:
    names = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != "transformers CE"))
    hatches = dict(zip(cases, ("", "//", "..", "xx", "\\\\", "++"), strict=False))
    height = 0.8 / max(1, len(cases))
    for k, (dtype, width) in enumerate(cases):
        found = {r["variant"]: r for r in rows if (r["dtype"], int(r["width"])) == (dtype, width)}
        for i, name in enumerate(names):
            value = found.get(name, {}).get(column)
            if value:
                axis.barh(i + k * height, float(value), height, color=_colour(name), hatch=hatches[dtype, width],
                          edgecolor="white")  # fmt: skip
        axis.barh(0, 0, color="#dddddd", hatch=hatches[dtype, width], edgecolor="white", label=f"{dtype}, D = {width}")
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names, fontsize=9)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    ticks = [0.125, 0.25, 0.5, 1, 2, 4]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.legend(fontsize=8, loc="lower right")


def _growth(axis: Any, rows: list[dict[str, str]], column: str) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = sorted(
            (int(r[column]), float(r["peak_mib"])) for r in rows if r["variant"] == variant and r["peak_mib"]
        )
        marker = "o" if variant.startswith("ours") else "s"
        axis.plot(*zip(*mine, strict=True), marker=marker, color=_colour(variant), label=variant)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = sorted({int(r[column]) for r in rows})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(column)
    axis.set_ylabel("MiB above the inputs")
    axis.legend(fontsize=9)
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
