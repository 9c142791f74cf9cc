"""Comparisons of methods at equal stored bytes: sharing, its controls, and the methods of others."""

from headshare.experiments.case import METHODS
from headshare.experiments.cells import Compared
from headshare.experiments.grid import compare
from headshare.experiments.recipe import Grid, Recipe

__all__ = ["METHODS", "Compared", "Grid", "Recipe", "compare"]
