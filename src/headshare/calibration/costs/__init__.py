"""Cost curves: the price of giving units up, in a layer's output and in the model's predictions."""
