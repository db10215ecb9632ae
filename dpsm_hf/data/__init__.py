"""Where text comes from and how it becomes rows of tokens."""
