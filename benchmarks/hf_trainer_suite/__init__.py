"""Transformers' own Trainer tests, run with `DPSMTrainer` in the place of `Trainer`; see docs/hf_trainer_suite.md."""
