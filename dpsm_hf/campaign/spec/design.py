"""The design of a campaign: which runs there are, and where in the plan each of them stands."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SCALES = ("small", "paper")
TRACKERS = ("wandb", "tensorboard", "trackio")

#: Variations that carry the claims are never pruned; ablations may be.
ROLES = ("main", "ablation")

#: Arguments that change the log and the screen, but no result; no part of a run's id.
DISPLAY = frozenset((
    "disable_tqdm", "log_component_grad_norms", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "project",
    "trackio_space_id",
))  # fmt: skip

# Arguments that say which model and which tokenizer a script builds.
_ARCHITECTURE = (
    "model_name_or_path", "config_name", "model_type", "config_overrides", "tokenizer_name", "tokenizer_vocab_size",
)  # fmt: skip
# What decides how long a run of one size on one data set trains.
_LENGTH = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "block_size",
    "max_train_samples", "low_resource",
)  # fmt: skip
# What stands in an argument for the output folder of another run.
_RUN_FOLDER = re.compile(r"\{run:([^{}]+)\}")


@dataclass(frozen=True)
class Variation:
    """One way to train, as its difference from the base.

    Args:
        name, title: unique in the campaign; the title is in words, for tables.
        role: ``main`` or ``ablation``.
        arguments: of the training script, beyond the base's.
        of: the variation whose runs it reads after temperature scaling; then it has no arguments and no runs.
    """

    name: str
    title: str
    role: str = "main"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run: everything that decides its numbers.

    Args:
        task: a key of `tasks.TASKS`.
        arguments: of the script, without ``output_dir`` and trackers. ``{run:ID}`` in one stands for the output folder
            of another run, whose model this one starts from.
        processes: that it is launched on.
        contents: for arguments that name local files, the hash of their content, which stands in the id: moving the
            files keeps the id, changing them makes a new run.
        neutral: arguments that were given the script's own default; no part of the id.
    """

    task: str
    arguments: Mapping[str, Any]
    processes: int = 1
    contents: Mapping[str, Any] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """Return 12 hexadecimal digits of the SHA-256 of what matters; equal for runs that are the same."""
        left_out = DISPLAY | self.neutral
        arguments = {name: value for name, value in self.arguments.items() if name not in left_out}
        if "scoring_rule" in arguments:  # under its former name, so that the ids of earlier records stay
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
    """What runs have in common that differ in variation and seed alone; ``settings`` is what the study varies."""

    study: str
    size: str
    data: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Return it in words, for a table."""
        return ", ".join([self.study, self.size, self.data, *(f"{name} {value}" for name, value in self.settings)])

    @property
    def plain(self) -> Setting:
        """Return it without what the study varies."""
        return Setting(self.study, self.size, self.data)


@dataclass(frozen=True)
class Point:
    """One place in the plan, and the run that stands there; several points may share a run.

    Args:
        study: the part of the campaign it belongs to: ``main``, ``flipped-targets``, ``warm-up`` ...
        variation, size, data: names.
        seed: of weights and data order.
        run_id: `Run.id`.
        settings: what the study varies, by argument name.
        scaled: whether its figures are those after temperature scaling.
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
        """Return what two points have in common where only variation and seed differ."""
        varied = tuple(sorted((name, str(value)) for name, value in self.settings.items()))
        return Setting(self.study, self.size, self.data, varied)


@dataclass(frozen=True)
class Budget:
    """How much time the campaign may take, and which ablations are stopped early.

    Args:
        limit: total training time as a multiple of what as many runs of the reference take; measured, not guessed.
        halving_metric: of evaluations during training, lower is better; None never prunes.
        halving_rungs: shares of the training steps after which the worse half of the ablations is stopped.
        halving_keep: share of the ablations that is kept at each rung.

    Rungs that are no rising shares, or a kept share that is none, are a ValueError.
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
        quality: the metric of quality and whether more of it is better: ``("perplexity", False)``.
        test_split: the split whose figures are reported.
        source: the YAML file's text, for the record.
        track: trackers that every run reports to, ``wandb`` for instance.
        preparations: titles, by id, of runs that stand nowhere in the plan, but whose models others start from.
        titles: in words, by kind (``study``, ``size``, ``data``) and name.
        planned: what the plan was told about sizes and data beside arguments, by kind and name: ``train_tokens``,
            ``train_examples``, ``architecture``.
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
        """Return a variation by its name; an unknown one is a KeyError."""
        return {v.name: v for v in self.variations}[name]

    def with_architecture(self, run: Run) -> Run:
        """Return one of the runs, with the model and tokenizer of the run that it starts from where it does."""
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
        """Return the first point of each run, by run id, without those that read its figures after scaling."""
        found: dict[str, Point] = {}
        for point in self.points:
            if not point.scaled:
                found.setdefault(point.run_id, point)
        return found

    def length(self, point: Point) -> tuple[Any, ...]:
        """Return what decides how long the run at a point trains: runs that agree in it are as long as each other."""
        arguments = self.runs[point.run_id].arguments
        return (point.size, point.data, *(str(arguments.get(name)) for name in _LENGTH))

    @property
    def order(self) -> list[str]:
        """Return the ids of the runs in the order in which they are run, each once, after those it needs.

        Runs that need each other in a circle are a ValueError.
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
