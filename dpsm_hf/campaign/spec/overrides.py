"""What a command line changes in a campaign's file: ``--set KEY=VALUE`` and ``--data NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.loading import EMBEDDED_DATASETS
from .spec import ENTRY_KEYS, KEYS, SCALED
from .yaml_lines import Located, Place, Problems, located, read_yaml, suggestion

_SPLITS = ("train", "validation", "test", "calibration")


def apply_override(tree: dict[str, Located], text: str, problems: Problems) -> None:
    """Change one value of a file whose scale was chosen.

    ``base.max_steps=100``, ``sizes.tiny.block_size=64`` (``arguments`` may be left out), ``seeds=[1]``,
    ``budget.limit=2``; a value is read as YAML, and null takes an argument back. ``data=NAME`` runs every study on
    one data set: one of the file, ``python-docs``, ``python-docstrings``, a name on the hub (``NAME:CONFIG``), a
    folder, or files (``train=FILE,validation=FILE,test=FILE``).

    Args:
        tree: the keys; changed.
        text: the change.
        problems: gets what is wrong with it.
    """
    path, equals, written = text.partition("=")
    if not equals or not path.strip():
        problems.add(Place("--set"), text, "write KEY=VALUE, for instance base.max_steps=100")
    elif path.strip() == "data":
        _replace_data(tree, written.strip(), problems)
    else:
        place = Place("--set")
        value = _value(written, place, path, problems)
        if value is not None:
            _set(tree, path.strip(), value, problems)


def _value(written: str, place: Place, path: str, problems: Problems) -> Located | None:
    own = Problems()
    # the text is one value of a file of one line
    read = read_yaml(f"value: {written}\n", place.source, own)
    if own.found or read is None or set(read.value) != {"value"}:
        problems.add(place, path, f"{written!r} is no value; write a number, a word or a list as in the file")
        return None
    return located(read.value["value"].plain(), place)


def _set(tree: dict[str, Located], path: str, value: Located, problems: Problems) -> None:
    section, _, rest = path.partition(".")
    known = [key for key in (*KEYS, *SCALED) if key != "scales"]
    if section not in known:
        problems.unknown(value.place, path, "a key of a campaign", section, known)
        return
    if not rest:
        tree[section] = value
        return
    holder = tree.get(section, located({}, value.place))
    if not isinstance(holder.value, dict):
        problems.add(value.place, path, f"{section} has no keys of its own; write {section}=VALUE")
        return
    names = [rest]
    if section in ENTRY_KEYS:
        # names may have dots in them: the longest that fits
        name = max((n for n in holder.value if rest.startswith(f"{n}.")), key=len, default=None)
        if name is None:
            wanted = rest.split(".")[0]
            what = f"there is no {wanted!r} in {section}; {suggestion(wanted, holder.value)}"
            problems.add(value.place, path, what)
            return
        inner = rest[len(name) + 1 :]
        if inner.split(".")[0] not in ENTRY_KEYS[section]:
            inner = f"arguments.{inner}"
        names = [name, *inner.split(".")]
    elif section != "base":
        names = rest.split(".")
    tree[section] = _with(holder, names, value)


def _with(holder: Located, names: list[str], value: Located) -> Located:
    """Return a tree with one value changed; the tree itself may be shared and stays as it is."""
    inside: Mapping[str, Any] = holder.value if isinstance(holder.value, dict) else {}
    if len(names) == 1:
        return Located({**inside, names[0]: value}, holder.place)
    below = _with(inside.get(names[0], located({}, value.place)), names[1:], value)
    return Located({**inside, names[0]: below}, holder.place)


def _replace_data(tree: dict[str, Located], wanted: str, problems: Problems) -> None:
    place = Place("--data")
    there = tree["data"].value if "data" in tree and isinstance(tree["data"].value, dict) else {}
    if wanted in there:
        name, entry = wanted, there[wanted]
    else:
        found = _entry(wanted, there, problems)
        if found is None:
            return
        name, entry = found[0], located(found[1], place)
    tree["data"] = Located({name: entry}, place)
    studies = tree.get("studies")
    if studies is not None and isinstance(studies.value, dict):
        changed = {}
        for study, keys in studies.value.items():
            if isinstance(keys.value, dict):
                inside = {key: item for key, item in keys.value.items() if key != "data"}
                keys = Located(inside, keys.place)
            changed[study] = keys
        tree["studies"] = Located(changed, studies.place)


def _entry(wanted: str, there: Mapping[str, Any], problems: Problems) -> tuple[str, dict[str, Any]] | None:
    """Return name and content of the data set that a command line names."""
    place = Place("--data")
    if not wanted:
        problems.add(place, "", f"name a data set; this file has {', '.join(there) or 'none'}")
        return None
    if "=" in wanted:
        files: dict[str, str] = {}
        for part in wanted.split(","):
            split, _, path = part.partition("=")
            if split not in _SPLITS or not path:
                problems.add(place, wanted, f"{part!r} is not SPLIT=FILE with a split of {', '.join(_SPLITS)}")
                return None
            files[f"{split}_file"] = path
        parent = Path(next(iter(files.values()))).resolve().parent.name
        return parent or "files", {"title": parent or "local files", "arguments": files}
    if wanted in EMBEDDED_DATASETS:
        return wanted, {"arguments": {"dataset_name": wanted}}
    if Path(wanted).is_dir():
        folder = Path(wanted).resolve()
        return folder.name, {"arguments": {"dataset_name": str(folder)}}
    source, colon, config = wanted.partition(":")
    if "/" not in source:
        problems.unknown(place, "", "a data set of this file, nor a folder, nor OWNER/NAME of the hub", wanted, there)
        return None
    arguments = {"dataset_name": source, **({"dataset_config_name": config} if colon else {})}
    return config or source.rpartition("/")[2], {"arguments": arguments}
