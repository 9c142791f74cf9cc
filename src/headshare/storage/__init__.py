"""Storages: the ways in which a loaded model holds shared weights.

A storage replaces the modules of a plan's tensors while the model is on the meta device. All keep
the stock names and store only the rows they own, so a state dict is the same under each. A storage
says by traits what it is, and no other package names one. It sees reduced coordinates only, and
knows of no removal.
"""
