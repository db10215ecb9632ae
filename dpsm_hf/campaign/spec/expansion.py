"""From what a campaign's file says to the runs and points of its plan."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .contradictions import campaign_refusals, check_spec, values_of
from .design import Campaign, Point, Run, Variation
from .local_files import EXTRA_ARGUMENT, content_hash
from .script_arguments import defaults_among, effective, refusals
from .spec import Arguments, Given, SizeEntry, Spec, StudyEntry, VariationEntry
from .yaml_lines import Place, Problems

# Sections, the more specific ones last.
_SPECIFIC = ("base", "sizes", "data", "variations", "studies")
# Names in messages of the scoring rules that arguments have other names for.
_SAID_AS = {"alpha": "alpha_end"}
# What a run from scratch has in place of a model that it starts from.
_FROM_SCRATCH = ("model_type", "config_overrides", "config_name", "tokenizer_name", "tokenizer_vocab_size")


@dataclass
class _Expansion:
    spec: Spec
    problems: Problems
    runs: dict[str, Run] = field(default_factory=dict)
    preparations: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)


def expand(spec: Spec, scale: str, source: str, problems: Problems) -> Campaign:
    """Return the campaign that a file describes.

    Args:
        spec: what the file says, without mistakes that its lines alone show.
        scale: ``small`` or ``paper``.
        source: the file's text.
        problems: gets what contradicts, or is refused by the script; the result is then of no use.
    """
    work = _Expansion(spec, problems)
    check_spec(spec, problems)
    problems.check()
    places = [
        (study, size, data, seed, combination)
        for seed in dict.fromkeys(seed for study in spec.studies.values() for seed in study.seeds)
        for study in spec.studies.values()
        if seed in study.seeds
        for size in study.sizes
        for data in study.data
        for combination in _combinations(study)
    ]
    for study, size, data, seed, combination in places:
        for variation in _in_order(spec, study):
            _add_point(work, study, variation, size, data, seed, combination)
    problems.check()
    return Campaign(
        name=spec.name,
        title=spec.title,
        scale=scale,
        task=spec.task,
        variations=tuple(_variation(spec, entry) for entry in spec.variations.values()),
        points=tuple(work.points),
        runs=work.runs,
        reference=spec.reference,
        brier=spec.brier,
        budget=spec.budget,
        audit=spec.audit,
        quality=spec.quality,
        test_split=spec.test_split,
        source=source,
        track=spec.track,
        preparations=work.preparations,
        titles={
            "study": {name: entry.title for name, entry in spec.studies.items()},
            "size": {name: entry.title for name, entry in spec.sizes.items()},
            "data": {name: entry.title for name, entry in spec.data.items()},
        },
        planned={
            "size": {name: dict(entry.architecture) for name, entry in spec.sizes.items()},
            "data": {name: dict(entry.planned) for name, entry in spec.data.items()},
        },
    )


def _variation(spec: Spec, entry: VariationEntry) -> Variation:
    arguments = {name: given.value for name, given in entry.arguments.items() if given.value is not None}
    return Variation(entry.name, entry.title, entry.role, arguments, entry.of.value if entry.of else None)


def _in_order(spec: Spec, study: StudyEntry) -> list[VariationEntry]:
    """Return the variations of a study, the reference first."""
    names = sorted(study.variations, key=lambda name: name != spec.reference)
    return [spec.variations[name] for name in names]


def _combinations(study: StudyEntry) -> Iterator[dict[str, Given]]:
    for values in itertools.product(*study.grid.values()):
        yield dict(zip(study.grid, values, strict=True))


# ---- one point -----------------------------------------------------------------------------------------------------


def _add_point(
    work: _Expansion,
    study: StudyEntry,
    variation: VariationEntry,
    size: str,
    data: str,
    seed: int,
    combination: Mapping[str, Given],
) -> None:
    spec = work.spec
    source = variation if variation.of is None else spec.variations[variation.of.value]
    layers = (spec.base, spec.sizes[size].arguments, spec.data[data].arguments, source.arguments)
    given = _merged(*layers, study.arguments, combination)
    start = spec.sizes[size]
    if start.start_from is not None:
        prepared = _preparation(work, start, data, seed)
        if prepared is None:
            return
        given = {name: value for name, value in given.items() if name not in _FROM_SCRATCH}
        given["model_name_or_path"] = Given(f"{{run:{prepared}}}", start.place, f"sizes.{size}.start_from")
    run = _run(work, given, seed, start.processes, source.place, f"variations.{source.name}")
    if run is None:
        return
    work.runs.setdefault(run.id, run)
    settings = {name: value.value for name, value in {**study.arguments, **combination}.items()}
    point = Point(
        study.name, variation.name, size, data, seed, run.id, settings=settings, scaled=variation.of is not None
    )
    work.points.append(point)


def _preparation(work: _Expansion, size: SizeEntry, data: str, seed: int) -> str | None:
    """Add the run whose model those of a size start from, and return its id."""
    spec, start = work.spec, size.start_from
    assert start is not None
    reference = spec.variations[spec.reference].arguments
    given = _merged(spec.base, size.arguments, spec.data[data].arguments, reference, start.arguments)
    own = seed if start.seed is None else start.seed
    run = _run(work, given, own, size.processes, size.place, f"sizes.{size.name}.start_from", reported=False)
    if run is None:
        return None
    work.runs.setdefault(run.id, run)
    work.preparations.setdefault(run.id, f"{start.title}/{size.name}/{data}/seed-{own}")
    return run.id


def _merged(*layers: Arguments) -> dict[str, Given]:
    found: dict[str, Given] = {}
    for layer in layers:
        found.update(layer)
    return found


def _run(
    work: _Expansion,
    given: Mapping[str, Given],
    seed: int,
    processes: int,
    place: Place,
    key: str,
    reported: bool = True,
) -> Run | None:
    """Return a run, None where something is wrong with it, which is then noted.

    Args:
        work: what is known so far; gets the problems.
        given: the arguments.
        seed, processes: of the run.
        place, key: what is wrong with it where no argument is to blame.
        reported: whether its figures are reported, not its model alone used.
    """
    task, problems = work.spec.task, work.problems
    values = effective(task, values_of(given))
    missing = False
    for name in values:
        for path in given[name].paths:
            if not path.exists():
                what = f"there is no file or folder {path}; correct the path, or name other data with --set or --data"
                problems.add(given[name].place, given[name].key, what)
                missing = True
    if missing:
        return None
    run = Run(task, {**values, "seed": seed}, processes, _contents(values, given), defaults_among(task, values))
    # seeds differ in nothing that could be refused
    unseeded = repr((sorted(values.items()), reported))
    if unseeded not in work.checked:
        work.checked.add(unseeded)
        for message in refusals(task, values):
            blamed = _blamed(message, given)
            problems.add(blamed.place if blamed else place, blamed.key if blamed else key, message)
        for message in campaign_refusals(work.spec, values) if reported else ():
            blamed = _blamed(message, given)
            problems.add(
                blamed.place if blamed else work.spec.places["base"], blamed.key if blamed else "base", message
            )
    return run


def _blamed(message: str, given: Mapping[str, Given]) -> Given | None:
    """Return the argument that a message is about: the first it names of those given in the most specific place."""
    words = [_SAID_AS.get(word, word) for word in re.findall(r"[A-Za-z_][A-Za-z0-9_]*", message)]
    named = [given[word] for word in words if word in given and given[word].value is not None]
    return max(named, key=lambda value: _SPECIFIC.index(value.key.split(".")[0]), default=None)


def _contents(values: Mapping[str, Any], given: Mapping[str, Given]) -> dict[str, Any]:
    """Return what stands in the id for the arguments that name local files."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        paths = given[name].paths
        if not paths:
            continue
        if name != EXTRA_ARGUMENT:
            found[name] = content_hash(paths[0])
            continue
        hashes = {str(path): content_hash(path) for path in paths}
        parts = [text.partition("=") for text in value]  # NAME=SOURCE,OPTIONS
        found[name] = [
            f"{head}={hashes.get(rest.partition(',')[0], rest.partition(',')[0])},{rest.partition(',')[2]}"
            for head, _, rest in parts
        ]
    return found
