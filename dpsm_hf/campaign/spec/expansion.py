"""Expand a campaign's file into the runs and points of its plan, and find the contradictions in it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...calibration import METRICS, lower_is_better
from ...runtime.content import content_hash
from ...runtime.yaml_lines import Located, Place, Problems, suggestion
from .design import Campaign, Point, Run
from .local_files import EXTRA_ARGUMENT
from .script_arguments import defaults_among, effective, refusals
from .spec import Arguments, Given, SizeEntry, Spec, StartFrom, StudyEntry, VariationEntry, values_of

# Sections, from the most general to the most specific one.
_SPECIFIC = ("base", "sizes", "data", "variations", "studies")
# Names used in messages of the scoring rules, and the arguments that they mean.
_SAID_AS = {"alpha": "alpha_end"}
# Arguments of a run from scratch that a run starting from another's model must not have.
_FROM_SCRATCH = ("model_type", "config_overrides", "config_name", "tokenizer_name", "tokenizer_vocab_size")
#: The metrics of quality to choose from, and whether higher is better.
QUALITY = {
    "perplexity": False, "nll": False, "bits_per_byte": False, "token_accuracy": True, "rouge1": True, "rouge2": True,
    "rougeL": True, "rougeLsum": True, "bertscore_f1": True,
}  # fmt: skip
# Arguments that determine at which steps a run is evaluated.
_STEPS = (
    "max_steps", "num_train_epochs", "eval_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_MAIN_STUDY = "main"


def expand(spec: Spec, problems: Problems) -> Campaign:
    """Return the campaign that a file describes.

    Args:
        spec: the file as read.
        problems: collects the mistakes.

    Raises:
        SpecError: with every contradiction, and every argument that the script would refuse.
    """
    _check_variations(spec, problems)
    _check_figures(spec, problems)
    if _MAIN_STUDY not in spec.studies:
        place = spec.places.get("studies", spec.places["base"])
        problems.add(place, "studies", f"the study {_MAIN_STUDY} is missing, which the verdict is about; add it")
    for name, study in spec.studies.items():
        _check_study(spec, study, problems, f"studies.{name}")
    problems.check()
    plan = _Expansion(spec, problems)
    for seed in dict.fromkeys(seed for study in spec.studies.values() for seed in study.seeds):
        for study in spec.studies.values():
            if seed in study.seeds:
                plan.add_study(study, seed)
    problems.check()
    return replace(spec.design, points=tuple(plan.points), runs=plan.runs, preparations=plan.preparations)


class _Expansion:
    """Collect runs and points; a mistake in one goes to ``problems``, and the others are still added."""

    def __init__(self, spec: Spec, problems: Problems) -> None:
        self.spec, self.problems = spec, problems
        self.runs: dict[str, Run] = {}
        self.preparations: dict[str, str] = {}
        self.points: list[Point] = []
        self.checked: set[str] = set()

    def add_study(self, study: StudyEntry, seed: int) -> None:
        """Add the points of a study with one seed; in each setting the reference comes first."""
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
        """Add the run whose model the runs of a size start from, and return its id; None if it is faulty."""
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
        """Return a run; None, with the mistake noted, if it is faulty.

        Args:
            given: its arguments.
            seed: its seed.
            processes: number of processes it is launched on.
            place, key: where to note a mistake that is about no single argument.
            reported: whether its results are reported; False if only its model is used.
        """
        task = self.spec.design.task
        values = effective(task, values_of(given))
        missing = [(given[name], path) for name in values for path in given[name].paths if not path.exists()]
        for argument, path in missing:
            what = f"there is no file or folder {path}; correct the path, or name other data with --set or --data"
            self.problems.at(argument, what)
        if missing:
            return None
        # checked once for all seeds: no script refuses a seed
        unseeded = repr((sorted(values.items()), reported))
        if unseeded not in self.checked:
            self.checked.add(unseeded)
            self.note(refusals(task, values), given, place, key)
            if reported:
                self.note(campaign_refusals(self.spec, values), given, self.spec.places["base"], "base")
        return Run(task, {**values, "seed": seed}, processes, _contents(values, given), defaults_among(task, values))

    def note(self, messages: Iterable[str], given: Arguments, place: Place, key: str) -> None:
        """Note messages of refusal, each at the argument that it is about, or else at ``place``."""
        for message in messages:
            blamed = _blamed(message, given)
            self.problems.add(blamed.place if blamed else place, blamed.key if blamed else key, message)


def _merged(*layers: Arguments) -> dict[str, Given]:
    return {name: given for layer in layers for name, given in layer.items()}


def _blamed(message: str, given: Arguments) -> Given | None:
    """Return the argument that a message is about: of those it names, the first in the most specific section."""
    words = [_SAID_AS.get(word, word) for word in re.findall(r"[A-Za-z_][A-Za-z0-9_]*", message)]
    named = [given[word] for word in words if word in given and given[word].value is not None]
    return max(named, key=lambda value: _SPECIFIC.index(value.key.split(".")[0]), default=None)


def _contents(values: Mapping[str, Any], given: Arguments) -> dict[str, Any]:
    """Return the content hashes that replace local files in the run's id, by argument."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        hashes = {str(path): content_hash(path) for path in given[name].paths}
        if hashes and name == EXTRA_ARGUMENT:
            parts = [re.fullmatch(r"([^=]*)=?([^,]*),?(.*)", text, re.DOTALL) for text in value]  # NAME=SOURCE,OPTIONS
            found[name] = [f"{part[1]}={hashes.get(part[2], part[2])},{part[3]}" for part in parts if part is not None]
        elif hashes:
            found[name] = next(iter(hashes.values()))
    return found


# ---- contradictions ------------------------------------------------------------------------------------------------


