"""From what a campaign's file says to the runs and points of its plan."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...runtime.content import content_hash
from ...runtime.yaml_lines import Place, Problems
from .contradictions import campaign_refusals, check_spec
from .design import Campaign, Point, Run
from .local_files import EXTRA_ARGUMENT
from .script_arguments import defaults_among, effective, refusals
from .spec import Arguments, Given, SizeEntry, Spec, StartFrom, StudyEntry, VariationEntry, values_of

# Sections, the more specific ones last.
_SPECIFIC = ("base", "sizes", "data", "variations", "studies")
# Names in messages of the scoring rules that arguments have other names for.
_SAID_AS = {"alpha": "alpha_end"}
# What a run from scratch has in place of a model that it starts from.
_FROM_SCRATCH = ("model_type", "config_overrides", "config_name", "tokenizer_name", "tokenizer_vocab_size")


def expand(spec: Spec, problems: Problems) -> Campaign:
    """Return the campaign that a file describes.

    Args:
        spec: what the file says, without mistakes that its lines alone show.
        problems: gets what contradicts, or is refused by the script; the result is then of no use.
    """
    check_spec(spec, problems)
    problems.check()
    plan = _Expansion(spec, problems)
    for seed in dict.fromkeys(seed for study in spec.studies.values() for seed in study.seeds):
        for study in spec.studies.values():
            if seed in study.seeds:
                plan.add_study(study, seed)
    problems.check()
    return replace(spec.design, points=tuple(plan.points), runs=plan.runs, preparations=plan.preparations)


class _Expansion:
    """The runs and points so far; what is wrong with one is noted, and the others go on."""

    def __init__(self, spec: Spec, problems: Problems) -> None:
        self.spec, self.problems = spec, problems
        self.runs: dict[str, Run] = {}
        self.preparations: dict[str, str] = {}
        self.points: list[Point] = []
        self.checked: set[str] = set()

    def add_study(self, study: StudyEntry, seed: int) -> None:
        """Add the points of a study with one seed, the reference first at each place."""
        names = sorted(study.variations, key=lambda name: name != self.spec.design.reference)
        cells = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
        for size, data, cell, name in itertools.product(study.sizes, study.data, cells, names):
            self.add_point(study, self.spec.variations[name], self.spec.sizes[size], data, seed, cell)

    def add_point(
        self, study: StudyEntry, variation: VariationEntry, size: SizeEntry, data: str, seed: int, cell: Arguments
    ) -> None:
        spec = self.spec
        source = variation if variation.of is None else spec.variations[variation.of.value]
        layers = (spec.base, size.arguments, spec.data[data].arguments, source.arguments, study.arguments, cell)
        given = _merged(*layers)
        if size.start_from is not None:
            prepared = self.preparation(size, size.start_from, data, seed)
            if prepared is None:
                return
            given = {name: value for name, value in given.items() if name not in _FROM_SCRATCH}
            given["model_name_or_path"] = Given(f"{{run:{prepared}}}", size.place, f"sizes.{size.name}.start_from")
        run = self.run(given, seed, size.processes, source.place, f"variations.{source.name}")
        if run is None:
            return
        self.runs.setdefault(run.id, run)
        settings = {name: value.value for name, value in {**study.arguments, **cell}.items()}
        scaled = variation.of is not None
        self.points.append(Point(study.name, variation.name, size.name, data, seed, run.id, settings, scaled))

    def preparation(self, size: SizeEntry, start: StartFrom, data: str, seed: int) -> str | None:
        """Add the run whose model those of a size start from, and return its id."""
        spec = self.spec
        reference = spec.variations[spec.design.reference].arguments
        given = _merged(spec.base, size.arguments, spec.data[data].arguments, reference, start.arguments)
        own = seed if start.seed is None else start.seed
        run = self.run(given, own, size.processes, size.place, f"sizes.{size.name}.start_from", reported=False)
        if run is None:
            return None
        self.runs.setdefault(run.id, run)
        self.preparations.setdefault(run.id, f"{start.title}/{size.name}/{data}/seed-{own}")
        return run.id

    def run(
        self, given: Arguments, seed: int, processes: int, place: Place, key: str, reported: bool = True
    ) -> Run | None:
        """Return a run, None where something is wrong with it, which is then noted.

        Args:
            given: the arguments.
            seed, processes: of the run.
            place, key: what is wrong with it where no argument is to blame.
            reported: whether its figures are reported, not its model alone used.
        """
        task = self.spec.design.task
        values = effective(task, values_of(given))
        missing = [(given[name], path) for name in values for path in given[name].paths if not path.exists()]
        for argument, path in missing:
            what = f"there is no file or folder {path}; correct the path, or name other data with --set or --data"
            self.problems.add(argument.place, argument.key, what)
        if missing:
            return None
        # seeds differ in nothing that could be refused
        unseeded = repr((sorted(values.items()), reported))
        if unseeded not in self.checked:
            self.checked.add(unseeded)
            self.note(refusals(task, values), given, place, key)
            if reported:
                self.note(campaign_refusals(self.spec, values), given, self.spec.places["base"], "base")
        return Run(task, {**values, "seed": seed}, processes, _contents(values, given), defaults_among(task, values))

    def note(self, messages: Iterable[str], given: Arguments, place: Place, key: str) -> None:
        """Note what is refused, at the argument that a message is about where there is one."""
        for message in messages:
            blamed = _blamed(message, given)
            self.problems.add(blamed.place if blamed else place, blamed.key if blamed else key, message)


def _merged(*layers: Arguments) -> dict[str, Given]:
    return {name: given for layer in layers for name, given in layer.items()}


def _blamed(message: str, given: Arguments) -> Given | None:
    """Return the argument that a message is about: the first it names of those given in the most specific place."""
    words = [_SAID_AS.get(word, word) for word in re.findall(r"[A-Za-z_][A-Za-z0-9_]*", message)]
    named = [given[word] for word in words if word in given and given[word].value is not None]
    return max(named, key=lambda value: _SPECIFIC.index(value.key.split(".")[0]), default=None)


def _contents(values: Mapping[str, Any], given: Arguments) -> dict[str, Any]:
    """Return what stands in the id for the arguments that name local files."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        hashes = {str(path): content_hash(path) for path in given[name].paths}
        if hashes and name == EXTRA_ARGUMENT:
            parts = [re.fullmatch(r"([^=]*)=?([^,]*),?(.*)", text, re.DOTALL) for text in value]  # NAME=SOURCE,OPTIONS
            found[name] = [f"{part[1]}={hashes.get(part[2], part[2])},{part[3]}" for part in parts if part is not None]
        elif hashes:
            found[name] = next(iter(hashes.values()))
    return found
