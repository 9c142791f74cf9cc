"""How headshare is installed: on another machine, and an extra of it on this one, in the way in which it was itself."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "headshare"
# How somebody gets headshare who has a model that it wrote: it is on no index.
FROM_A_CHECKOUT = "`pip install .` in a checkout of its repository"


def install(extra: str) -> str:
    """The pip command that adds an extra: from the checkout, the repository or the index that headshare came from."""
    origin = _origin()
    url = str(origin.get("url", ""))
    wanted = f"{NAME}[{extra}]"
    if url.startswith("file:") and "dir_info" in origin:
        folder = url2pathname(urlsplit(url).path)
        here = "." if Path(folder) == Path.cwd() else folder
        return f'pip install {"-e " if origin["dir_info"].get("editable") else ""}"{here}[{extra}]"'
    if "vcs_info" in origin:
        return f'pip install "{wanted} @ {origin["vcs_info"].get("vcs", "git")}+{url}"'
    return f'pip install "{wanted} @ {url}"' if url else f'pip install "{wanted}"'


def _origin() -> dict[str, Any]:
    """Where the package was installed from, as pip wrote it down (PEP 610). Empty: from an index."""
    try:
        written = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:  # it is run from its sources
        return {"url": Path(__file__).parents[2].as_uri(), "dir_info": {"editable": True}}
    try:
        origin = json.loads(written or "{}")
    except ValueError:
        return {}
    return origin if isinstance(origin, dict) else {}
