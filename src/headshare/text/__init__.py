"""Text: documents, windows of tokens, and calibration tokens."""
