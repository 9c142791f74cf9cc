"""Refits: output projections in closed form, and the refinement of one layer by gradient steps.

The hidden states of the dense model and of the shared one are kept side by side. Each output
projection is fitted so that it brings the second back to the first; all weights of a layer may
then take gradient steps. The fits know no model.
"""
