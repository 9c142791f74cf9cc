"""Copies: tensors that are, whole and bit for bit, one stored tensor under several names."""
