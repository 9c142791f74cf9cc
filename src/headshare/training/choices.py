"""The words between which a training run chooses."""

from enum import StrEnum


class TrainingMethod(StrEnum):
    """The order of training and sharing.

    postshare: pull the pairs of a dense model together, then share it. recover: train a shared model. both: share
    first, then train, in one run. dense: train a dense model as it is, which the others are compared with, and which
    can be shared afterwards.
    """

    POSTSHARE = "postshare"
    RECOVER = "recover"
    BOTH = "both"
    DENSE = "dense"


class Distance(StrEnum):
    """The distance between the two ends of a tie, part by part.

    It is the Frobenius norm of their difference (the paper's), its square, or 1 - cosine of the flattened parts (which
    units are matched by).
    """

    FROBENIUS = "frobenius"
    SQUARED = "squared"
    COSINE = "cosine"
