"""The whole way from a dense model to a smaller one in one call: choose, predict, repair, write, verify, measure.

Every step is another package's. Here is only their order, what is asked and told between them, and the result.
"""
