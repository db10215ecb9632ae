"""`load_campaign`: read a campaign's YAML file with the changes of the command line, and find all mistakes first."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.loading import EMBEDDED_DATASETS
from ...runtime.former_names import ARGUMENTS as FORMER_ARGUMENTS
from ...runtime.secrets import REMEDY, hidden, is_secret_name, is_secret_value
from ...runtime.yaml_lines import Located, Place, Problems, SpecError, located, read_yaml, suggestion
from .design import SCALES, Campaign, Point
from .expansion import expand
from .spec import ENTRY_KEYS, KEYS, SCALED, SpecReader

__all__ = ["SHIPPED", "SpecError", "apply_override", "campaign_file", "load_campaign", "select"]

#: Folder of the campaigns that come with the package.
SHIPPED = Path(__file__).resolve().parents[1] / "shipped"

#: The keys of ``--only``.
POINT_KEYS = ("study", "variation", "role", "size", "data", "seed")

_ONLY, _SET, _DATA = Place("--only"), Place("--set"), Place("--data")
_SPLITS = ("train", "validation", "test", "calibration")


def load_campaign(
    path: str | Path, scale: str = "small", only: Sequence[str] | None = None, overrides: Sequence[str] | None = None
) -> Campaign:
    """Read a campaign's file and expand it into its runs.

    Args:
        path: of the YAML file, or the name of a shipped campaign; docs/campaigns.md describes the keys.
        scale: ``small`` or ``paper``.
        only: patterns of the points to keep, see `select`.
        overrides: changes to the file, see `apply_override`.

    Returns:
        The campaign. The ids of its runs depend only on what determines their results: not on the order of keys,
        comments, titles, what is logged, or where the file and its data are.

    Raises:
        SpecError: with every mistake in the file, one per line: ``FILE:LINE: key: what is wrong; remedy``.
    """
    path = campaign_file(path)
    problems = Problems()
    text = _read(path, problems)
    tree = read_yaml(text, path.name, problems)
    if tree is None:
        problems.check()
        raise AssertionError("a tree is missing without a reason")
    _refuse_credentials(tree, text, problems)
    chosen = _at_scale(_renamed(tree, problems), scale, problems)
    for override in overrides or ():
        apply_override(chosen, override, problems)
    _refuse_credentials(Located(chosen, tree.place), "", problems)
    spec = SpecReader(Located(chosen, tree.place), path.resolve().parent, problems).read(scale, text)
    problems.check()
    return select(expand(spec, problems), only or ())


def campaign_file(path: str | Path) -> Path:
    """Return the path of a campaign's file, given as a path or as the name of one in `SHIPPED`, with or without .yaml.

    A file of that name in the working directory takes precedence.
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


def _refuse_credentials(tree: Located, text: str, problems: Problems) -> None:
    """Refuse credentials, because the content of a campaign's file is copied into settings, records and reports.

    This is the first check, so that no other message repeats a credential.

    Raises:
        SpecError: naming the lines, without the credentials.
    """
    own = Problems()
    what = f"looks like a credential, which would be copied into settings, records and reports; {REMEDY}"
    lines = set()
    for path, place in _credentials(tree, ""):
        own.add(place, path, what)
        lines.add(place.line)
    for number, line in enumerate(text.splitlines(), 1):
        if number not in lines and hidden(line) != line:  # in a comment, or over several lines
            own.add(Place(tree.place.source, number), "", f"this line holds what {what}")
    own.check()


def _credentials(given: Located, path: str, below: bool = False) -> Iterator[tuple[str, Place]]:
    """Yield the dotted keys and the places of values that look like credentials.

    Args:
        given: the value to search.
        path: its dotted key.
        below: whether it lies under a key that is named like a credential.
    """
    if isinstance(given.value, dict):
        for key, item in given.value.items():
            # an entry of a section (a variation, say) may be named like a credential; then only its keys count
            settings = {"base", "arguments"} & {*path.split(".")} or not isinstance(item.value, dict)
            yield from _credentials(
                item, f"{path}.{key}" if path else key, below or (settings and is_secret_name(key))
            )
    elif isinstance(given.value, list):
        for item in given.value:
            yield from _credentials(item, path, below)
    elif isinstance(given.value, str) and given.value and (below or is_secret_value(given.value)):
        yield path, given.place


