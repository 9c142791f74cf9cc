"""A model run one layer at a time, so that models larger than memory can be calibrated.

Each layer is built on the meta device, filled from the checkpoint, and run over the hidden states
of all windows.
"""
