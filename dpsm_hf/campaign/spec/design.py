"""`Campaign`: the design of a campaign, that is its runs and the points of the plan that they stand for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SCALES = ("small", "paper")
TRACKERS = ("wandb", "tensorboard", "trackio")

#: Main variations, which the claims are about, are never pruned; ablations may be.
ROLES = ("main", "ablation")

#: Arguments that change only what is logged, shown or kept; they are not part of a run's id.
DISPLAY = frozenset((
    "disable_tqdm", "frozen_cache", "log_component_grad_norms", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "project",
    "remove_frozen_cache", "trackio_space_id",
))  # fmt: skip

# Arguments that determine the model and the tokenizer.
_ARCHITECTURE = (
    "model_name_or_path", "config_name", "model_type", "config_overrides", "tokenizer_name", "tokenizer_vocab_size",
)  # fmt: skip
# Arguments that determine how long a run of a given size on a given data set trains.
_LENGTH = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "block_size",
    "max_train_samples", "low_resource",
)  # fmt: skip
# The placeholder in an argument for the output folder of another run.
_RUN_FOLDER = re.compile(r"\{run:([^{}]+)\}")


@dataclass(frozen=True)
class Variation:
    """One way to train, as the arguments by which it differs from the base.

    Args:
        name, title: unique in the campaign; the title is shown in tables.
        role: ``main`` or ``ablation``.
        arguments: of the training script, in addition to the base's.
        of: another variation, whose results after temperature scaling this one stands for; it then has no arguments
            and no runs of its own.
    """

    name: str
    title: str
    role: str = "main"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run: everything that determines its results.

    Args:
        task: a key of `tasks.TASKS`.
        arguments: of the script, without ``output_dir`` and trackers. ``{run:ID}`` in one stands for the output folder
            of another run, whose model this one starts from.
        processes: number of processes it is launched on.
        contents: hashes of the content of local files, by the argument that names them. They take the place of the
            paths in the id, so moving the files keeps the id and changing them makes a new run.
        neutral: names of arguments with the script's own default; they are not part of the id.
    """

    task: str
    arguments: Mapping[str, Any]
    processes: int = 1
    contents: Mapping[str, Any] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """Return 12 hexadecimal digits of the SHA-256 of what determines the results; equal runs have equal ids."""
        left_out = DISPLAY | self.neutral
        arguments = {name: value for name, value in self.arguments.items() if name not in left_out}
        if "scoring_rule" in arguments:  # hashed under its former name, so that the ids of earlier records stay valid
            arguments["loss_type"] = arguments.pop("scoring_rule")
        content = {"task": self.task, "processes": self.processes, "arguments": {**arguments, **self.contents}}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the ids of the runs that must have finished before this one can start."""
        texts = [value for value in self.arguments.values() if isinstance(value, str)]
        return tuple(dict.fromkeys(match for text in texts for match in _RUN_FOLDER.findall(text)))


@dataclass(frozen=True)
class Setting:
    """What runs share that differ only in variation and seed; ``settings`` are the arguments that the study varies."""

    study: str
    size: str
    data: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Return the setting in words, for tables."""
        return ", ".join([self.study, self.size, self.data, *(f"{name} {value}" for name, value in self.settings)])

    @property
    def plain(self) -> Setting:
        """Return the setting without the arguments that the study varies."""
        return Setting(self.study, self.size, self.data)


@dataclass(frozen=True)
class Point:
    """One point of the plan, and its run; several points may share a run.

    Args:
        study: the part of the campaign it belongs to: ``main``, ``flipped-targets``, ``warm-up`` ...
        variation, size, data: names.
        seed: of weights and data order.
        run_id: `Run.id`.
        settings: the arguments that the study varies.
        scaled: whether the results of the run after temperature scaling are meant.
    """

    study: str
    variation: str
    size: str
    data: str
    seed: int
    run_id: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = False

    @property
    def setting(self) -> Setting:
        """Return the setting, which points share that differ only in variation and seed."""
        varied = tuple(sorted((name, str(value)) for name, value in self.settings.items()))
        return Setting(self.study, self.size, self.data, varied)


