"""Integrations of shared checkpoints into other libraries."""
