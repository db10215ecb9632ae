"""A few finished runs compared in one page; the demo."""
