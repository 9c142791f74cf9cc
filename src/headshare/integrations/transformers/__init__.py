"""The transformers integration: from_pretrained, save_pretrained, and loading a model with its tokenizer.

To transformers, sharing is a quantisation method. Its quantizer shrinks the stock modules that lose
units, replaces the modules that sections of the plan change, and installs a storage while the model
is on the meta device. Weights then load under their own names.
"""
