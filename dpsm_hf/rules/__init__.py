"""The formulas: value and gradient of every scoring rule from the scalars of a row, and the schedules of alpha."""
