"""Methods side by side, at equal stored bytes: sharing, its controls, and what others do."""

from headshare.experiments.cells import Compared
from headshare.experiments.grid import Grid, compare
from headshare.experiments.methods import METHODS
from headshare.experiments.recipe import Recipe

__all__ = ["METHODS", "Compared", "Grid", "Recipe", "compare"]
