"""The scoring rules, each with its value and gradient per token, and the schedules of alpha."""
