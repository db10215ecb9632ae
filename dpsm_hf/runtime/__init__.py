"""Files, child processes, distributed sums, named ranges: nothing of machine learning."""
