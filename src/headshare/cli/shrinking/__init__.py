"""The command shrink, and the options of size that others have in common with it."""
