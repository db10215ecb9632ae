"""What the pages are made with: templates, and pictures that stand in the page itself."""

from __future__ import annotations

import base64
import re
import zlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from ...plots.figures import save_figure

_LONGEST_NAME = 100  # of a file, in characters


def render(template: str, path: Path, **context: Any) -> Path:
    """Fill in a template of ``dpsm_hf/templates``, with escapes in HTML, write it to a file and return that."""
    html = template.endswith(".html.j2")
    environment = Environment(loader=PackageLoader("dpsm_hf"), autoescape=html, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _markdown_cell, "quoted": _markdown_quote}
    path.write_text(environment.get_template(template).render(**context), encoding="utf-8")
    return path


def _markdown_cell(text: str) -> str:
    """Return text of a campaign's file or a record as one line that stands for itself, in a table or a title."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(str(text).split()))


def _markdown_quote(text: str) -> str:
    """Return a text of a model between fences that are longer than any in it."""
    fence = "`" * max(4, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.strip()}\n{fence}"


def sections(*made: tuple[str, str, list[dict[str, str]]]) -> list[dict[str, Any]]:
    """Return sections as the templates want them (title, text, pictures), without those that have no picture."""
    return [{"title": title, "text": text, "pictures": found} for title, text, found in made if found]


class Pictures:
    """Saves each figure as PNG beside the page and hands it to the page as an inlined SVG.

    The files of an earlier page in the folder are deleted, for its variations may be gone.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths: list[Path] = []
        for path in directory.glob("*.png"):
            path.unlink()

    def add(self, name: str, figure: Figure | None, caption: str) -> list[dict[str, str]]:
        """Save a figure in a file of this name, and return it with its caption in a list; an empty one for None."""
        if figure is None:
            return []
        name = re.sub(r"[^\w.-]+", "_", name)
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
        self.paths.append(save_figure(figure, self.directory / f"{name}.png", dpi=110))
        vector = save_figure(figure, self.directory / f"{name}.svg")
        data = base64.b64encode(vector.read_bytes()).decode("ascii")
        vector.unlink()
        return [{"data": f"data:image/svg+xml;base64,{data}", "caption": caption, "png": f"plots/{name}.png"}]
