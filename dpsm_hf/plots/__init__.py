"""Pictures: reliability diagrams and training curves. They draw and decide nothing."""
