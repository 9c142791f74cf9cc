"""Pairs chosen by weights: match functions, scores, and the pairing of DirectShare."""
