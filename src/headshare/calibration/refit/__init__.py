"""Refits: output projections in closed form, and gradient reconstruction of one layer."""
