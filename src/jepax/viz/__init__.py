"""Figures of a run: its curves, and its images as the encoders see them."""

from jepax.viz.figures import draw_figures

__all__ = ["draw_figures"]
