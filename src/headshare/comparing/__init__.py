"""Methods side by side, at equal stored bytes: sharing, its controls, and what others do."""

from headshare.comparing.cells import Compared
from headshare.comparing.grid import Grid, compare
from headshare.comparing.methods import METHODS
from headshare.comparing.recipe import Recipe

__all__ = ["METHODS", "Compared", "Grid", "Recipe", "compare"]
