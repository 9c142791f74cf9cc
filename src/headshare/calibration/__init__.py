"""Choice and repair by output: budgets, allocation over layers, refits and rounding, on calibration text."""
