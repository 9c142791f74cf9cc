"""Comparisons of methods at equal stored bytes: sharing, its controls, and the methods of others."""

from typing import TYPE_CHECKING

from headshare.lazy import lazy_names

if TYPE_CHECKING:
    from headshare.experiments.case import Case, Edit, method
    from headshare.experiments.cells import Compared
    from headshare.experiments.grid import compare
    from headshare.experiments.methods import METHODS
    from headshare.experiments.recipe import Grid, Recipe
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "headshare.experiments.case": "Case Edit method",
            "headshare.experiments.cells": "Compared",
            "headshare.experiments.grid": "compare",
            "headshare.experiments.methods": "METHODS",
            "headshare.experiments.recipe": "Grid Recipe",
        },
    )

__all__ = ["METHODS", "Case", "Compared", "Edit", "Grid", "Recipe", "compare", "method"]
