"""Figures: reliability diagrams and training curves, drawn from data that other rooms compute."""
