"""Storages: ways in which a loaded model holds shared weights."""
