"""The shared format: checkpoints shared, expanded and rewritten, and their exact sizes."""
