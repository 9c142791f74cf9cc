"""Cost curves: the cost of giving units up, in a layer's output and in the model's predictions."""