def _renamed(given: Located, problems: Problems) -> Located:
    """Return a value with former argument names replaced by their present ones, at any depth."""
    if isinstance(given.value, list):
        items = [_renamed(item, problems) for item in given.value]
        return dataclasses.replace(given, value=items)
    if isinstance(given.value, str) and given.value in FORMER_ARGUMENTS:  # in a list of arguments
        return dataclasses.replace(given, value=FORMER_ARGUMENTS[given.value])
    if not isinstance(given.value, dict):
        return given
    found: dict[str, Located] = {}
    for key, item in given.value.items():
        name = FORMER_ARGUMENTS[key] if key in FORMER_ARGUMENTS else key
        if name != key and name in given.value:
            problems.add(item.place, key, f"this is the former name of {name}, which is given too; leave it out")
        found[name] = _renamed(item, problems)
    return dataclasses.replace(given, value=found)


def _at_scale(tree: Located, scale: str, problems: Problems) -> dict[str, Located]:
    """Return the file's keys with a scale applied: ``base`` changes key by key, other sections as a whole."""
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


# ---- --set and --data -----------------------------------------------------------------------------------------------


def apply_override(tree: dict[str, Located], text: str, problems: Problems) -> None:
    """Change one value of a campaign's file, as ``--set`` and ``--data`` do.

    Examples: ``base.max_steps=100``, ``sizes.tiny.block_size=64`` (``arguments`` may be left out), ``seeds=[1]``,
    ``budget.limit=2``. The value is read as YAML; null removes an argument. ``data=NAME`` runs every study on one data
    set: one of the file, ``python-docs``, ``python-docstrings``, a name on the hub (``NAME:CONFIG``), a folder, or
    files (``train=FILE,validation=FILE,test=FILE``).

    Args:
        tree: the file's keys after a scale was applied; changed in place.
        text: the change, ``KEY=VALUE``.
        problems: collects the mistakes.
    """
    path, equals, written = text.partition("=")
    path = ".".join(FORMER_ARGUMENTS.get(part, part) for part in path.split("."))
    if not equals or not path.strip():
        problems.add(_SET, text, "write KEY=VALUE, for instance base.max_steps=100")
    elif path.strip() == "data":
        _replace_data(tree, written.strip(), problems)
    else:
        value = _written(written, path, problems)
        if value is not None:
            _set(tree, path.strip(), _renamed(value, problems), problems)


def _written(written: str, path: str, problems: Problems) -> Located | None:
    own = Problems()
    # parsed as the value of a one-line YAML file
    read = read_yaml(f"value: {written}\n", _SET.source, own)
    if own.found or read is None or set(read.value) != {"value"}:
        shown = repr(hidden(written)) if not is_secret_name(path.rpartition(".")[2].strip()) else "this"
        problems.add(_SET, path, f"{shown} is no value; write a number, a word or a list as in the file")
        return None
    return located(read.value["value"].plain(), _SET)


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
        if rest in holder.value:
            if value.value is None:
                tree[section] = Located({n: e for n, e in holder.value.items() if n != rest}, holder.place)
            else:
                problems.add(value.place, path, f"write {path}.KEY=VALUE, or {path}=null, which takes it out")
            return
        # names may contain dots: take the longest that fits
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
    """Return a copy of a tree with one value changed; the tree itself may be shared and is not changed."""
    inside: Mapping[str, Any] = holder.value if isinstance(holder.value, dict) else {}
    if len(names) == 1:
        return Located({**inside, names[0]: value}, holder.place)
    below = _with(inside.get(names[0], located({}, value.place)), names[1:], value)
    return Located({**inside, names[0]: below}, holder.place)


