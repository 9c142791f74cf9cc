"""Hugging Face checkpoints: headers, rows on demand, and the entry of headshare in config.json."""
