"""Read a campaign's YAML file, report every mistake in it, and expand it into the runs of the plan."""