def _replace_data(tree: dict[str, Located], wanted: str, problems: Problems) -> None:
    there = tree["data"].value if "data" in tree and isinstance(tree["data"].value, dict) else {}
    if wanted in there:
        name, entry = wanted, there[wanted]
    else:
        found = _entry(wanted, there, problems)
        if found is None:
            return
        name, entry = found[0], located(found[1], _DATA)
    tree["data"] = Located({name: entry}, _DATA)
    studies = tree.get("studies")
    if studies is not None and isinstance(studies.value, dict):
        changed = dict(studies.value)
        for study, keys in studies.value.items():
            if isinstance(keys.value, dict):
                changed[study] = Located({k: item for k, item in keys.value.items() if k != "data"}, keys.place)
        tree["studies"] = Located(changed, studies.place)


def _entry(wanted: str, there: Mapping[str, Any], problems: Problems) -> tuple[str, dict[str, Any]] | None:
    """Return name and entry of the data set that ``--data`` names; None, with the mistake noted, if there is none."""
    if not wanted:
        problems.add(_DATA, "", f"name a data set; this file has {', '.join(there) or 'none'}")
        return None
    if "=" in wanted:
        files: dict[str, str] = {}
        for part in wanted.split(","):
            split, _, path = part.partition("=")
            if split not in _SPLITS or not path:
                problems.add(_DATA, wanted, f"{part!r} is not SPLIT=FILE with a split of {', '.join(_SPLITS)}")
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
        problems.unknown(_DATA, "", "a data set of this file, nor a folder, nor OWNER/NAME of the hub", wanted, there)
        return None
    arguments = {"dataset_name": source, **({"dataset_config_name": config} if colon else {})}
    return config or source.rpartition("/")[2], {"arguments": arguments}


# ---- --only ---------------------------------------------------------------------------------------------------------


def select(campaign: Campaign, only: Sequence[str]) -> Campaign:
    """Return a campaign with only those points that match all given patterns.

    Args:
        campaign: the whole campaign.
        only: each ``KEY=PATTERN``, with commas for "or": ``study=main``, ``variation=dpsm-*,focal``, ``seed=1``,
            ``role=main``. A pattern may contain ``*`` and ``?``.

    Raises:
        SpecError: for an unknown key, or patterns that match no point.
    """
    if not only:
        return campaign
    problems = Problems()
    groups = [_alternatives(text, problems) for text in only]
    problems.check()
    points = campaign.points
    for text, group in zip(only, groups, strict=True):
        kept = tuple(point for point in points if any(_matches(campaign, point, *pair) for pair in group))
        if not kept:
            key = group[0][0]
            there = sorted({_value(campaign, point, key) for point in points})
            problems.add(_ONLY, text, f"nothing in the plan matches it; {key} is one of {', '.join(there)}")
            problems.check()
        points = kept
    chosen = dataclasses.replace(campaign, points=points)
    order = chosen.order
    return dataclasses.replace(
        chosen,
        runs={run_id: campaign.runs[run_id] for run_id in order},
        preparations={run_id: title for run_id, title in campaign.preparations.items() if run_id in order},
    )


def _alternatives(text: str, problems: Problems) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part in text.split(","):
        key, equals, pattern = part.partition("=")
        if not equals:
            if not found:
                problems.add(_ONLY, text, f"write KEY=PATTERN, with a key of {', '.join(POINT_KEYS)}")
                return []
            key, pattern = found[-1][0], part
        key, pattern = key.strip(), pattern.strip()
        if key not in POINT_KEYS:
            problems.add(_ONLY, text, f"{key!r} is not a key; {suggestion(key, POINT_KEYS)}")
        elif not pattern:
            problems.add(_ONLY, text, f"there is nothing behind {key}=; give a name or a pattern")
        else:
            found.append((key, pattern))
    return found


def _value(campaign: Campaign, point: Point, key: str) -> str:
    return campaign.variation(point.variation).role if key == "role" else str(getattr(point, key))


def _matches(campaign: Campaign, point: Point, key: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(_value(campaign, point, key), pattern)
