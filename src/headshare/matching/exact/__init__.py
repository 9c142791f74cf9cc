"""Exact matches: what stands in a checkpoint several times, bit for bit, found or made by repeating layers."""
