"""`python -m headshare` is the command line."""

from headshare.cli.app import main

main()
