"""Measure what a step costs: time, memory, floating-point operations, energy."""
