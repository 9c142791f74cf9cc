"""Training-free methods of others at equal stored bytes, rewritten from their papers, each with and without our refit.

A peer is worked out one sublayer at a time and multiplied out to the dense shapes of a stock model, in which it is
measured. What it would store is counted by its formula. All peers read the same statistics of the calibration text.
"""
