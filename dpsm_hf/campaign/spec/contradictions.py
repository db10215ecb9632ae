"""Check a campaign's file for contradictions, and for settings that a campaign needs though its task does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from ...calibration import METRICS, lower_is_better
from ...runtime.yaml_lines import Problems, suggestion
from .script_arguments import defaults_among, effective
from .spec import Arguments, Given, Spec, StudyEntry, VariationEntry

#: Metrics that quality may be measured by, and whether more is better.
QUALITY = {
    "perplexity": False, "nll": False, "bits_per_byte": False, "token_accuracy": True, "rouge1": True, "rouge2": True,
    "rougeL": True, "rougeLsum": True, "bertscore_f1": True,
}  # fmt: skip
# Arguments that say at which steps a run is evaluated.
_STEPS = (
    "max_steps", "num_train_epochs", "eval_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_MAIN_STUDY = "main"


def check_spec(spec: Spec, problems: Problems) -> None:
    """Note what contradicts in a file.

    Args:
        spec: what it says.
        problems: gets the mistakes.
    """
    _check_variations(spec, problems)
    _check_titles(spec, problems)
    _check_figures(spec, problems)
    if _MAIN_STUDY not in spec.studies:
        place = spec.places.get("studies", spec.places["base"])
        problems.add(place, "studies", f"the study {_MAIN_STUDY} is missing, which the verdict is about; add it")
    for name, study in spec.studies.items():
        _check_study(spec, study, problems, f"studies.{name}")


def values_of(given: Arguments) -> dict[str, Any]:
    """Return the arguments that have a value, as plain values."""
    return {name: value.value for name, value in given.items() if value.value is not None}


def _check_titles(spec: Spec, problems: Problems) -> None:
    seen: dict[str, str] = {}
    for name, entry in spec.variations.items():
        if entry.title in seen:
            what = f"{entry.title!r} is the title of {seen[entry.title]} too; tables and pictures need different ones"
            problems.add(entry.place, f"variations.{name}.title", what)
        seen.setdefault(entry.title, name)


def _check_figures(spec: Spec, problems: Problems) -> None:
    """Look whether the figures that decide something exist, and are better on the side that is taken."""
    metric, higher = spec.quality
    if "quality" in spec.places:
        place = spec.places["quality"]
        if metric not in QUALITY:
            problems.unknown(place, "quality.metric", "a metric of quality", metric, QUALITY)
        elif QUALITY[metric] != higher:
            side = "higher" if QUALITY[metric] else "lower"
            problems.add(place, "quality.better", f"{metric} is better when it is {side}; write better: {side}")
    halving = spec.budget.halving_metric
    if halving is None:
        return
    name, place = halving.removeprefix("eval_"), spec.places["budget"]
    if name.endswith("_scaled"):
        problems.add(place, "budget.halving.metric", f"{halving} is not there during training, where no T is fitted")
    elif name not in (*METRICS, "loss"):
        problems.unknown(place, "budget.halving.metric", "a metric of evaluations", name, (*METRICS, "loss"))
    elif name != "loss" and not lower_is_better(name):
        problems.add(place, "budget.halving.metric", f"of {halving} less is not better; name eval_nll, for instance")
    for variation in spec.variations.values():
        for argument in _STEPS:
            if variation.role == "ablation" and argument in variation.arguments:
                given = variation.arguments[argument]
                what = "budget.halving compares ablations at the same steps; leave this to base, sizes or studies"
                problems.add(given.place, given.key, what)


def _check_variations(spec: Spec, problems: Problems) -> None:
    own: dict[str, str] = {}
    for name, entry in spec.variations.items():
        path = f"variations.{name}"
        if entry.of is not None:
            _check_reader(spec, entry, problems, path)
            continue
        values = values_of({**spec.base, **entry.arguments})
        values = effective(spec.task, values)
        neutral = defaults_among(spec.task, values)
        text = repr(sorted((argument, value) for argument, value in values.items() if argument not in neutral))
        if text in own:
            what = f"has the same arguments as {own[text]}, on top of the base; change or remove one of the two"
            problems.add(entry.place, path, what)
        own.setdefault(text, name)
    for role, loss in (("reference", "ce"), ("brier", "brier")):
        chosen = spec.variations.get(spec.reference if role == "reference" else spec.brier)
        if chosen is None or role not in spec.places:
            continue
        if chosen.role != "main":
            what = f"{chosen.name} has the role {chosen.role}; the others wait for it, so give it the role main"
            problems.add(spec.places[role], role, what)
        found = values_of({**spec.base, **chosen.arguments}).get("loss_type", "dpsm")
        if chosen.of is not None or found != loss:
            is_what = f"reads {chosen.of.value}" if chosen.of is not None else f"has loss_type {found}"
            problems.add(spec.places[role], role, f"{chosen.name} {is_what}; name a variation with loss_type {loss}")


def _check_reader(spec: Spec, entry: VariationEntry, problems: Problems, path: str) -> None:
    assert entry.of is not None
    source, place = entry.of.value, entry.of.place
    others = [name for name, other in spec.variations.items() if other.of is None]
    if source not in others:
        problems.add(
            place, f"{path}.of", f"{source!r} is not a variation with runs; {suggestion(str(source), others)}"
        )
    elif not values_of({**spec.base, **spec.variations[source].arguments}).get("fit_temperature"):
        what = "reads figures after temperature scaling, but no temperature is fitted; set fit_temperature in base"
        problems.add(place, f"{path}.of", what)


def _check_study(spec: Spec, study: StudyEntry, problems: Problems, path: str) -> None:
    varied: dict[str, Given] = {
        **study.arguments,
        **{name: values[0] for name, values in study.grid.items() if values},
    }
    for name in study.grid:
        if name in study.arguments:
            given = study.arguments[name]
            problems.add(given.place, given.key, "the grid of this study varies it; leave one of the two out")
    for name, given in varied.items():
        fixing = [v for v in study.variations if name in spec.variations[v].arguments]
        if fixing and name not in study.replaces:
            what = f"the variation {fixing[0]} fixes this argument; leave it out, or say replaces: [{name}]"
            problems.add(given.place, given.key.rsplit("[", 1)[0], what)
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
                problems.add(other.place, other.key, what)


def campaign_refusals(spec: Spec, values: Mapping[str, Any]) -> Iterator[str]:
    """Say what a campaign wants of every run beyond what its script does.

    Args:
        spec: what the file says.
        values: the run's arguments.
    """
    if not values.get("do_train"):
        yield "do_train is off, so nothing is trained; set do_train: true in base"
    wanted = "do_predict" if spec.test_split == "test" else "do_eval"
    if not values.get(wanted):
        yield f"test_split is {spec.test_split}, which needs {wanted}; set {wanted}: true in base"
    if spec.budget.halving_metric is not None and values.get("eval_strategy") != "steps":
        yield "budget.halving compares evaluations at equal steps; set eval_strategy: steps and eval_steps"
    if values.get("eval_strategy") == "steps" and values.get("eval_steps") is None:
        yield "eval_strategy is steps, but eval_steps is missing (it would follow logging_steps); give eval_steps"
