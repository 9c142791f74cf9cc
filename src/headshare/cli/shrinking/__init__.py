"""The command shrink, and the table that it prints."""
