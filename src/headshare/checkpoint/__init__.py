"""Hugging Face checkpoints: headers, rows on demand, and the entry of headshare in config.json.

A checkpoint is a stranger's: sizes are held against the file before anything is read, only
safetensors files are opened, and code that a checkpoint brings along is refused. Matrices in 4 bits
are packed as compressed-tensors packs them, rows first, so that what a plan does to a matrix's rows
it does to each of their parts.
"""
