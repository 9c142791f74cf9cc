"""Model families: where they keep their heads and neurons. Knows names and shapes only.

A family is a row of data, and says everything about itself there. All that comes after sees only
places, `start + group * step`, so fused, interleaved, transposed and grouped weights need no
further cases. Units can be removed from the attention of a family only where a test showed that its
layers may have different numbers of heads; a layer's whole attention can be removed from all.
"""
