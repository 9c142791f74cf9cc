"""Choice and repair by output: budgets, allocation over layers, refits and rounding, on calibration text.

`run` holds the order of the steps and what a stopped run goes on from. `choose` makes cost curves
and `allocate` takes from them under a budget; it never sees a weight. Everything below looks at one
layer at a time and compares no layers.
"""
