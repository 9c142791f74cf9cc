"""`python -m headshare` is the command line."""

from headshare.cli import main

main()
