"""Gradient steps after the closed form: on the weights of one layer, or on those of the whole model.

Both change only numbers that a layer stores for itself alone, and keep the step that held-out text
wants most.
"""
