"""The command shrink."""
