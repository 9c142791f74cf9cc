"""Run by each Python that starts with this folder in PYTHONPATH: `headshare run` puts it there.

It runs `hook.py`, and then the sitecustomize that Python would have run without this one.
"""

import os
import sys
from importlib.machinery import PathFinder

_FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib costs more than all else here
_HOOK = os.path.join(os.path.dirname(_FOLDER), "hook.py")  # noqa: PTH118, PTH120

with open(_HOOK, encoding="utf-8") as _file:  # noqa: PTH123
    exec(compile(_file.read(), _HOOK, "exec"), {"__name__": "headshare_hook"})  # noqa: S102 - a file of ours

_next = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != _FOLDER])
if _next is not None and _next.loader is not None:
    from importlib.util import module_from_spec

    sys.modules["sitecustomize"] = module_from_spec(_next)
    _next.loader.exec_module(sys.modules["sitecustomize"])
