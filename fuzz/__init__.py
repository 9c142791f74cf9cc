"""Hostile inputs and starved runs, by the thousand: `make fuzz`. The suite runs a few of them.

Tiny models and texts are those of the tests.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
