"""Checkpoints of few bits: which matrices are rounded, what is written, and what stock tools read of it."""
