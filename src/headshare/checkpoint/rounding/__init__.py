"""Matrices of few bits: their numbers and scales, the record of how they were rounded, their tensors in a file."""
