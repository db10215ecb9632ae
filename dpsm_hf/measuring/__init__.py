"""Time, memory, operations and energy of a step."""
