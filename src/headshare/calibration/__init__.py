"""Choice and repair by output: budgets, allocation over layers, refits and rounding to 4 bits, on calibration text."""
