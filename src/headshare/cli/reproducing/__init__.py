"""The command reproduce."""
