"""A model run one layer at a time, so that models larger than memory can be calibrated."""
