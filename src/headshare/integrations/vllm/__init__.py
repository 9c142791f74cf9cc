"""vLLM: a plugin by which it loads and serves shared checkpoints, on its own model classes.

vLLM finds `plugin.register` by an entry point. The modules that say which rows a rank holds (`rows`, `weights`) know no
engine; all others import vLLM.
"""
