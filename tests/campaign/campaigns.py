"""Campaigns for tests, made by hand: a tiny GPT-2 on texts that Python has, a few steps a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

from dpsm_hf.campaign.spec.design import Budget, Campaign, Point, Run, Variation

LOSSES: Mapping[str, dict[str, Any]] = {
    "ce": {"scoring_rule": "ce"},
    "brier": {"scoring_rule": "brier"},
    "dpsm": {"scoring_rule": "dpsm", "alpha_warmup_steps": 0.5},
    "fixed": {"scoring_rule": "dpsm", "alpha_schedule": "constant", "alpha_end": 0.5},
    "focal": {"scoring_rule": "focal"},
    "spherical": {"scoring_rule": "spherical"},
}


def write_texts(folder: Path) -> dict[str, str]:
    """Write texts of the Python language reference and return the arguments that name them."""
    texts = sorted(topics.topics.values(), key=len)
    parts = {"train": texts[-8:-2], "validation": texts[20:30], "test": texts[30:40]}
    for split, chosen in parts.items():
        (folder / f"{split}.txt").write_text("\n".join(chosen), encoding="utf-8")
    return {f"{split}_file": str(folder / f"{split}.txt") for split in parts}


def tiny_arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a tiny run of run_clm_dpsm.py."""
    return {
        **write_texts(folder),
        "model_type": "gpt2",
        "config_overrides": "n_embd=16,n_layer=1,n_head=2,n_positions=32,resid_pdrop=0.1,embd_pdrop=0,attn_pdrop=0",
        "tokenizer_name": "train-bpe",
        "tokenizer_vocab_size": 300,
        "block_size": 32,
        "max_eval_samples": 16,
        "max_predict_samples": 16,
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "learning_rate": 0.01,
        "max_steps": 8,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        **changes,
    }


def make_campaign(
    arguments: Mapping[str, Any],
    variations: Sequence[str] = ("ce", "brier", "dpsm"),
    *,
    ablations: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    budget: Budget | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    track: tuple[str, ...] = (),
    processes: int = 1,
) -> Campaign:
    """Return a campaign of one size and data set; `own` holds further arguments by variation."""
    runs, points = {}, []
    for seed in seeds:
        for name in (*variations, *ablations):
            loss = LOSSES.get(name, {})
            merged = {**arguments, **loss, **(own or {}).get(name, {}), "seed": seed}
            run = Run("language-modelling", merged, processes)
            runs[run.id] = run
            points.append(Point("main", name, "tiny", "reference", seed, run.id))
    made = [
        Variation(name, name, "ablation" if name in ablations else "main", LOSSES.get(name, {}))
        for name in (*variations, *ablations)
    ]
    return Campaign(
        name="test",
        title="Test",
        scale="small",
        task="language-modelling",
        variations=tuple(made),
        points=tuple(points),
        runs=runs,
        reference="ce",
        brier="brier",
        budget=budget or Budget(limit=100.0),
        source="name: test\n",
        track=track,
    )


def run_of(campaign: Campaign, variation: str, seed: int = 1) -> str:
    """Return the id of a run."""
    return next(p.run_id for p in campaign.points if p.variation == variation and p.seed == seed)
