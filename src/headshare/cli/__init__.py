"""The command line, with a module for each group of commands."""

from headshare.cli.app import main

__all__ = ["main"]
