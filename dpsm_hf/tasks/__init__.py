"""One run from arguments to outcome: language modelling, summarisation, and calibration of a saved model."""
