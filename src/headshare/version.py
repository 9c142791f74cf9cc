"""The version of the package that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("headshare")
except PackageNotFoundError:  # it is run from sources that nobody installed
    __version__ = "unknown"
