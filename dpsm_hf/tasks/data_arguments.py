"""The data arguments that both scripts have: where rows come from, and which of them a temperature is fitted on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.loading import check_percentage, check_sources


@dataclass
class DataSource:
    """Where the rows of each split come from; the names are those of the Hugging Face examples."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set: a hub name, a folder, or text that comes with Python (dpsm_hf): python-docs, the "
            "language reference and docstrings, or python-docstrings, docstrings and their summary lines."
        },
    )
    dataset_config_name: str | None = field(
        default=None,
        metadata={"help": "Configuration of the data set; for Python's own, site-packages adds installed packages."},
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "File to train on: csv, json, jsonl or parquet, for language modelling also txt; also .gz."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on, of the same kind."})
    test_file: str | None = field(
        default=None, metadata={"help": "File that --do_predict evaluates on, of the same kind."}
    )
    calibration_file: str | None = field(
        default=None, metadata={"help": "dpsm_hf: file that --fit_temperature fits on, of the same kind."}
    )
    calibration_split_percentage: int = field(
        default=5,
        metadata={
            "help": "dpsm_hf: share of the train split, its last rows, that --fit_temperature sets aside to fit on "
            "where there is no calibration split."
        },
    )

    def __post_init__(self) -> None:
        check_sources(self.dataset_name, self.files())
        check_percentage("calibration", self.calibration_split_percentage)

    def files(self) -> dict[str, str]:
        """Give the local files by split."""
        given = {split: getattr(self, f"{split}_file") for split in ("train", "validation", "test", "calibration")}
        return {split: path for split, path in given.items() if path is not None}

    def check_calibration(self, fit_temperature: bool) -> None:
        """Refuse a file to fit on where nothing is fitted.

        Raises:
            ValueError: naming the option that is missing.
        """
        if self.calibration_file is not None and not fit_temperature:
            raise ValueError("--calibration_file has no effect without --fit_temperature: pass it too.")
