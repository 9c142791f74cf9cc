"""Pooled storages: each unit stands once in memory, found by mapped pages, block tables or CUDA mappings."""
