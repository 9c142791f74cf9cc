"""Pairs chosen by weights: match functions, scores, and the pairing of DirectShare.

All cosines follow from inner products, part by part. Those are streamed, a slice of every unit at a
time, so each weight is read once and only slices are in memory. Slices are scaled by powers of two,
multiplied in float32 (float64 for small models) and summed in float64; pairs too close to call are
computed again in float64. `pairing` sees scores, never a weight.
"""
