"""Integrations: shared checkpoints in other libraries."""
