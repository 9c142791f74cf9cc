"""Bits under a budget: what rounding each matrix costs predictions, and widths and structure chosen together.

`costs` looks at one layer at a time. `joint` sees no weight: it takes from cost curves and costs of rounding.
"""
