"""The format made known to programs that never import headshare, as their Python starts.

Two files are run there and not imported: `hook.py`, and `on_path/sitecustomize.py`, which Python finds by PYTHONPATH.
`always.py` writes a line into an environment that runs the first.
"""
