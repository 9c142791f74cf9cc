"""Model families, and where their models keep heads and neurons. This package knows names and shapes only."""
