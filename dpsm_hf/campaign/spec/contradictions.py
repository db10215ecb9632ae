"""Check a campaign's file for contradictions, and for settings that a campaign needs though its task does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from ...calibration import METRICS, lower_is_better
from ...runtime.yaml_lines import Located, Problems, suggestion
from .script_arguments import defaults_among, effective
from .spec import Spec, StudyEntry, VariationEntry, values_of

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
    _check_figures(spec, problems)
    if _MAIN_STUDY not in spec.studies:
        place = spec.places.get("studies", spec.places["base"])
        problems.add(place, "studies", f"the study {_MAIN_STUDY} is missing, which the verdict is about; add it")
    for name, study in spec.studies.items():
        _check_study(spec, study, problems, f"studies.{name}")


def _check_figures(spec: Spec, problems: Problems) -> None:
    """Look whether the figures that decide something exist, and are better on the side that is taken."""
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
        problems.add(place, path, f"{halving} is not there during training, where no T is fitted")
    elif name not in (*METRICS, "loss"):
        problems.unknown(place, path, "a metric of evaluations", name, (*METRICS, "loss"))
    elif name != "loss" and not lower_is_better(name):
        problems.add(place, path, f"of {halving} less is not better; name eval_nll, for instance")
    ablations = [variation for variation in spec.variations.values() if variation.role == "ablation"]
    for given in [v.arguments[argument] for v in ablations for argument in _STEPS if argument in v.arguments]:
        what = "budget.halving compares ablations at the same steps; leave this to base, sizes or studies"
        problems.add(given.place, given.key, what)


def _check_variations(spec: Spec, problems: Problems) -> None:
    own: dict[str, str] = {}
    titles: dict[str, str] = {}
    task = spec.design.task
    for name, entry in spec.variations.items():
        path = f"variations.{name}"
        if entry.of is not None:
            _check_reader(spec, entry.of, problems, f"{path}.of")
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
        found = _values(spec, chosen).get("loss_type", "dpsm")
        if chosen.of is not None or found != loss:
            is_what = f"reads {chosen.of.value}" if chosen.of is not None else f"has loss_type {found}"
            problems.add(spec.places[role], role, f"{name} {is_what}; name a variation with loss_type {loss}")


def _values(spec: Spec, variation: VariationEntry) -> dict[str, Any]:
    return values_of({**spec.base, **variation.arguments})


def _check_reader(spec: Spec, of: Located, problems: Problems, path: str) -> None:
    others = [name for name, other in spec.variations.items() if other.of is None]
    if of.value not in others:
        what = f"{of.value!r} is not a variation with runs; {suggestion(str(of.value), others)}"
        problems.add(of.place, path, what)
    elif not _values(spec, spec.variations[of.value]).get("fit_temperature"):
        what = "reads figures after temperature scaling, but no temperature is fitted; set fit_temperature in base"
        problems.add(of.place, path, what)


def _check_study(spec: Spec, study: StudyEntry, problems: Problems, path: str) -> None:
    varied = {**study.arguments, **{name: values[0] for name, values in study.grid.items() if values}}
    for given in [study.arguments[name] for name in study.grid if name in study.arguments]:
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
    """Say what a campaign wants of every run beyond what its script does, by the run's arguments."""
    if not values.get("do_train"):
        yield "do_train is off, so nothing is trained; set do_train: true in base"
    wanted = "do_predict" if spec.design.test_split == "test" else "do_eval"
    if not values.get(wanted):
        yield f"test_split is {spec.design.test_split}, which needs {wanted}; set {wanted}: true in base"
    if spec.design.budget.halving_metric is not None and values.get("eval_strategy") != "steps":
        yield "budget.halving compares evaluations at equal steps; set eval_strategy: steps and eval_steps"
    if values.get("eval_strategy") == "steps" and values.get("eval_steps") is None:
        yield "eval_strategy is steps, but eval_steps is missing (it would follow logging_steps); give eval_steps"
