"""Run a campaign: launch its runs, watch, prune and record them, and resume them after a kill."""
