"""The transformers integration: from_pretrained, save_pretrained, and loading a model with its tokenizer."""