@dataclass(frozen=True)
class Budget:
    """How much training time the campaign may take, and which ablations are stopped early.

    Args:
        limit: total training time as a multiple of the measured time of as many runs of the reference.
        halving_metric: a metric of evaluations during training, lower is better; None stops no run early.
        halving_rungs: shares of the training steps after which the worse ablations are stopped.
        halving_keep: share of the ablations to keep at each rung.

    Raises:
        ValueError: unless the rungs are rising shares and ``halving_keep`` is a share, between 0 and 1.
    """

    limit: float = 1.1
    halving_metric: str | None = None
    halving_rungs: tuple[float, ...] = (0.25, 0.5)
    halving_keep: float = 0.5

    def __post_init__(self) -> None:
        rungs = list(self.halving_rungs)
        if rungs != sorted(set(rungs)) or not all(0 < rung < 1 for rung in rungs):
            raise ValueError(f"budget: halving_rungs {rungs} must be rising shares of the steps between 0 and 1.")
        if not 0 < self.halving_keep < 1:
            raise ValueError(f"budget: halving_keep {self.halving_keep} must lie between 0 and 1.")


@dataclass(frozen=True)
class Campaign:
    """A whole campaign at one scale.

    Args:
        name, title: of the campaign.
        scale: ``paper`` or ``small``.
        task: a key of `tasks.TASKS`.
        variations: in the order of the tables.
        points: in the order in which they are run: seed by seed, the reference first.
        runs: by `Run.id`.
        reference: the variation that all others are compared with (cross-entropy).
        brier: the variation trained with the Brier score alone.
        budget: of time.
        audit: arguments of the efficiency audit; None leaves it out.
        quality: the metric of quality and whether higher is better: ``("perplexity", False)``.
        test_split: the split whose results are reported.
        source: the text of the YAML file, kept with the results.
        track: trackers that every run reports to, such as ``wandb``.
        preparations: titles, by id, of runs that are at no point of the plan, but whose models others start from.
        titles: titles for tables, by kind (``study``, ``size``, ``data``) and name.
        planned: facts for the plan, which loads neither data nor models, by kind and name: ``train_tokens`` and
            ``train_examples`` of data; ``model_type`` and ``config_overrides`` of sizes.
    """

    name: str
    title: str
    scale: str
    task: str
    variations: tuple[Variation, ...]
    points: tuple[Point, ...]
    runs: Mapping[str, Run]
    reference: str
    brier: str
    budget: Budget = Budget()
    audit: Mapping[str, Any] | None = None
    quality: tuple[str, bool] = ("perplexity", False)
    test_split: str = "test"
    source: str = ""
    track: tuple[str, ...] = ()
    preparations: Mapping[str, str] = field(default_factory=dict)
    titles: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    planned: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def variation(self, name: str) -> Variation:
        """Return a variation by its name; raise KeyError for an unknown one."""
        return {v.name: v for v in self.variations}[name]

    def with_architecture(self, run: Run) -> Run:
        """Return a run with the model and tokenizer arguments of the run that it starts from, if there is one."""
        source = run
        while match := _RUN_FOLDER.fullmatch(str(source.arguments.get("model_name_or_path", ""))):
            source = self.runs[match[1]]
        if source is run:
            return run
        arguments, contents = (
            {name: value for name, value in own.items() if name not in _ARCHITECTURE}
            | {name: value for name, value in theirs.items() if name in _ARCHITECTURE and value is not None}
            for own, theirs in ((run.arguments, source.arguments), (run.contents, source.contents))
        )
        return replace(run, arguments=arguments, contents=contents)

    @property
    def planned_points(self) -> dict[str, Point]:
        """Return the first point of each run, by run id, leaving out points for results after temperature scaling."""
        found: dict[str, Point] = {}
        for point in self.points:
            if not point.scaled:
                found.setdefault(point.run_id, point)
        return found

    def length(self, point: Point) -> tuple[Any, ...]:
        """Return what determines how long the run at a point trains; runs with equal values train equally long."""
        arguments = self.runs[point.run_id].arguments
        return (point.size, point.data, *(str(arguments.get(name)) for name in _LENGTH))

    @property
    def order(self) -> list[str]:
        """Return the ids of the runs in the order in which they are run, each once, after those it needs.

        Raises:
            ValueError: for runs that need each other in a circle.
        """
        order: dict[str, None] = {}

        def add(run_id: str, path: tuple[str, ...]) -> None:
            if run_id in path:
                raise ValueError(f"Runs start from each other in a circle: {' -> '.join((*path, run_id))}.")
            if run_id not in order:
                for needed in self.runs[run_id].needs:
                    add(needed, (*path, run_id))
                order[run_id] = None

        for point in self.points:
            for run_id in (*self.runs[point.run_id].needs, point.run_id):
                add(run_id, ())
        return list(order)
