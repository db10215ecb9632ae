"""Time and memory of dpsm_hf against its alternatives: ``python -m benchmarks --help``."""
