"""The command line: one module per group of commands."""

from headshare.cli.app import main

__all__ = ["main"]
