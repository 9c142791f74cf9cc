"""The settings of the demo where nothing else is asked for, apart from it: the command line shows them in its help."""

RATIOS = (0.0, 0.1, 0.2, 0.3)
TOKENS = 4096
