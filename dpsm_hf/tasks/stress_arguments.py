"""The arguments of stress tests (corrupted targets, parts of the training set) and what the scripts make of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..data.corruption import REPLACEMENTS, SummarySwaps, TargetFlips, exact_share, label_counts, replacement_weights
from ..data.loading import AnyDataset
from ..data.subsets import low_resource, split_fold
from ..models.language_model import vocabulary_size
from ..runtime.options import option
from ..training.corruption import Corruption

logger = logging.getLogger(__name__)

#: Options whose value is a share.
_SHARES = ("flip_target_tokens", "flip_steps", "swap_summaries", "low_resource")


@dataclass
class StressArguments:
    """Which targets are corrupted in training, and which part of the training set is used."""

    flip_target_tokens: float | None = option(
        "dpsm_hf: replace this share of the target tokens by others in training; inputs and evaluation stay clean."
    )
    flip_steps: float | None = option("dpsm_hf: share of the optimizer steps with flipped targets; left out, all.")
    flip_replacement: str | None = option(
        "dpsm_hf: what flipped targets become: uniform, any other ordinary token (left out, too); "
        "unigram, one drawn as often as it is a label of the training set.",
        choices=REPLACEMENTS,
    )
    low_resource: float | None = option(
        "dpsm_hf: train on this share of the training set, chosen by a hash of each example; smaller "
        "shares are parts of larger ones."
    )
    cross_validation_fold: int | None = option(
        "dpsm_hf: validate on this fold of the train split, from 0 on, and train on the others; needs "
        "--cross_validation_folds."
    )
    cross_validation_folds: int | None = option(
        "dpsm_hf: number of folds, told apart by a hash of each example, never by its place."
    )

    def check_stress(self, training_args: TrainingArguments) -> None:
        """Refuse stress options out of range, and those that contradict others or have no effect.

        Raises:
            ValueError: naming the option, its value and the way out.
        """
        given = {name: value for name in _SHARES if (value := getattr(self, name, None)) is not None}
        for name, share in given.items():
            exact_share(f"--{name}", share)
        for name in ("flip_steps", "flip_replacement"):
            if getattr(self, name) is not None and self.flip_target_tokens is None:
                raise ValueError(
                    f"--{name} {getattr(self, name)} has no effect without --flip_target_tokens: pass the share of "
                    "target tokens too, or leave it out."
                )
        if self.flip_replacement == "unigram" and getattr(self, "streaming", False):
            raise ValueError(
                "--flip_replacement unigram counts the labels of the training set, which --streaming does not know: "
                "use uniform, or leave out --streaming."
            )
        if given and not training_args.do_train:
            name, share = next(iter(given.items()))
            raise ValueError(f"--{name} {share} has no effect without --do_train: pass it too, or leave it out.")
        self._check_folds(training_args)

    def _check_folds(self, training_args: TrainingArguments) -> None:
        fold, folds = self.cross_validation_fold, self.cross_validation_folds
        if fold is None and folds is None:
            return
        if fold is None or folds is None:
            there, missing = ("fold", "folds") if folds is None else ("folds", "fold")
            raise ValueError(
                f"--cross_validation_{there} {folds if fold is None else fold} needs --cross_validation_{missing}: "
                "pass both, or neither."
            )
        if folds < 2:
            raise ValueError(f"--cross_validation_folds {folds} must be at least 2: one part trains, one validates.")
        if not 0 <= fold < folds:
            raise ValueError(f"--cross_validation_fold {fold} must lie between 0 and {folds - 1}, of {folds} folds.")
        if not (training_args.do_train or training_args.do_eval):
            raise ValueError(
                f"--cross_validation_fold {fold} has no effect without --do_train or --do_eval: pass one of them."
            )
        if getattr(self, "validation_file", None) is not None:
            raise ValueError(
                f"--cross_validation_fold {fold} validates on a part of the train split, so --validation_file "
                f"{getattr(self, 'validation_file', None)} would not be used: leave one of them out."
            )
        if getattr(self, "dataset_name", None) is None and getattr(self, "train_file", None) is None:
            raise ValueError(f"--cross_validation_fold {fold} needs a --train_file or a --dataset_name to cut.")

    # ---- parts of the training set ---------------------------------------------------------------------------------

    def splits_to_load(self, wanted: Sequence[str]) -> list[str]:
        """Return the splits that have to exist for those that are wanted: a fold comes out of train."""
        if self.cross_validation_fold is None:
            return list(wanted)
        return list(dict.fromkeys("train" if split == "validation" else split for split in wanted))

    def take_fold(
        self, splits: Mapping[str, AnyDataset], columns: Sequence[str], *, by_document: bool = False
    ) -> dict[str, AnyDataset]:
        """Return the splits with the fold of train as validation; as they are without --cross_validation_fold.

        Args:
            splits: with ``train``.
            columns: whose texts make up an example.
            by_document: examples are documents of several rows, each ended by a blank one.
        """
        fold, folds = self.cross_validation_fold, self.cross_validation_folds
        if fold is None or folds is None or "train" not in splits:
            return dict(splits)
        train, validation = split_fold(splits["train"], fold, folds, columns, by_document=by_document)
        replaced = " The validation split is not used." if "validation" in splits else ""
        logger.info("Fold %d of %d: %s.%s", fold, folds, _sizes(train, validation), replaced)
        return {**splits, "train": train, "validation": validation}

    def take_low_resource(
        self, train: AnyDataset, columns: Sequence[str], *, by_length: bool = False, by_document: bool = False
    ) -> AnyDataset:
        """Return the share of the training set that --low_resource asks for; see `dpsm_hf.data.subsets`."""
        if self.low_resource is None:
            return train
        kept = low_resource(train, self.low_resource, columns, by_length=by_length, by_document=by_document)
        if hasattr(kept, "__len__"):
            logger.info("low_resource %s: %d of %d rows are trained on.", self.low_resource, len(kept), len(train))
        return kept

    # ---- corruption ------------------------------------------------------------------------------------------------

    def corruption(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train_rows: Any, seed: int
    ) -> Corruption:
        """Return what a trainer is to corrupt.

        Args:
            model: its vocabulary is what labels are drawn from.
            tokenizer: its special tokens are never drawn.
            train_rows: the rows to train on, whose labels are counted for unigram replacement; None without training.
            seed: of the choices.
        """
        share, swap = self.flip_target_tokens, getattr(self, "swap_summaries", None)
        flips = None
        if share is not None and train_rows is not None:
            vocabulary = vocabulary_size(model) or len(tokenizer)
            counts = label_counts(train_rows, vocabulary) if self.flip_replacement == "unigram" else None
            special = never_drawn(model, tokenizer, vocabulary)
            weights = replacement_weights(vocabulary, special, counts)
            flips = TargetFlips(share, weights, steps=1.0 if self.flip_steps is None else self.flip_steps, seed=seed)
        return Corruption(flips=flips, swaps=None if swap is None else SummarySwaps(swap, seed))


@dataclass
class SummaryStressArguments(StressArguments):
    """The stress tests of pairs: those of all training sets, and summaries that belong to other texts."""

    swap_summaries: float | None = option(
        "dpsm_hf: exchange the summaries of this share of the pairs of each optimizer step in training; "
        "none of them keeps its own."
    )

    def check_stress(self, training_args: TrainingArguments) -> None:
        """Refuse what `StressArguments` refuses, and steps too small to swap summaries in."""
        super().check_stress(training_args)
        if self.swap_summaries is None:
            return
        accumulation = training_args.gradient_accumulation_steps
        pairs = training_args.train_batch_size * training_args.world_size * accumulation
        if pairs < 2:
            raise ValueError(
                f"--swap_summaries {self.swap_summaries} needs optimizer steps of at least 2 pairs, and "
                "--per_device_train_batch_size and --gradient_accumulation_steps make it 1: raise one of them."
            )


def never_drawn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    """Return the ids that replace no target: special tokens, and rows of the model's head that no token has."""
    special = {int(token) for token in tokenizer.all_special_ids}
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for name in ("bos", "eos", "pad", "decoder_start"):
        value = getattr(model.config, f"{name}_token_id", None)
        special |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return sorted(special | set(range(len(tokenizer), vocabulary)))


def _sizes(train: AnyDataset, validation: AnyDataset) -> str:
    if not hasattr(train, "__len__"):
        return "told apart as the stream comes"
    return f"{len(train)} rows to train on, {len(validation)} to validate on"
