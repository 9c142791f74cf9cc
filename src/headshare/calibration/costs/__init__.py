"""Cost curves: the price of giving units up, in a layer's output and in the model's predictions.

Costs are computed one layer at a time; layers are compared by `allocate` alone. Sharing that leaves
a unit (almost) no weights of its own is costed on the units that removal would pick, in the same
order, so that sharing and removal can be compared like for like. `measured` costs the same curves
again by what they do to predictions. `least_squares` knows no model and no plan.
"""
