"""Code that a Python runs as it starts: it imports headshare as soon as transformers is imported.

Every program pays for it, so it imports nothing by itself.
"""

import sys


class _Waiting:
    """A finder that finds nothing, and learns that transformers is about to be imported."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """None: others find the module."""
        if fullname == "transformers":
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            try:
                import headshare.integrations.transformers.registering  # noqa: F401 - headshare itself registers
            except ImportError as error:
                words = f"headshare: {sys.executable} loads no models of headshare's format: {error}\n"
                if sys.stderr is not None:
                    sys.stderr.write(words)


sys.meta_path.insert(0, _Waiting())
