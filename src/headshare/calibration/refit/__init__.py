"""Refits: output projections in closed form, and gradient reconstruction of one layer.

The hidden states of the dense model and of the shared one are kept side by side. Each output
projection is fitted so that it brings the second back to the first; a layer's other matrices may
then follow by gradient steps. The fits know no model.
"""
