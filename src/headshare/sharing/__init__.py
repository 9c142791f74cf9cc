"""The shared format: share, expand and rewrite checkpoints, and their exact sizes.

A plan is held against its checkpoint once (`fits`), and gives a tensor plan for each tensor that it
touches. From those come assemblies, which are streamed: any output tensor from any input, a slice
at a time. Chooses nothing, and knows no match function.
"""
