"""The shared format: share, expand and rewrite checkpoints, and their exact sizes."""
