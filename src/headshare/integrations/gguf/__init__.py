"""GGUF files, which llama.cpp, Ollama and LM Studio run: a checkpoint, shared or dense, written as one.

What was removed stays removed. What is shared is written as often as it is used, since no two tensors of such a file
can lie in one place. The file is made here; llama.cpp itself is needed by tests only.
"""
