"""Hostile inputs and starved runs, by the thousand: `make fuzz`. The suite runs a few of them.

Tiny models and texts are those of the tests.
"""

import os
import sys
from pathlib import Path

# before transformers is imported: nothing is fetched, and forks of this process have no threads of tokenizers
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
