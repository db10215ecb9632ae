"""From a campaign's YAML file to its design: everything that is wrong with it is found before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .design import Campaign
from .expansion import expand
from .overrides import apply_override
from .selection import select
from .spec import SCALED, SCALES
from .spec_reader import SpecReader
from .yaml_lines import Located, Place, Problems, SpecError, read_yaml

__all__ = ["SHIPPED", "SpecError", "campaign_file", "load_campaign"]

#: Folder of the campaigns that come with the package.
SHIPPED = Path(__file__).resolve().parents[1] / "shipped"


def load_campaign(
    path: str | Path, scale: str = "small", only: Sequence[str] | None = None, overrides: Sequence[str] | None = None
) -> Campaign:
    """Read a campaign's file and lay out its runs.

    Args:
        path: of the YAML file, or the name of a shipped campaign; docs/campaigns.md describes the keys.
        scale: ``small`` or ``paper``.
        only: leave out all points but those that match, see `selection.select`.
        overrides: changes to the file, see `overrides.apply_override`.

    Returns:
        The campaign. Its runs' ids depend on what decides their numbers alone: not on the order of keys, comments,
        titles, what is logged, or where the file and its data lie.

    Raises:
        SpecError: everything that is wrong with the file, a line each: ``FILE:LINE: key: what is wrong; remedy``.
    """
    path = campaign_file(path)
    problems = Problems()
    text = _read(path, problems)
    tree = read_yaml(text, path.name, problems)
    if tree is None:
        problems.check()
        raise AssertionError("a tree is missing without a reason")
    chosen = _at_scale(tree, scale, problems)
    for override in overrides or ():
        apply_override(chosen, override, problems)
    spec = SpecReader(Located(chosen, tree.place), path.resolve().parent, problems).read()
    problems.check()
    return select(expand(spec, scale, text, problems), only or ())


def campaign_file(path: str | Path) -> Path:
    """Return the file of a campaign, which may be named like one of those in the folder `SHIPPED`.

    Args:
        path: of a file, or a shipped name with or without its ending. A file of that name in the working directory
            goes first.
    """
    shipped = SHIPPED / f"{str(path).removesuffix('.yaml')}.yaml"
    bare = Path(path).name == str(path)
    return shipped if bare and shipped.is_file() and not Path(path).exists() else Path(path)


def _read(path: Path, problems: Problems) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        problems.add(Place(str(path)), "", f"there is no such file; campaigns that come with dpsm are {names}")
    except IsADirectoryError:
        problems.add(Place(str(path)), "", "this is a folder; name a file in it")
    except UnicodeDecodeError as error:
        problems.add(Place(str(path)), "", f"this is not UTF-8 (byte {error.start}); convert it first")
    problems.check()
    return ""


def _at_scale(tree: Located, scale: str, problems: Problems) -> dict[str, Located]:
    """Return the file's keys with the differences of a scale applied: base key by key, other sections as a whole."""
    keys = {name: item for name, item in tree.value.items() if name != "scales"}
    if scale not in SCALES:
        problems.unknown(Place("--scale"), "", "a scale", scale, SCALES)
        return keys
    given = tree.value.get("scales")
    if given is None:
        return keys
    if not isinstance(given.value, dict):
        problems.add(given.place, "scales", f"has {given.kind} where {' and '.join(SCALES)} belong")
        return keys
    for name, item in given.value.items():
        if name not in SCALES:
            problems.unknown(item.place, f"scales.{name}", "a scale", name, SCALES)
        elif not isinstance(item.value, dict | None):
            problems.add(item.place, f"scales.{name}", f"has {item.kind} where keys with values belong")
        else:
            for key, below in (item.value or {}).items():
                if key not in SCALED:
                    problems.unknown(below.place, f"scales.{name}.{key}", "a key that a scale may change", key, SCALED)
    found = given.value.get(scale)
    if found is None:
        problems.add(given.place, "scales", f"has no {scale}; add it, or take {' or '.join(given.value) or 'none'}")
        return keys
    differences = found.value if isinstance(found.value, dict) else {}
    for key, item in differences.items():
        if key not in SCALED:
            continue
        shared = keys.get(key)
        if key == "base" and shared is not None and isinstance(shared.value, dict) and isinstance(item.value, dict):
            item = Located({**shared.value, **item.value}, shared.place)
        keys[key] = item
    return keys
