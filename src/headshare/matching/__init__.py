"""Pairs of units chosen by their weights: match functions, scores, and the pairing of DirectShare."""
