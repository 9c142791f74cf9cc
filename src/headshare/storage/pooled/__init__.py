"""Pooled storages: each unit stands once in memory, and is found by mapped pages, block tables or CUDA mappings."""