def _check_figures(spec: Spec, problems: Problems) -> None:
    """Check that the metrics of quality and of halving exist, and whether higher or lower is better."""
    metric, higher = spec.design.quality
    if "quality" in spec.places:
        place = spec.places["quality"]
        if metric not in QUALITY:
            problems.unknown(place, "quality.metric", "a metric of quality", metric, QUALITY)
        elif QUALITY[metric] != higher:
            side = "higher" if QUALITY[metric] else "lower"
            problems.add(place, "quality.better", f"{metric} is better when it is {side}; write better: {side}")
    halving = spec.design.budget.halving_metric
    if halving is None:
        return
    name, place, path = halving.removeprefix("eval_"), spec.places["budget"], "budget.halving.metric"
    if name.endswith("_scaled"):
        problems.add(place, path, f"{halving} does not exist during training, where no temperature is fitted")
    elif name not in (*METRICS, "loss"):
        problems.unknown(place, path, "a metric of evaluations", name, (*METRICS, "loss"))
    elif name != "loss" and not lower_is_better(name):
        problems.add(place, path, f"of {halving} less is not better; name eval_nll, for instance")
    ablations = [variation for variation in spec.variations.values() if variation.role == "ablation"]
    for given in [v.arguments[argument] for v in ablations for argument in _STEPS if argument in v.arguments]:
        what = "budget.halving compares ablations at the same steps; leave this to base, sizes or studies"
        problems.at(given, what)


def _check_variations(spec: Spec, problems: Problems) -> None:
    own: dict[str, str] = {}
    titles: dict[str, str] = {}
    task = spec.design.task
    for name, entry in spec.variations.items():
        path = f"variations.{name}"
        if entry.of is not None:
            _check_reader(spec, entry.of, problems)
        else:
            values = effective(task, _values(spec, entry))
            neutral = defaults_among(task, values)
            text = repr(sorted((argument, value) for argument, value in values.items() if argument not in neutral))
            if own.setdefault(text, name) != name:
                what = f"has the same arguments as {own[text]}, on top of the base; change or remove one of the two"
                problems.add(entry.place, path, what)
        if (other := titles.setdefault(entry.title, name)) != name:
            what = f"{entry.title!r} is the title of {other} too; tables and pictures need different ones"
            problems.add(entry.place, f"{path}.title", what)
    for role, name, loss in (("reference", spec.design.reference, "ce"), ("brier", spec.design.brier, "brier")):
        chosen = spec.variations.get(name)
        if chosen is None or role not in spec.places:
            continue
        if chosen.role != "main":
            what = f"{name} has the role {chosen.role}; the others wait for it, so give it the role main"
            problems.add(spec.places[role], role, what)
        found = _values(spec, chosen).get("scoring_rule", "dpsm")
        if chosen.of is not None or found != loss:
            is_what = f"reads {chosen.of.value}" if chosen.of is not None else f"has scoring_rule {found}"
            problems.add(spec.places[role], role, f"{name} {is_what}; name a variation with scoring_rule {loss}")


def _values(spec: Spec, variation: VariationEntry) -> dict[str, Any]:
    return values_of({**spec.base, **variation.arguments})


def _check_reader(spec: Spec, of: Located, problems: Problems) -> None:
    others = [name for name, other in spec.variations.items() if other.of is None]
    if of.value not in others:
        problems.at(of, f"{of.value!r} is not a variation with runs; {suggestion(str(of.value), others)}")
    elif not _values(spec, spec.variations[of.value]).get("fit_temperature"):
        what = "reads figures after temperature scaling, but no temperature is fitted; set fit_temperature in base"
        problems.at(of, what)


def _check_study(spec: Spec, study: StudyEntry, problems: Problems, path: str) -> None:
    varied = {**study.arguments, **{name: values[0] for name, values in study.grid.items() if values}}
    for given in [study.arguments[name] for name in study.grid if name in study.arguments]:
        problems.at(given, "the grid of this study varies it; leave one of the two out")
    for name, given in varied.items():
        fixing = [v for v in study.variations if name in spec.variations[v].arguments]
        if fixing and name not in study.replaces:
            what = f"the variation {fixing[0]} fixes this argument; leave it out, or say replaces: [{name}]"
            problems.at(given, what)
    for name in study.replaces - varied.keys():
        problems.add(study.place, f"{path}.replaces", f"{name} is neither in arguments nor in grid; leave it out")
    for v in study.variations:
        source = spec.variations[v].of
        if source is not None and source.value in spec.variations and source.value not in study.variations:
            what = f"{v} reads the figures of {source.value}, which is not among the variations; add it"
            problems.add(study.place, f"{path}.variations", what)
    for size, data in itertools.product(study.sizes, study.data):
        for name, given in spec.sizes[size].arguments.items():
            other = spec.data[data].arguments.get(name)
            if other is not None and other.value != given.value:
                what = f"contradicts {given.key} in {given.place}; keep one of the two"
                problems.at(other, what)


def campaign_refusals(spec: Spec, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a campaign requires of every run beyond what its script does, and the run's arguments lack."""
    if not values.get("do_train"):
        yield "do_train is off, so nothing is trained; set do_train: true in base"
    wanted = "do_predict" if spec.design.test_split == "test" else "do_eval"
    if not values.get(wanted):
        yield f"test_split is {spec.design.test_split}, which needs {wanted}; set {wanted}: true in base"
    if spec.design.budget.halving_metric is not None and values.get("eval_strategy") != "steps":
        yield "budget.halving compares evaluations at equal steps; set eval_strategy: steps and eval_steps"
    if values.get("eval_strategy") == "steps" and values.get("eval_steps") is None:
        yield "eval_strategy is steps, but eval_steps is missing (it would follow logging_steps); give eval_steps"
