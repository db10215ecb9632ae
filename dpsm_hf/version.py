"""The one place that holds the package's version (setup.cfg reads it from here)."""

__version__ = "0.1.0"
